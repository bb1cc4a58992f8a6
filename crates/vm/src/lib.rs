//! microVM launcher: finds a kernel and its modules, composes an initramfs, starts QEMU and watches it; and the
//! launcher's side of a guest's job: its program, standard streams and terminal.
//!
//! ```text
//!   kernels::find --> Kernel --+
//!                              +--> MachineConfig --> Machine: QEMU, its end, its console
//!   initramfs::compose --------+
//!
//!   Attachment: the user's standard streams, terminal and signals <--> streams of the guest
//!     Job: what runs in it, and how it ended (wire::job)
//! ```
//!
//! Machine and Attachment have each one descriptor to poll and a method that serves what is ready: none needs a thread. It knows
//! nothing of the broker, of devices or of policy: it is given the sockets of the devices.
#![forbid(unsafe_code)]

mod accelerator;
mod attachment;
mod cache;
mod cpio;
mod elf;
pub mod initramfs;
mod job;
pub mod kernels;
mod machine;
mod modules;
mod qemu;

pub use accelerator::accelerator;
pub use attachment::{AttachOptions, Attachment, Ends, Outcome};
pub use job::{Job, JobEvent};
pub use kernels::{Choice, Kernel, KernelError};
pub use machine::{Machine, MachineError};
pub use qemu::{Accelerator, DeviceSocket, Disk, FileSystem, MachineConfig, MachineKind, Nic, default_qemu};
