//! Which system calls a guest hands over.
//!
//! All that a sandbox hands over, and what AF_VSOCK would answer differently than TCP. A notification costs some 50 us
//! in a guest, so the conditions are as narrow as a filter can make them, and `sendto` with an address is not among
//! them: each datagram would pay.

use super::sendfile;
use crate::interceptor::{self, Publishing};
use kso_sys::notify::{Action, Condition, Rule};
use kso_sys::{numbers as number, options, vsock};
use kso_wire::OptionName;

/// Levels of options that AF_VSOCK does not have: `IPPROTO_IP`, `IPPROTO_TCP`, `IPPROTO_IPV6`.
pub(super) const LEVELS: [u32; 3] = [0, 6, 41];
/// `SOL_SOCKET`.
pub(super) const SOL_SOCKET: u32 = 1;

/// Options of [`SOL_SOCKET`] (include/uapi/asm-generic/socket.h).
pub(super) mod socket_option {
    pub const REUSEADDR: u32 = 2;
    pub const ERROR: u32 = 4;
    pub const SNDBUF: u32 = 7;
    pub const RCVBUF: u32 = 8;
    pub const KEEPALIVE: u32 = 9;
    pub const LINGER: u32 = 13;
    pub const REUSEPORT: u32 = 15;
    pub const PROTOCOL: u32 = 38;
    pub const DOMAIN: u32 = 39;
}

/// Options that a program can set without being seen: they are often set, and seldom on a socket that is outsourced.
pub(super) const UNSEEN: &[OptionName] =
    &[OptionName::ReuseAddress, OptionName::ReusePort, OptionName::ReceiveTimeout, OptionName::SendTimeout];

/// The filter of a guest's programs.
#[must_use]
pub fn rules(publishing: Publishing, io_uring: bool) -> Vec<Rule> {
    use socket_option as so;
    let notify = |call, conditions| Rule { call, conditions, action: Action::Notify };
    let is = Condition::Is;
    let mut rules = interceptor::rules(publishing, io_uring);
    // These are here without a condition, or with another one.
    rules.retain(|rule| !matches!(rule.call, number::SETSOCKOPT | number::GETSOCKNAME));
    if publishing != Publishing::Everything {
        // No port is reserved, and AF_VSOCK refuses to bind what is no vsock address.
        rules.retain(|rule| rule.call != number::BIND);
    }
    // Vsock sockets are ours: a program's own could reach past the runner.
    rules.push(Rule {
        call: number::SOCKET,
        conditions: vec![is(0, number::AF_VSOCK.cast_unsigned())],
        action: Action::Fail(number::EAFNOSUPPORT),
    });
    rules.push(notify(number::GETSOCKNAME, vec![]));
    rules.push(notify(number::GETPEERNAME, vec![]));
    if publishing != Publishing::Nothing {
        for call in [number::ACCEPT, number::ACCEPT4] {
            // Without a place for the address it is native.
            rules.push(notify(call, vec![Condition::Above(1, 0)]));
            rules.push(notify(call, vec![Condition::Wide(1)]));
        }
    }
    for level in LEVELS {
        rules.push(notify(number::GETSOCKOPT, vec![is(1, level)]));
        rules.push(notify(number::SETSOCKOPT, vec![is(1, level)]));
    }
    for option in [
        so::ERROR,
        so::DOMAIN,
        so::PROTOCOL,
        so::KEEPALIVE,
        so::LINGER,
        so::SNDBUF,
        so::RCVBUF,
        so::REUSEADDR,
        so::REUSEPORT,
    ] {
        rules.push(notify(number::GETSOCKOPT, vec![is(1, SOL_SOCKET), is(2, option)]));
    }
    let rare = options::rare().filter(|&(level, _)| level.cast_unsigned() == SOL_SOCKET);
    let mut set: Vec<u32> = rare.map(|(_, option)| option.cast_unsigned()).collect();
    set.extend([so::KEEPALIVE, so::LINGER, so::SNDBUF, so::RCVBUF]);
    set.sort_unstable();
    set.dedup();
    for option in set {
        rules.push(notify(number::SETSOCKOPT, vec![is(1, SOL_SOCKET), is(2, option)]));
    }
    rules.push(notify(number::SENDFILE, vec![Condition::Above(3, sendfile::LEAST)]));
    rules.push(notify(number::SENDFILE, vec![Condition::Wide(3)]));
    for request in [vsock::FIONREAD, vsock::SIOCOUTQ] {
        rules.push(notify(number::IOCTL, vec![is(1, request)]));
    }
    rules
}
