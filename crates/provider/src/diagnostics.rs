//! The kernel's TCP sockets: those there are, and those that end. Source: sock_diag(7),
//! include/uapi/linux/inet_diag.h, include/uapi/linux/tcp.h.
//!
//! Data paths are native: nobody but the kernel knows what a connection carried. While somebody wants to know,
//! it is asked; at other times this costs nothing.

use crate::netlink::{Message, Netlink, attributes, long, number};
use kso_wire::Family;
use rustix::net::netlink::SOCK_DIAG;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};

/// `SOCK_DIAG_BY_FAMILY`, of requests and of answers.
const BY_FAMILY: u16 = 20;
/// `SKNLGRP_INET_TCP_DESTROY` and `SKNLGRP_INET6_TCP_DESTROY`: groups 1 and 3, as a mask.
const DESTROYED: u32 = 1 << 0 | 1 << 2;
/// `INET_DIAG_INFO`, an attribute with `struct tcp_info`.
const INFO: u16 = 2;
/// `sizeof(struct inet_diag_msg)`.
const HEADER: usize = 72;
/// Offset of the inode in it.
const INODE: usize = 68;
/// Offset of the cookie in it.
const COOKIE: usize = 44;
/// `TCP_LISTEN`.
const LISTEN: u8 = 10;
/// States in which the other end's FIN came: `CLOSE_WAIT`, `LAST_ACK`, `CLOSING`; and `CLOSE`, which does not
/// tell: nearly all connections end so, and of one that was reset a byte goes uncounted.
const FINISHED: [u8; 4] = [8, 9, 11, 7];
/// `IPPROTO_TCP`.
const TCP: u8 = 6;
/// Every state but closed, waiting ones (12: `NEW_SYN_RECV`, 6: `TIME_WAIT`) left out: those are no program's.
const STATES: u32 = 0xfff & !(1 << 6) & !(1 << 7);

/// A TCP socket of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket {
    /// `SO_COOKIE`.
    pub cookie: u64,
    /// Its inode, by which /proc/PID/fd names it; 0 when no program has it any more.
    pub inode: u32,
    /// Its own end.
    pub local: SocketAddr,
    /// The other end.
    pub peer: SocketAddr,
    /// Its state, as include/net/tcp_states.h numbers it.
    pub state: u8,
    /// What it carried.
    pub traffic: Traffic,
}

impl Socket {
    /// Whether it listens.
    #[must_use]
    pub fn listens(&self) -> bool {
        self.state == LISTEN
    }
}

/// What a connection carried, from `struct tcp_info`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes of data received.
    pub bytes_in: u64,
    /// Bytes of data sent, repetitions not counted.
    pub bytes_out: u64,
    /// Segments received, also those without data.
    pub segments_in: u32,
    /// It was established: its SYN, or data, was acknowledged, or data came.
    pub established: bool,
}

impl Traffic {
    /// `finished`: the other end sent its FIN, which the kernel counts as a byte received.
    fn parse(info: &[u8], finished: bool) -> Self {
        // Offsets in struct tcp_info; what an older kernel does not have reads as 0.
        let (acknowledged, received) = (long(info, 120).unwrap_or(0), long(info, 128).unwrap_or(0));
        let (sent, repeated) = (long(info, 200).unwrap_or(0), long(info, 208).unwrap_or(0));
        Self {
            bytes_in: received.saturating_sub(finished.into()),
            bytes_out: sent.saturating_sub(repeated),
            segments_in: number(info, 140).unwrap_or(0),
            established: acknowledged > 0 || received > 0,
        }
    }
}

fn parse(message: Message<'_>) -> Option<Socket> {
    if message.kind != BY_FAMILY {
        return None;
    }
    let body = message.body;
    let (&family, &state) = (body.first()?, body.get(1)?);
    let port = |offset: usize| Some(u16::from_be_bytes(*body.get(offset..)?.first_chunk()?));
    let address = |offset: usize| {
        Some(match i32::from(family) {
            kso_sys::numbers::AF_INET => {
                IpAddr::from(Ipv4Addr::from(*body.get(offset..)?.first_chunk::<4>()?))
            }
            _ => IpAddr::from(Ipv6Addr::from(*body.get(offset..)?.first_chunk::<16>()?)),
        })
    };
    let traffic = attributes(body.get(HEADER..)?)
        .find(|(kind, _)| *kind == INFO)
        .map_or_else(Traffic::default, |(_, info)| Traffic::parse(info, FINISHED.contains(&state)));
    Some(Socket {
        cookie: long(body, COOKIE)?,
        inode: number(body, INODE)?,
        local: SocketAddr::new(address(8)?, port(4)?),
        peer: SocketAddr::new(address(24)?, port(6)?),
        state,
        traffic,
    })
}

