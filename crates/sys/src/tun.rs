//! The TUN device of a sandbox: making it, configuring it, and what its descriptor can do.
//!
//! The device is made inside the sandbox's network namespace ([`create`], [`configure`]) and its descriptor
//! is handed out of it. Whether packets carry a virtio-net header is a property of the device that can be
//! read back from any descriptor of it ([`Tun::from_fd`]), so nothing but the descriptor needs to travel.
//! Sources: Documentation/networking/tuntap.rst, `include/uapi/linux/if_tun.h`, rtnetlink(7).

use kso_wire::TunAddresses;
use std::io;
use std::mem::size_of;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Bytes of `struct virtio_net_hdr` before each packet when [`Tun::has_vnet_header`].
pub const VNET_HEADER: usize = 10;
/// Prefix length of the sandbox's IPv4 network: guest, gateway, and the two addresses of the network itself.
const PREFIX_V4: u8 = 30;
/// Prefix length of the sandbox's IPv6 network.
const PREFIX_V6: u8 = 64;
/// Packets that wait for the gateway. The default of 500 is soon full while its process is not running.
const QUEUE_LENGTH: u32 = 2048;
/// Index of `lo` in every network namespace (`LOOPBACK_IFINDEX`, include/net/flow.h).
const LOOPBACK: u32 = 1;

/// Makes a TUN device in the network namespace of the calling thread, with virtio-net headers if the kernel
/// knows them. The descriptor is not yet non-blocking.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN` in the namespace; `ENOENT` or `ENXIO` without the tun driver; `EBUSY` if
/// the name is taken.
pub fn create(name: &str) -> io::Result<OwnedFd> {
    let fd = open()?;
    let plain = libc::IFF_TUN | libc::IFF_NO_PI;
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = (plain | libc::IFF_VNET_HDR) as libc::c_short;
    match device_ioctl(fd.as_fd(), libc::TUNSETIFF, &mut request) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            request.ifr_ifru.ifru_flags = plain as libc::c_short;
            device_ioctl(fd.as_fd(), libc::TUNSETIFF, &mut request)?;
        }
        done => done?,
    }
    // The device goes with its namespace, in the background: closing the descriptor would wait for it 14 ms.
    // SAFETY: the argument is a value; no memory is involved.
    if unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETPERSIST as libc::Ioctl, 1) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fd)
}

