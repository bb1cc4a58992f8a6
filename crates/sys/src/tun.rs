//! The TUN device of a sandbox: making it, configuring it, and what its descriptor can do.
//!
//! The device is made inside the sandbox's network namespace ([`create`], [`configure`]) and its descriptor
//! is handed out of it. Whether packets carry a virtio-net header is a property of the device that can be
//! read back from any descriptor of it ([`Tun::from_fd`]), so nothing but the descriptor needs to travel.
//! Sources: Documentation/networking/tuntap.rst, `include/uapi/linux/if_tun.h`, rtnetlink(7).

use crate::link::{self, Batch};
use kso_wire::TunAddresses;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Bytes of `struct virtio_net_hdr` before each packet when [`Tun::has_vnet_header`].
pub const VNET_HEADER: usize = 10;
/// Prefix length of the sandbox's IPv4 network: guest, gateway, and the two addresses of the network itself.
const PREFIX_V4: u8 = 30;
/// Prefix length of the sandbox's IPv6 network.
const PREFIX_V6: u8 = 64;
/// Packets that wait for the gateway. The default of 500 is soon full while its process is not running.
const QUEUE_LENGTH: u32 = 2048;

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
    let index = link::index(name)?;
    let mut batch = Batch::default();
    batch.link_up(link::LOOPBACK, None);
    // On its own, since a kernel without IPv6 refuses it.
    batch.no_link_local(index);
    batch.link_up(index, Some((mtu, QUEUE_LENGTH)));
    for (guest, gateway) in addresses.guest.iter().zip(&addresses.gateway) {
        batch.address(index, *guest, if guest.is_ipv4() { PREFIX_V4 } else { PREFIX_V6 });
        // The kernel makes the route of an IPv6 address to itself later, in a work queue, even without duplicate
        // address detection (addrconf_dad_start in net/ipv6/addrconf.c); until then answers would be lost.
        if guest.is_ipv6() {
            batch.local_route(index, *guest);
        }
        batch.default_route(index, *gateway);
    }
    batch.run()
}