/// Calls `each` with every TCP socket of this network namespace.
///
/// # Errors
/// The kernel has no sock_diag.
pub fn sockets(mut each: impl FnMut(Socket)) -> io::Result<()> {
    let netlink = Netlink::open(Some(SOCK_DIAG), 0)?;
    for family in [Family::V4, Family::V6] {
        // struct inet_diag_req_v2: family, protocol, extensions, padding, states, and an empty sockid.
        let mut request = [0_u8; 56];
        let head = [family_number(family), TCP, 1 << (INFO - 1), 0];
        for (to, from) in request.iter_mut().zip(head.into_iter().chain(STATES.to_ne_bytes())) {
            *to = from;
        }
        netlink.dump(BY_FAMILY, &request, |message| {
            if let Some(socket) = parse(message) {
                each(socket);
            }
        })?;
    }
    Ok(())
}

fn family_number(family: Family) -> u8 {
    let number = match family {
        Family::V4 => kso_sys::numbers::AF_INET,
        Family::V6 => kso_sys::numbers::AF_INET6,
    };
    u8::try_from(number).unwrap_or(0)
}

/// TCP sockets that end, as they do.
#[derive(Debug)]
pub struct Ends {
    netlink: Netlink,
    buffer: Vec<u8>,
}

impl Ends {
    /// From now on.
    ///
    /// # Errors
    /// The kernel has no sock_diag.
    pub fn subscribe() -> io::Result<Self> {
        let netlink = Netlink::open(Some(SOCK_DIAG), DESTROYED)?;
        let socket = socket2::SockRef::from(&netlink);
        // A burst of connections that end together; a limit, not memory used.
        let _ = socket.set_recv_buffer_size(2 << 20);
        Ok(Self { netlink, buffer: vec![0; 8192] })
    }

    /// Readable when some ended.
    #[must_use]
    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        self.netlink.as_fd()
    }

    /// Calls `each` with those that ended.
    ///
    /// # Errors
    /// `ENOBUFS`: more ended than there was room for; some are not told.
    pub fn run_ready(&mut self, mut each: impl FnMut(Socket)) -> io::Result<()> {
        self.netlink.notifications(&mut self.buffer, |message| {
            if let Some(socket) = parse(message) {
                each(socket);
            }
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn a_connection_is_seen_and_its_end_tells_what_it_carried() {
        let mut ends = Ends::subscribe().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        client.write_all(&[1; 1000]).unwrap();
        server.read_exact(&mut [0; 1000]).unwrap();
        server.write_all(&[2; 30]).unwrap();
        client.read_exact(&mut [0; 30]).unwrap();
        let cookie = kso_sys::cookie(client.as_fd()).unwrap();
        let mut found = Vec::new();
        sockets(|socket| found.push(socket)).unwrap();
        let live = found.iter().find(|socket| socket.cookie == cookie).unwrap();
        assert_eq!(live.local, client.local_addr().unwrap());
        assert_eq!(live.peer, listener.local_addr().unwrap());
        assert_eq!((live.traffic.bytes_in, live.traffic.bytes_out), (30, 1000));
        assert!(live.traffic.established);
        let listening = found.iter().find(|socket| socket.local == listener.local_addr().unwrap());
        assert!(listening.unwrap().listens());
        drop((client, server));
        let mut ended = None;
        for _ in 0..100 {
            ends.run_ready(|socket| ended = if socket.cookie == cookie { Some(socket) } else { ended })
                .unwrap();
            if ended.is_some() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let ended = ended.unwrap();
        assert_eq!((ended.traffic.bytes_in, ended.traffic.bytes_out), (30, 1000));
    }

    #[test]
    fn a_message_that_is_cut_off_is_no_socket() {
        for length in 0..HEADER {
            assert_eq!(parse(Message { kind: BY_FAMILY, body: &vec![2; length] }), None);
        }
    }
}