/// Has a device that [`create`] made end with its last descriptor: for one in a namespace that lives on.
///
/// # Errors
/// `EBADFD` or `ENOTTY` if it is not a TUN device's.
pub fn temporary(tun: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the argument is a value; no memory is involved.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETPERSIST as libc::Ioctl, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A descriptor of a TUN device, non-blocking, and what may be done with it.
#[derive(Debug)]
pub struct Tun {
    fd: OwnedFd,
    vnet_header: bool,
    segments: bool,
}

impl Tun {
    /// Takes a descriptor made by [`create`], asks the device what it is, and switches on what the kernel
    /// offers: partial checksums, TCP segmentation, and UDP segmentation (Linux 6.2).
    ///
    /// # Errors
    /// `EBADFD` or `ENOTTY` if it is not a TUN device's; `EINVAL` if it is a TAP device's.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let mut request = request("")?;
        device_ioctl(fd.as_fd(), libc::TUNGETIFF, &mut request)?;
        // SAFETY: TUNGETIFF filled in this member of the union.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        if flags & libc::IFF_TUN == 0 || flags & libc::IFF_NO_PI == 0 {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let vnet_header = flags & libc::IFF_VNET_HDR != 0;
        let mut segments = false;
        if vnet_header {
            let checksums = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
            let all = checksums | libc::TUN_F_USO4 | libc::TUN_F_USO6;
            segments = set_offload(fd.as_fd(), all).is_ok();
            if !segments {
                set_offload(fd.as_fd(), checksums)?;
            }
        }
        set_non_blocking(fd.as_fd())?;
        Ok(Self { fd, vnet_header, segments })
    }

    /// Each packet read or written begins with [`VNET_HEADER`] bytes of `struct virtio_net_hdr`.
    #[must_use]
    pub fn has_vnet_header(&self) -> bool {
        self.vnet_header
    }

    /// Several UDP datagrams of a flow may cross the device as one packet (`VIRTIO_NET_HDR_GSO_UDP_L4`).
    #[must_use]
    pub fn segments_datagrams(&self) -> bool {
        self.segments
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Opens the driver of TUN and TAP devices.
pub(crate) fn open() -> io::Result<OwnedFd> {
    // SAFETY: a NUL-terminated literal.
    let raw = unsafe { libc::open(c"/dev/net/tun".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

pub(crate) fn set_non_blocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: plain fcntl on a live descriptor.
    let status = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    // SAFETY: as above.
    if status < 0 || unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, status | libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

pub(crate) fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: ifreq is plain data; zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte is left for the terminating NUL.
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

pub(crate) fn device_ioctl(
    fd: BorrowedFd<'_>,
    code: libc::Ioctl,
    request: &mut libc::ifreq,
) -> io::Result<()> {
    // SAFETY: the codes used here read and write one `struct ifreq`, which this is.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), code, std::ptr::from_mut(request)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

pub(crate) fn set_offload(fd: BorrowedFd<'_>, flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its flags by value.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Brings up `lo` and the TUN device `name` in the network namespace of the calling thread: addresses of both
/// families without duplicate address detection, no link-local address, default routes through the gateway.
/// One message batch to the kernel, so it is quick. A kernel without IPv6 gets IPv4 alone.
///
/// # Errors
/// `ENODEV` if there is no such device; `EPERM` without `CAP_NET_ADMIN`; what rtnetlink refuses.
pub fn configure(name: &str, addresses: &TunAddresses, mtu: u32) -> io::Result<()> {
    let name = std::ffi::CString::new(name).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    // SAFETY: a NUL-terminated string.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    if index == 0 {
        return Err(io::Error::last_os_error());
    }
    let mut batch = Batch::default();
    batch.link_up(LOOPBACK, None);
    // On its own, since a kernel without IPv6 refuses it.
    batch.no_link_local(index);
    batch.link_up(index, Some(mtu));
    for (guest, gateway) in addresses.guest.iter().zip(&addresses.gateway) {
        batch.address(index, *guest);
        // The kernel makes the route of an IPv6 address to itself later, in a work queue, even without duplicate
        // address detection (addrconf_dad_start in net/ipv6/addrconf.c); until then answers would be lost.
        if guest.is_ipv6() {
            batch.local_route(index, *guest);
        }
        batch.default_route(index, *gateway);
    }
    batch.run()
}

/// `IFLA_INET6_ADDR_GEN_MODE` and its value none (include/uapi/linux/if_link.h).
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;

/// Requests to rtnetlink, sent together and answered one by one.
#[derive(Default)]
struct Batch {
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

    fn link_up(&mut self, index: u32, mtu: Option<u32>) {
        self.begin(libc::RTM_NEWLINK, 0, false);
        self.link(index, libc::IFF_UP as u32, libc::IFF_UP as u32);
        if let Some(mtu) = mtu {
            self.attribute(libc::IFLA_MTU, &mtu.to_ne_bytes());
            self.attribute(libc::IFLA_TXQLEN, &QUEUE_LENGTH.to_ne_bytes());
        }
        self.end();
    }

    fn no_link_local(&mut self, index: u32) {
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

    fn address(&mut self, index: u32, address: IpAddr) {
        let (family, prefix) = match address {
            IpAddr::V4(_) => (libc::AF_INET, PREFIX_V4),
            IpAddr::V6(_) => (libc::AF_INET6, PREFIX_V6),
        };
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

    fn local_route(&mut self, index: u32, address: IpAddr) {
        let prefix = if address.is_ipv4() { 32 } else { 128 };
        self.route(address, prefix, libc::RT_TABLE_LOCAL, libc::RTN_LOCAL);
        self.attribute(libc::RTA_DST, octets(address).as_ref());
        self.attribute(libc::RTA_OIF, &index.to_ne_bytes());
        self.end();
    }

    fn default_route(&mut self, index: u32, gateway: IpAddr) {
        self.route(gateway, 0, libc::RT_TABLE_MAIN, libc::RTN_UNICAST);
        self.attribute(libc::RTA_GATEWAY, octets(gateway).as_ref());
        self.attribute(libc::RTA_OIF, &index.to_ne_bytes());
        self.end();
    }

    fn run(&self) -> io::Result<()> {
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
