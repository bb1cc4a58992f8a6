//! Batches of datagrams, and what came of them: `recvmmsg`, `sendmmsg`, segmentation by the kernel
//! (`UDP_SEGMENT`, `UDP_GRO`) and the queue of errors (`IP_RECVERR`). Sources: recvmmsg(2), udp(7), ip(7),
//! ipv6(7), cmsg(3).

use crate::socket::{RawAddress, address_from_raw, address_to_raw, set};
use kso_wire::Family;
use std::io::{self, IoSlice};
use std::mem::{MaybeUninit, size_of};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Room for one received datagram, or several of one size as `UDP_GRO` joins them, bytes.
pub const SLOT: usize = 65_536;
/// At most so many datagrams are received by one call.
pub const MAX_RECEIVE: usize = 32;
/// At most so many messages are sent by one call.
pub const MAX_SEND: usize = 64;
/// At most so many datagrams of one message are sent by segmentation (`UDP_MAX_SEGMENTS` of Linux 4.18).
pub const MAX_SEGMENTS: usize = 64;
/// Room for the ancillary data of a datagram: IPV6_PKTINFO, IPV6_TCLASS, UDP_GRO.
const CONTROL: usize = 128;
const UDP_SEGMENT: libc::c_int = 103;
const UDP_GRO: libc::c_int = 104;

/// Switches on what [`ReceiveBatch`] reads: traffic class, joined datagrams, for an unconnected socket the
/// local address; and the queue of errors. What a kernel does not know stays off.
///
/// # Errors
/// The queue of errors cannot be had: not an Internet datagram socket.
pub fn prepare(socket: BorrowedFd<'_>, family: Family, connected: bool) -> io::Result<()> {
    let on = 1 as libc::c_int;
    let (level, errors, class, info) = match family {
        Family::V4 => (libc::IPPROTO_IP, libc::IP_RECVERR, libc::IP_RECVTOS, libc::IP_PKTINFO),
        Family::V6 => (libc::IPPROTO_IPV6, libc::IPV6_RECVERR, libc::IPV6_RECVTCLASS, libc::IPV6_RECVPKTINFO),
    };
    set(socket, level, errors, &on)?;
    let _ = set(socket, level, class, &on);
    let _ = set(socket, libc::IPPROTO_UDP, UDP_GRO, &on);
    if !connected {
        let _ = set(socket, level, info, &on);
    }
    Ok(())
}

/// The hop limit of what is sent from now on (`IP_TTL`, `IPV6_UNICAST_HOPS`).
///
/// # Errors
/// Out of range, or not an Internet socket.
pub fn set_hops(socket: BorrowedFd<'_>, family: Family, hops: u8) -> io::Result<()> {
    let hops = libc::c_int::from(hops);
    match family {
        Family::V4 => set(socket, libc::IPPROTO_IP, libc::IP_TTL, &hops),
        Family::V6 => set(socket, libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, &hops),
    }
}

/// The traffic class of what is sent from now on (`IP_TOS`, `IPV6_TCLASS`).
///
/// # Errors
/// Not permitted, or not an Internet socket.
pub fn set_traffic_class(socket: BorrowedFd<'_>, family: Family, class: u8) -> io::Result<()> {
    let class = libc::c_int::from(class);
    match family {
        Family::V4 => set(socket, libc::IPPROTO_IP, libc::IP_TOS, &class),
        Family::V6 => set(socket, libc::IPPROTO_IPV6, libc::IPV6_TCLASS, &class),
    }
}

/// What is known of a received datagram beside its bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// Bytes.
    pub length: usize,
    /// There were more bytes than [`SLOT`].
    pub truncated: bool,
    /// Who sent it, if that was asked for.
    pub source: Option<SocketAddr>,
    /// Which address it was sent to.
    pub local: Option<IpAddr>,
    /// It is several datagrams of this size, the last one perhaps shorter.
    pub segment: Option<u16>,
    /// TOS or traffic class.
    pub traffic_class: u8,
}

/// Buffers for one `recvmmsg`. The memory is reserved, and used as datagrams fill it. The default has none,
/// and receives nothing.
#[derive(Debug, Default)]
pub struct ReceiveBatch {
    buffer: Vec<u8>,
    received: Vec<Received>,
}

