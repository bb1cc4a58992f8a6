//! TAP devices: Ethernet interfaces of this kernel whose other end is a descriptor.
//!
//! Sources: Documentation/networking/tuntap.rst, `include/uapi/linux/if_tun.h`.

use crate::tun::{device_ioctl, open, request, set_non_blocking, set_offload};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// Makes a TAP device in the network namespace of the calling thread, whose frames begin with a
/// [`crate::tun::VNET_HEADER`]: the other end of a virtual machine's network card. It goes with its descriptor.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN` in the namespace; `ENOENT` or `ENXIO` without the tun driver; `EBUSY` if the name is taken.
pub fn for_machine(name: &str) -> io::Result<OwnedFd> {
    let device = open()?;
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    device_ioctl(device.as_fd(), libc::TUNSETIFF, &mut request)?;
    Ok(device)
}

/// The same for a stack of this process: checksums may be partial and TCP unsegmented, both ways, and the descriptor is
/// non-blocking.
///
/// # Errors
/// As [`for_machine`].
pub fn create(name: &str) -> io::Result<OwnedFd> {
    let device = for_machine(name)?;
    set_offload(device.as_fd(), libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6)?;
    set_non_blocking(device.as_fd())?;
    Ok(device)
}
