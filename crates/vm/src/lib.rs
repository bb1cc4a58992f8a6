//! microVM launcher: finds a kernel and its modules, composes an initramfs, starts QEMU and watches it.
#![forbid(unsafe_code)]