impl ReceiveBatch {
    /// Reserves buffers for [`MAX_RECEIVE`] datagrams.
    #[must_use]
    pub fn new() -> Self {
        Self { buffer: vec![0; SLOT * MAX_RECEIVE], received: vec![Received::default(); MAX_RECEIVE] }
    }

    /// Receives up to `limit` datagrams without waiting and tells how many there were.
    ///
    /// # Errors
    /// `EWOULDBLOCK`, or an error that was pending on the socket.
    pub fn receive(&mut self, socket: BorrowedFd<'_>, limit: usize, sources: bool) -> io::Result<usize> {
        let limit = limit.min(self.received.len());
        let mut names = [MaybeUninit::<libc::sockaddr_storage>::uninit(); MAX_RECEIVE];
        let mut controls = [MaybeUninit::<Control>::uninit(); MAX_RECEIVE];
        let mut vectors = [MaybeUninit::<libc::iovec>::uninit(); MAX_RECEIVE];
        let mut messages = [MaybeUninit::<libc::mmsghdr>::uninit(); MAX_RECEIVE];
        let slots = self.buffer.chunks_exact_mut(SLOT).zip(&mut names).zip(&mut controls);
        for (((message, vector), ((slot, name), control)), _) in
            messages.iter_mut().zip(&mut vectors).zip(slots).zip(0..limit)
        {
            let vector =
                vector.write(libc::iovec { iov_base: slot.as_mut_ptr().cast(), iov_len: slot.len() });
            let header = libc::msghdr {
                msg_name: if sources { name.as_mut_ptr().cast() } else { std::ptr::null_mut() },
                msg_namelen: if sources { size_of::<libc::sockaddr_storage>() as u32 } else { 0 },
                msg_iov: vector,
                msg_iovlen: 1,
                msg_control: control.as_mut_ptr().cast(),
                msg_controllen: CONTROL as _,
                msg_flags: 0,
            };
            message.write(libc::mmsghdr { msg_hdr: header, msg_len: 0 });
        }
        // SAFETY: the first `limit` headers were initialised above, and each points to buffers of the stated
        // lengths that live until the end of this function.
        let got = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                messages.as_mut_ptr().cast(),
                limit as libc::c_uint,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        if got < 0 {
            return Err(io::Error::last_os_error());
        }
        let got = got as usize;
        for ((message, received), name) in messages.iter().take(got).zip(&mut self.received).zip(&names) {
            // SAFETY: initialised above, for `got` is at most `limit`.
            let message = unsafe { message.assume_init_ref() };
            *received = Received {
                length: message.msg_len as usize,
                truncated: message.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
                ..Received::default()
            };
            if sources {
                // SAFETY: the kernel wrote `msg_namelen` bytes of the address, at most its size.
                let bytes = unsafe {
                    std::slice::from_raw_parts(
                        name.as_ptr().cast::<u8>(),
                        message.msg_hdr.msg_namelen as usize,
                    )
                };
                if let RawAddress::Inet(source) = address_from_raw(bytes) {
                    received.source = Some(source);
                }
            }
            each_control(&message.msg_hdr, |level, kind, data| received.note(level, kind, data));
        }
        Ok(got)
    }

    /// The `index`th datagram of the last call.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<(&Received, &[u8])> {
        let received = self.received.get(index)?;
        let start = index * SLOT;
        Some((received, self.buffer.get(start..start + received.length.min(SLOT))?))
    }
}

impl Received {
    fn note(&mut self, level: libc::c_int, kind: libc::c_int, data: &[u8]) {
        match (level, kind) {
            (libc::IPPROTO_UDP, UDP_GRO) => {
                let size = first_int(data).and_then(|size| u16::try_from(size).ok());
                self.segment = size.filter(|size| *size != 0 && usize::from(*size) < self.length);
            }
            (libc::IPPROTO_IP, libc::IP_TOS) => self.traffic_class = data.first().copied().unwrap_or(0),
            (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                self.traffic_class = first_int(data).unwrap_or(0) as u8;
            }
            // struct in_pktinfo: interface, local address, destination of the header.
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                self.local =
                    data.get(4..8).and_then(|octets| <[u8; 4]>::try_from(octets).ok()).map(IpAddr::from);
            }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                self.local =
                    data.get(..16).and_then(|octets| <[u8; 16]>::try_from(octets).ok()).map(IpAddr::from);
            }
            _ => {}
        }
    }
}

