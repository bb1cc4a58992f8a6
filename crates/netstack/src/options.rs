//! Socket options, as far as there is something here that they mean.

use kso_wire::{Errno, OptionName, OptionValue, SocketOptions};
use smoltcp::socket::tcp;
use std::time::Duration;

/// How long a connection is waited for: as long as Linux does (tcp_syn_retries).
const CONNECTING: Duration = Duration::from_secs(127);
/// How long an acknowledgement is waited for: as long as Linux does (tcp_retries2).
const ACKNOWLEDGEMENT: Duration = Duration::from_secs(924);
/// How long a connection may take to end that nobody holds any more: as long as Linux waits (tcp_fin_timeout).
const ORPHAN: Duration = Duration::from_secs(60);
/// Bytes of buffers at least.
const LEAST_BUFFER: usize = 4096;

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    keep_alive: bool,
    /// Seconds.
    keep_idle: u32,
    keep_interval: u32,
    keep_count: u32,
    /// Milliseconds; 0: none.
    user_timeout: u32,
    hops: u8,
    no_delay: bool,
    /// Bytes that the program asked for; 0: none.
    receive_buffer: usize,
    send_buffer: usize,
    /// A listener of IPv6 takes no IPv4.
    pub v6_only: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            keep_alive: false,
            keep_idle: 7200,
            keep_interval: 75,
            keep_count: 9,
            user_timeout: 0,
            hops: 64,
            no_delay: false,
            receive_buffer: 0,
            send_buffer: 0,
            v6_only: false,
        }
    }
}

impl From<&SocketOptions> for Options {
    /// What has no meaning here is left out, as docs/netstack.md says.
    fn from(wanted: &SocketOptions) -> Self {
        let mut options = Self::default();
        for option in wanted.iter() {
            let _ = options.set(option.name, option.value);
        }
        options
    }
}

impl Options {
    /// `setsockopt`.
    pub fn set(&mut self, name: OptionName, value: OptionValue) -> Result<(), Errno> {
        let number = |least: i64, most: i64| {
            let fits = (least..=most).contains(&value);
            fits.then(|| u32::try_from(value).unwrap_or(0)).ok_or(Errno::EINVAL)
        };
        match name {
            OptionName::KeepAlive => self.keep_alive = value != 0,
            OptionName::KeepIdle => self.keep_idle = number(1, 32_767)?,
            OptionName::KeepInterval => self.keep_interval = number(1, 32_767)?,
            OptionName::KeepCount => self.keep_count = number(1, 127)?,
            OptionName::UserTimeout => self.user_timeout = number(0, i64::from(i32::MAX))?,
            OptionName::NoDelay => self.no_delay = value != 0,
            OptionName::V6Only => self.v6_only = value != 0,
            // -1: the default.
            OptionName::TimeToLive | OptionName::UnicastHops if value == -1 => self.hops = 64,
            OptionName::TimeToLive | OptionName::UnicastHops => {
                self.hops = u8::try_from(number(1, 255)?).unwrap_or(64);
            }
            OptionName::ReceiveBuffer => self.receive_buffer = usize::try_from(value).unwrap_or(0),
            OptionName::SendBuffer => self.send_buffer = usize::try_from(value).unwrap_or(0),
            _ => return Err(Errno::ENOPROTOOPT),
        }
        Ok(())
    }

    /// `getsockopt`, of what the socket itself does not know better.
    pub fn get(&self, name: OptionName, socket: &tcp::Socket<'_>) -> Result<OptionValue, Errno> {
        // As a program would set them: Linux reports twice that.
        let bytes = |capacity: usize| i64::try_from(capacity / 2).unwrap_or(i64::MAX);
        Ok(match name {
            OptionName::KeepAlive => self.keep_alive.into(),
            OptionName::KeepIdle => self.keep_idle.into(),
            OptionName::KeepInterval => self.keep_interval.into(),
            OptionName::KeepCount => self.keep_count.into(),
            OptionName::UserTimeout => self.user_timeout.into(),
            OptionName::NoDelay => self.no_delay.into(),
            OptionName::V6Only => self.v6_only.into(),
            OptionName::TimeToLive | OptionName::UnicastHops => self.hops.into(),
            OptionName::ReceiveBuffer => bytes(socket.recv_capacity()),
            OptionName::SendBuffer => bytes(socket.send_capacity()),
            _ => return Err(Errno::ENOPROTOOPT),
        })
    }

    /// Bytes of the two buffers, receive and send, when there is room for `most` each.
    pub fn buffers(&self, most: usize) -> (usize, usize) {
        let chosen = |wanted: usize| match wanted {
            0 => most,
            wanted => wanted.saturating_mul(2).clamp(LEAST_BUFFER, most),
        };
        (chosen(self.receive_buffer), chosen(self.send_buffer))
    }

    /// Sets on a socket what it can have.
    pub fn apply(&self, socket: &mut tcp::Socket<'_>) {
        socket.set_hop_limit(Some(self.hops));
        let interval = smoltcp::time::Duration::from_secs(self.keep_idle.into());
        socket.set_keep_alive(self.keep_alive.then_some(interval));
    }

    /// How long the peer of a socket may be silent. `None`: for ever.
    pub fn patience(&self, socket: &tcp::Socket<'_>, orphan: bool) -> Option<Duration> {
        use tcp::State;
        let user = (self.user_timeout != 0).then(|| Duration::from_millis(self.user_timeout.into()));
        match socket.state() {
            State::SynSent | State::SynReceived => Some(user.unwrap_or(CONNECTING).min(CONNECTING)),
            _ if orphan => Some(ORPHAN),
            State::FinWait1 | State::Closing | State::LastAck => Some(user.unwrap_or(ACKNOWLEDGEMENT)),
            _ if socket.send_queue() > 0 => Some(user.unwrap_or(ACKNOWLEDGEMENT)),
            State::Established | State::CloseWait | State::FinWait2 if self.keep_alive => {
                let (idle, rest) = (self.keep_idle, self.keep_interval.saturating_mul(self.keep_count));
                Some(Duration::from_secs(u64::from(idle) + u64::from(rest)))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_is_read_and_what_is_not_known_is_refused() {
        let buffer = || tcp::SocketBuffer::new(vec![0; 8192]);
        let socket = tcp::Socket::new(buffer(), buffer());
        let mut options = Options::default();
        for (name, value) in
            [(OptionName::KeepIdle, 60), (OptionName::TimeToLive, 9), (OptionName::NoDelay, 1)]
        {
            options.set(name, value).unwrap();
            assert_eq!(options.get(name, &socket), Ok(value));
        }
        assert_eq!(options.set(OptionName::TimeToLive, 0), Err(Errno::EINVAL));
        assert_eq!(options.set(OptionName::Priority, 1), Err(Errno::ENOPROTOOPT));
        assert_eq!(options.get(OptionName::Priority, &socket), Err(Errno::ENOPROTOOPT));
        assert_eq!(options.get(OptionName::SendBuffer, &socket), Ok(4096));
        options.set(OptionName::ReceiveBuffer, 10).unwrap();
        assert_eq!(options.buffers(1 << 20), (LEAST_BUFFER, 1 << 20));
    }
}
