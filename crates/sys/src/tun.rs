//! TUN device.