fn first_int(data: &[u8]) -> Option<i32> {
    data.first_chunk().copied().map(i32::from_ne_bytes)
}

/// Ancillary data is aligned as its header is.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; CONTROL]);

/// Calls `found` with level, type and bytes of each item of ancillary data.
fn each_control(header: &libc::msghdr, mut found: impl FnMut(libc::c_int, libc::c_int, &[u8])) {
    // SAFETY: the kernel wrote `msg_controllen` bytes of well-formed ancillary data to `msg_control`, which
    // the caller keeps alive; the macros of cmsg(3) stay within them.
    unsafe {
        let mut item = libc::CMSG_FIRSTHDR(header);
        while let Some(head) = item.as_ref() {
            let length = head.cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize);
            let data = std::slice::from_raw_parts(libc::CMSG_DATA(item), length);
            found(head.cmsg_level, head.cmsg_type, data);
            item = libc::CMSG_NXTHDR(header, item);
        }
    }
}

/// One message of a batch: so many of the slices, sent as datagrams of `segment` bytes each, or, if that is 0,
/// as one datagram.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// How many slices it has.
    pub slices: usize,
    /// Bytes of each of its datagrams but the last.
    pub segment: u16,
}

/// Where a batch goes, if the socket is not connected, and from which of the host's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Whom to send to.
    pub peer: SocketAddr,
    /// The source address (`IP_PKTINFO`, `IPV6_PKTINFO`).
    pub local: Option<IpAddr>,
}

/// Sends messages, whose slices follow each other in `slices`, without waiting. Tells how many were sent; it
/// stops before the first that fails.
///
/// # Errors
/// The first message failed.
pub fn send(
    socket: BorrowedFd<'_>,
    destination: Option<Destination>,
    slices: &[IoSlice<'_>],
    messages: &[Message],
) -> io::Result<usize> {
    let name = destination.map(|destination| address_to_raw(destination.peer));
    let local = destination.and_then(|destination| destination.local);
    let mut controls = [MaybeUninit::<Control>::uninit(); MAX_SEND];
    let mut headers = [MaybeUninit::<libc::mmsghdr>::uninit(); MAX_SEND];
    let mut rest = slices;
    let mut count = 0;
    for ((message, header), control) in messages.iter().zip(&mut headers).zip(&mut controls) {
        let Some((mine, after)) = rest.split_at_checked(message.slices) else { break };
        rest = after;
        let length = if message.segment == 0 && local.is_none() {
            0
        } else {
            write_control(&mut control.write(Control([0; CONTROL])).0, message.segment, local)
        };
        let (name, name_length) = match &name {
            // The kernel only reads it; the type of the field is not const.
            Some((storage, length)) => (std::ptr::from_ref(storage).cast_mut().cast(), *length),
            None => (std::ptr::null_mut(), 0),
        };
        let inner = libc::msghdr {
            msg_name: name,
            msg_namelen: name_length,
            // IoSlice has the layout of iovec (std::io::IoSlice), and the kernel only reads it.
            msg_iov: mine.as_ptr().cast_mut().cast(),
            msg_iovlen: mine.len() as _,
            msg_control: if length == 0 { std::ptr::null_mut() } else { control.as_mut_ptr().cast() },
            msg_controllen: length as _,
            msg_flags: 0,
        };
        header.write(libc::mmsghdr { msg_hdr: inner, msg_len: 0 });
        count += 1;
    }
    if count == 0 {
        return Ok(0);
    }
    // One message is sent by sendmsg(2), which is a little cheaper.
    // SAFETY: the first `count` headers were initialised above and point to an address, slices and ancillary
    // data that live until the end of this function.
    let sent = unsafe {
        if count == 1 {
            let header = headers.as_ptr().cast::<libc::mmsghdr>();
            let sent = libc::sendmsg(
                socket.as_raw_fd(),
                &raw const (*header).msg_hdr,
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            );
            if sent < 0 { -1 } else { 1 }
        } else {
            libc::sendmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr().cast(),
                count as libc::c_uint,
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        }
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(sent as usize) }
}

/// Writes the ancillary data of a message and tells its length.
fn write_control(control: &mut [u8; CONTROL], segment: u16, local: Option<IpAddr>) -> usize {
    let mut at = 0;
    let mut item = |level: libc::c_int, kind: libc::c_int, data: &[u8]| {
        // SAFETY: arithmetic on constants.
        let (length, space) = unsafe {
            (libc::CMSG_LEN(data.len() as u32) as usize, libc::CMSG_SPACE(data.len() as u32) as usize)
        };
        let Some(place) = control.get_mut(at..at + space) else { return };
        // struct cmsghdr: length, level, type, data.
        let (head, body) = place.split_at_mut(length - data.len());
        let word = size_of::<usize>();
        let fields = (length.to_ne_bytes(), level.to_ne_bytes(), kind.to_ne_bytes());
        for (to, from) in head.iter_mut().zip(fields.0.iter().take(word).chain(&fields.1).chain(&fields.2)) {
            *to = *from;
        }
        for (to, from) in body.iter_mut().zip(data) {
            *to = *from;
        }
        at += space;
    };
    if segment != 0 {
        item(libc::IPPROTO_UDP, UDP_SEGMENT, &segment.to_ne_bytes());
    }
    match local {
        // struct in_pktinfo: interface, source, unused.
        Some(IpAddr::V4(local)) => {
            let mut info = [0; 12];
            info[4..8].copy_from_slice(&local.octets());
            item(libc::IPPROTO_IP, libc::IP_PKTINFO, &info);
        }
        // struct in6_pktinfo: source, interface.
        Some(IpAddr::V6(local)) => {
            let mut info = [0; 20];
            info[..16].copy_from_slice(&local.octets());
            item(libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, &info);
        }
        None => {}
    }
    at
}

/// Who found an error (`SO_EE_ORIGIN_*`, ip(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorOrigin {
    /// The sending kernel itself.
    Local,
    /// An ICMP message, with its type and code.
    Icmp(u8, u8),
    /// An ICMPv6 message, with its type and code.
    Icmp6(u8, u8),
}

