//! `kso vm`: a program in a microVM, under a kernel of its own.

mod files;
mod served;
mod start;
mod supervise;

use super::program::ProgramArgs;
use crate::output;
use anyhow::Result;
use clap::{Args, ValueEnum};
use kso_vm::{Choice, MachineKind};
use kso_wire::Network;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

const EXAMPLES: &str = "\
Examples:
  kso vm -- curl https://example.org
  kso vm -p 8080:80 -- nginx -g 'daemon off;'
  kso vm -it -- bash                               a terminal
  kso vm -v ./site:/srv:ro --allow '*.debian.org:443' -- ./build
  kso vm --external gvisor,share=/srv -v gvisor:/srv:/data -- ls /data
  kso vm --kernel 6.12 -m 1G --cpus 2 -- uname -r
  kso vm --root ./debian-13 -- /usr/bin/python3    another root directory

Without --root the guest sees this host's system directories read-only, under an overlay in its own memory, and the
current directory as it is. It has no network interface and no disk: its sockets and files are this host's.

Directories (-v): PATH:WHERE is one of this host; KERNEL:PATH:WHERE one that an external kernel performs, with its own file
  system code; KERNEL,KERNEL:PATH:WHERE is performed by the first of them that is up, and files that are open go on elsewhere.
  Options after WHERE: ro, shared (others write there too), cache=none|shared|auto|always.

Exit status: the program's own; 128+N if signal N ended it; 125 if kso or the guest failed,
  126 if the program cannot be executed, 127 if it was not found.";

/// Options of `kso vm`.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct VmArgs {
    /// Memory of the guest: MiB, or with a unit (512M, 2G)
    #[arg(short, long, value_name = "SIZE", default_value = "512", value_parser = memory)]
    memory: u32,

    /// Processors of the guest
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    cpus: u16,

    /// The newest kernel of this version (6.12), or exactly this release (see kso kernels)
    #[arg(long, value_name = "RELEASE", conflicts_with = "kernel_image")]
    kernel: Option<String>,

    /// This kernel image
    #[arg(long, value_name = "FILE")]
    kernel_image: Option<PathBuf>,

    /// The directory of the modules of --kernel-image; otherwise they are looked for beside it and on this system
    #[arg(long, value_name = "DIR", requires = "kernel_image")]
    kernel_modules: Option<PathBuf>,

    /// Kind of machine
    #[arg(long, value_enum, default_value_t = Kind::Microvm)]
    machine: Kind,

    /// Root directory of the guest, instead of this host's
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,

    /// Connections to this network stay inside: the guest has a NIC of its own for it (repeatable)
    #[arg(long, value_name = "CIDR")]
    inside: Vec<Network>,

    /// More words for QEMU: devices of your own (repeatable)
    #[arg(long, value_name = "WORD", allow_hyphen_values = true)]
    qemu_arg: Vec<OsString>,

    /// A module that the guest loads for such devices (repeatable)
    #[arg(long, value_name = "NAME")]
    module: Vec<String>,

    /// More words for the kernel's command line (repeatable)
    #[arg(long, value_name = "WORD", allow_hyphen_values = true)]
    append: Vec<String>,

    /// The program reads standard input (it always does; for hands that are used to -it)
    #[arg(short, long)]
    interactive: bool,

    /// Give the program a terminal, even if standard input or output is none
    #[arg(short, long)]
    tty: bool,

    /// Show the guest's console on standard error
    #[arg(long)]
    console: bool,

    /// Give up on a guest whose init does not run within this time
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    boot_timeout: u64,

    /// More of what happens, on standard error (repeatable)
    #[arg(long, action = clap::ArgAction::Count)]
    verbose: u8,

    #[command(flatten)]
    program: ProgramArgs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kind {
    /// QEMU's microvm: starts quickest
    Microvm,
    /// A PC with PCI
    Q35,
}

impl VmArgs {
    fn kind(&self) -> MachineKind {
        match self.machine {
            Kind::Microvm => MachineKind::Microvm,
            Kind::Q35 => MachineKind::Q35,
        }
    }

    fn kernel(&self) -> Choice {
        match (&self.kernel_image, &self.kernel) {
            (Some(image), _) => Choice::Image { image: image.clone(), modules: self.kernel_modules.clone() },
            (None, Some(release)) => Choice::Release(release.clone()),
            (None, None) => Choice::Newest,
        }
    }

    fn boot_timeout(&self) -> Duration {
        Duration::from_secs(self.boot_timeout.clamp(1, 3600))
    }
}

/// Least and most memory of a guest, MiB.
const MEMORY: std::ops::RangeInclusive<u32> = 64..=1 << 20;

/// A number of MiB, or one with a unit.
fn memory(text: &str) -> Result<u32, String> {
    let (number, factor) = match text.trim_end_matches(['i', 'B', 'b']) {
        text if text.ends_with(['M', 'm']) => (text.trim_end_matches(['M', 'm']), 1),
        text if text.ends_with(['G', 'g']) => (text.trim_end_matches(['G', 'g']), 1024),
        text => (text, 1),
    };
    let size = number.parse::<u32>().ok().and_then(|number| number.checked_mul(factor));
    size.filter(|size| MEMORY.contains(size)).ok_or_else(|| {
        format!(
            "a size is a number of MiB from {} to {}, or one with a unit: 512M, 2G",
            MEMORY.start(),
            MEMORY.end()
        )
    })
}

/// Runs it.
///
/// # Errors
/// The options are wrong, or the guest cannot be made.
pub fn run(args: &VmArgs) -> Result<ExitCode> {
    output::init_logs(args.verbose);
    let hello = args.program.hello()?;
    Ok(ExitCode::from(supervise::supervise(args, &hello)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(memory("256"), Ok(256));
        assert_eq!(
            [memory("1G"), memory("1024M"), memory("1GiB"), memory("1024MB")],
            [const { Ok(1024) }; 4]
        );
        for wrong in ["", "G", "0", "1", "-5", "9999999G", "1T", "1.5G"] {
            assert!(memory(wrong).is_err(), "{wrong}");
        }
    }
}
