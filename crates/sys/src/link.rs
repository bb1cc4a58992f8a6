//! Network interfaces: addresses and routes by rtnetlink(7), one batch of messages.

use std::io;
use std::mem::size_of;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Index of `lo` in every network namespace (`LOOPBACK_IFINDEX`, include/net/flow.h).
pub(crate) const LOOPBACK: u32 = 1;

/// The index of an interface in the network namespace of the calling thread.
pub(crate) fn index(name: &str) -> io::Result<u32> {
    let name = std::ffi::CString::new(name).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    // SAFETY: a NUL-terminated string.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => Ok(index),
    }
}

/// Brings up `lo` and the interface `name` in the network namespace of the calling thread: addresses with their prefixes,
/// without duplicate address detection, and default routes through the gateways.
///
/// # Errors
/// `ENODEV` if there is no such interface; `EPERM` without `CAP_NET_ADMIN`; what rtnetlink refuses.
pub fn set_up(name: &str, addresses: &[(IpAddr, u8)], gateways: &[IpAddr]) -> io::Result<()> {
    let index = index(name)?;
    let mut batch = Batch::default();
    batch.link_up(LOOPBACK, None);
    batch.link_up(index, None);
    for (address, prefix) in addresses {
        batch.address(index, *address, *prefix);
        // See `tun::configure`.
        if address.is_ipv6() {
            batch.local_route(index, *address);
        }
    }
    gateways.iter().for_each(|gateway| batch.default_route(index, *gateway));
    batch.run()
}

/// `IFLA_INET6_ADDR_GEN_MODE` and its value none (include/uapi/linux/if_link.h).
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;

/// Requests to rtnetlink, sent together and answered one by one.
#[derive(Default)]
pub(crate) struct Batch {
    bytes: Vec<u8>,
    /// Of each request, whether it may fail on a kernel without IPv6.
    optional: Vec<bool>,
    start: usize,
}