/// An error of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueuedError {
    /// Linux's error number.
    pub errno: i32,
    /// Who found it.
    pub origin: ErrorOrigin,
    /// The path's MTU, with `EMSGSIZE`.
    pub info: u32,
    /// The node that sent the ICMP message.
    pub offender: Option<IpAddr>,
    /// To whom the datagram was sent.
    pub peer: Option<SocketAddr>,
    /// Bytes of it in the buffer, from after its UDP header on (of an echo, from its ICMP header on).
    pub length: usize,
}

/// Takes the next error off the queue of a socket (`MSG_ERRQUEUE`); the head of the datagram goes to `buffer`.
/// `None` when the queue is empty.
///
/// # Errors
/// Not a socket.
pub fn next_error(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Option<QueuedError>> {
    loop {
        let mut name = MaybeUninit::<libc::sockaddr_storage>::zeroed();
        let mut control = [MaybeUninit::<Control>::uninit(); 4];
        let mut vector = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        let mut header = libc::msghdr {
            msg_name: name.as_mut_ptr().cast(),
            msg_namelen: size_of::<libc::sockaddr_storage>() as u32,
            msg_iov: &raw mut vector,
            msg_iovlen: 1,
            msg_control: control.as_mut_ptr().cast(),
            msg_controllen: std::mem::size_of_val(&control) as _,
            msg_flags: 0,
        };
        let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
        // SAFETY: the header points to buffers of the stated lengths that outlive the call.
        let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
        if got < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::WouldBlock { Ok(None) } else { Err(error) };
        }
        // SAFETY: zeroed before, and the kernel wrote at most its size.
        let name = unsafe {
            std::slice::from_raw_parts(name.as_ptr().cast::<u8>(), size_of::<libc::sockaddr_storage>())
        };
        let peer = match address_from_raw(name) {
            RawAddress::Inet(peer) => Some(peer),
            _ => None,
        };
        let mut found = None;
        each_control(&header, |level, kind, data| {
            let is_error = matches!(
                (level, kind),
                (libc::IPPROTO_IP, libc::IP_RECVERR) | (libc::IPPROTO_IPV6, libc::IPV6_RECVERR)
            );
            if is_error && let Some(error) = extended_error(data) {
                found = Some(QueuedError { peer, length: got as usize, ..error });
            }
        });
        // Timestamps and the like come by this queue too: they are not errors.
        if found.is_some() {
            return Ok(found);
        }
    }
}

