//! microVM launcher: finds a kernel and its modules, composes an initramfs, starts QEMU and watches it; and the
//! launcher's side of a guest's job: its program, standard streams and terminal.
//!
//! ```text
//!   kernels::find --> Kernel --+
//!                              +--> MachineConfig --> Machine: QEMU, its end, its console
//!   initramfs::compose --------+
//!
//!   Job:   wire::job over a stream of the guest: Start, Signal, Resize --> <-- Started, Failed, Ended
//!   Stdio: the user's standard streams and terminal <--> streams of the guest
//! ```
//!
//! Each of the last three has one descriptor to poll and a method that serves what is ready: none needs a thread. It knows
//! nothing of the broker, of devices or of policy: it is given the sockets of the devices.
#![forbid(unsafe_code)]

mod cache;
mod cpio;
mod elf;
pub mod initramfs;
pub mod kernels;
mod machine;
mod modules;
mod qemu;

pub use kernels::{Choice, Kernel, KernelError};
pub use machine::{Machine, MachineError};
pub use qemu::{Accelerator, DeviceSocket, FileSystem, MachineConfig, MachineKind};