impl Batch {
    fn begin(&mut self, kind: u16, flags: libc::c_int, optional: bool) {
        self.start = self.bytes.len();
        self.optional.push(optional);
        let flags = (flags | libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
        self.bytes.extend_from_slice(&0_u32.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&flags.to_ne_bytes());
        self.bytes.extend_from_slice(&(self.optional.len() as u32).to_ne_bytes());
        self.bytes.extend_from_slice(&0_u32.to_ne_bytes());
    }

    fn end(&mut self) {
        let length = (self.bytes.len() - self.start) as u32;
        if let Some(field) = self.bytes.get_mut(self.start..self.start + 4) {
            field.copy_from_slice(&length.to_ne_bytes());
        }
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.bytes.extend_from_slice(&((value.len() + 4) as u16).to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
    }

    /// `struct ifinfomsg`.
    fn link(&mut self, index: u32, flags: u32, change: u32) {
        self.bytes.extend_from_slice(&[libc::AF_UNSPEC as u8, 0, 0, 0]);
        self.bytes.extend_from_slice(&index.to_ne_bytes());
        self.bytes.extend_from_slice(&flags.to_ne_bytes());
        self.bytes.extend_from_slice(&change.to_ne_bytes());
    }

    /// `packets`: its MTU, and how many wait for whoever reads a device.
    pub fn link_up(&mut self, index: u32, packets: Option<(u32, u32)>) {
        self.begin(libc::RTM_NEWLINK, 0, false);
        self.link(index, libc::IFF_UP as u32, libc::IFF_UP as u32);
        if let Some((mtu, queue)) = packets {
            self.attribute(libc::IFLA_MTU, &mtu.to_ne_bytes());
            self.attribute(libc::IFLA_TXQLEN, &queue.to_ne_bytes());
        }
        self.end();
    }

    pub fn no_link_local(&mut self, index: u32) {
        self.begin(libc::RTM_NEWLINK, 0, true);
        self.link(index, 0, 0);
        // IFLA_AF_SPEC { AF_INET6 { IFLA_INET6_ADDR_GEN_MODE } }, each level being 4 bytes of header.
        let mut family = Batch::default();
        family.attribute(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE]);
        let mut specification = Batch::default();
        specification.attribute(libc::AF_INET6 as u16, &family.bytes);
        self.attribute(libc::IFLA_AF_SPEC, &specification.bytes);
        self.end();
    }

    pub fn address(&mut self, index: u32, address: IpAddr, prefix: u8) {
        let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        self.begin(libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_REPLACE, address.is_ipv6());
        // `struct ifaddrmsg`: family, prefix, flags, scope, index.
        self.bytes.extend_from_slice(&[family as u8, prefix, libc::IFA_F_NODAD as u8, 0]);
        self.bytes.extend_from_slice(&index.to_ne_bytes());
        self.attribute(libc::IFA_LOCAL, octets(address).as_ref());
        self.attribute(libc::IFA_ADDRESS, octets(address).as_ref());
        self.end();
    }

    /// `struct rtmsg`: family, lengths of the two prefixes, TOS, table, protocol, scope, type, flags.
    fn route(&mut self, address: IpAddr, prefix: u8, table: u8, kind: u8) {
        let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        self.begin(libc::RTM_NEWROUTE, libc::NLM_F_CREATE, address.is_ipv6());
        let scope = libc::RT_SCOPE_UNIVERSE;
        self.bytes.extend_from_slice(&[family as u8, prefix, 0, 0, table, libc::RTPROT_STATIC, scope, kind]);
        self.bytes.extend_from_slice(&0_u32.to_ne_bytes());
    }

    pub fn local_route(&mut self, index: u32, address: IpAddr) {
        let prefix = if address.is_ipv4() { 32 } else { 128 };
        self.route(address, prefix, libc::RT_TABLE_LOCAL, libc::RTN_LOCAL);
        self.attribute(libc::RTA_DST, octets(address).as_ref());
        self.attribute(libc::RTA_OIF, &index.to_ne_bytes());
        self.end();
    }

    pub fn default_route(&mut self, index: u32, gateway: IpAddr) {
        self.route(gateway, 0, libc::RT_TABLE_MAIN, libc::RTN_UNICAST);
        self.attribute(libc::RTA_GATEWAY, octets(gateway).as_ref());
        self.attribute(libc::RTA_OIF, &index.to_ne_bytes());
        self.end();
    }

    pub fn run(&self) -> io::Result<()> {
        // SAFETY: socket(2) with constants.
        let raw = unsafe {
            libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_ROUTE)
        };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else owns.
        let socket = unsafe { OwnedFd::from_raw_fd(raw) };
        // SAFETY: the kernel reads `len` bytes of a live vector. An unbound netlink socket sends to the kernel.
        let sent = unsafe { libc::send(raw, self.bytes.as_ptr().cast(), self.bytes.len(), 0) };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut answered = 0;
        while answered < self.optional.len() {
            let mut buffer = [0_u8; 8192];
            // SAFETY: the kernel writes at most the buffer's length.
            let got = unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            if got < 0 {
                return Err(io::Error::last_os_error());
            }
            let mut rest = buffer.get(..got as usize).unwrap_or_default();
            while let Some((sequence, error, after)) = acknowledgement(rest) {
                rest = after;
                answered += 1;
                let optional = self.optional.get((sequence as usize).wrapping_sub(1)).copied();
                if error != 0 && !(optional == Some(true) && lacks_ipv6(error)) {
                    return Err(io::Error::from_raw_os_error(error));
                }
            }
        }
        Ok(())
    }
}

/// Sequence number and error of the `NLMSG_ERROR` at the head of `bytes`, and what follows it.
fn acknowledgement(bytes: &[u8]) -> Option<(u32, i32, &[u8])> {
    let field = |at: usize| bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
    let length = field(0)? as usize;
    let (sequence, error) = (field(8)?, field(size_of::<libc::nlmsghdr>())?);
    Some((
        sequence,
        -(error as i32),
        bytes.get(length.max(size_of::<libc::nlmsghdr>())..).unwrap_or_default(),
    ))
}

/// What rtnetlink says where IPv6 is not built in, or switched off by `disable_ipv6`.
fn lacks_ipv6(error: i32) -> bool {
    matches!(error, libc::EOPNOTSUPP | libc::EAFNOSUPPORT | libc::EACCES | libc::ENODEV | libc::EINVAL)
}

/// The bytes of an address in network order.
fn octets(address: IpAddr) -> Octets {
    match address {
        IpAddr::V4(address) => Octets::V4(address.octets()),
        IpAddr::V6(address) => Octets::V6(address.octets()),
    }
}

enum Octets {
    V4([u8; 4]),
    V6([u8; 16]),
}

impl AsRef<[u8]> for Octets {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::V4(octets) => octets,
            Self::V6(octets) => octets,
        }
    }
}