/// `struct sock_extended_err` (include/uapi/linux/errqueue.h): errno, origin, type, code, padding, info, data;
/// then the offender's address.
fn extended_error(data: &[u8]) -> Option<QueuedError> {
    let errno = first_int(data)?;
    let [origin, kind, code] = *data.get(4..7)?.first_chunk()?;
    let origin = match origin {
        libc::SO_EE_ORIGIN_LOCAL => ErrorOrigin::Local,
        libc::SO_EE_ORIGIN_ICMP => ErrorOrigin::Icmp(kind, code),
        libc::SO_EE_ORIGIN_ICMP6 => ErrorOrigin::Icmp6(kind, code),
        _ => return None,
    };
    let info = first_int(data.get(8..12)?)?.cast_unsigned();
    let offender = match data.get(16..).map(address_from_raw) {
        Some(RawAddress::Inet(address)) => Some(address.ip()),
        _ => None,
    };
    let unspecified = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
    let offender = offender.filter(|offender| !unspecified.contains(offender));
    Some(QueuedError { errno, origin, info, offender, peer: None, length: 0 })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    fn pair(loopback: &str) -> (UdpSocket, UdpSocket) {
        let a = UdpSocket::bind((loopback, 0)).unwrap();
        let b = UdpSocket::bind((loopback, 0)).unwrap();
        a.connect(b.local_addr().unwrap()).unwrap();
        (a, b)
    }

    #[test]
    fn segments_arrive_as_datagrams_or_joined() {
        for (loopback, family) in [("127.0.0.1", Family::V4), ("::1", Family::V6)] {
            let (a, b) = pair(loopback);
            let slices =
                [IoSlice::new(b"hello"), IoSlice::new(b"world"), IoSlice::new(b"end"), IoSlice::new(b"")];
            let messages = [Message { slices: 3, segment: 5 }, Message { slices: 1, segment: 0 }];
            assert_eq!(send(a.as_fd(), None, &slices, &messages).unwrap(), 2);
            let mut buffer = [0; 100];
            for expected in [&b"hello"[..], b"world", b"end", b""] {
                let length = b.recv(&mut buffer).unwrap();
                assert_eq!(&buffer[..length], expected);
            }
            prepare(b.as_fd(), family, false).unwrap();
            set_traffic_class(a.as_fd(), family, 0x48).unwrap();
            assert_eq!(send(a.as_fd(), None, &slices, &messages).unwrap(), 2);
            let mut batch = ReceiveBatch::new();
            assert_eq!(batch.receive(b.as_fd(), 8, true).unwrap(), 2);
            let (received, bytes) = batch.get(0).unwrap();
            assert_eq!(bytes, b"helloworldend");
            assert_eq!(received.segment, Some(5));
            assert_eq!(received.traffic_class, 0x48);
            assert_eq!(received.source, Some(a.local_addr().unwrap()));
            assert_eq!(received.local, Some(b.local_addr().unwrap().ip()));
            assert_eq!(batch.get(1).unwrap().1, b"");
            // Answered from the address it was sent to.
            let back = Destination { peer: a.local_addr().unwrap(), local: received.local };
            assert_eq!(send(b.as_fd(), Some(back), &slices, &messages[1..]).unwrap(), 1);
        }
    }

    #[test]
    fn a_refusal_is_queued_with_the_datagram() {
        for (loopback, family) in [("127.0.0.1", Family::V4), ("::1", Family::V6)] {
            let (a, b) = pair(loopback);
            prepare(a.as_fd(), family, true).unwrap();
            let peer = b.local_addr().unwrap();
            drop(b);
            a.send(b"nobody there").unwrap();
            let mut buffer = [0; 100];
            let error = next_error(a.as_fd(), &mut buffer).unwrap().unwrap();
            assert_eq!(error.errno, libc::ECONNREFUSED);
            assert_eq!(error.peer, Some(peer));
            assert_eq!(error.offender, Some(peer.ip()));
            assert_eq!(&buffer[..error.length], b"nobody there");
            let expected = match family {
                Family::V4 => ErrorOrigin::Icmp(3, 3),
                Family::V6 => ErrorOrigin::Icmp6(1, 4),
            };
            assert_eq!(error.origin, expected);
            assert_eq!(next_error(a.as_fd(), &mut buffer).unwrap(), None);
        }
    }
}
