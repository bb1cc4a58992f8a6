//! What `kso vm` needs: QEMU with its devices, a kernel with its modules, and best of all KVM. A guest boots.

use super::{Check, State, Subject, attempt, own};
use kso_vm::{Accelerator, Choice, Kernel, MachineKind, initramfs, kernels};
use std::fs::OpenOptions;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// The emulator, and Debian's package of it.
const QEMU: (&str, &str) = if cfg!(target_arch = "aarch64") {
    ("qemu-system-aarch64", "qemu-system-arm")
} else {
    ("qemu-system-x86_64", "qemu-system-x86")
};
/// QEMU tells about itself within this time.
const TOLD: Duration = Duration::from_secs(30);
/// An emulated guest boots within this time, on a slow machine, too.
const BOOTED: Duration = Duration::from_secs(120);
/// Devices by which guests reach the broker.
const DEVICES: [&str; 2] = ["vhost-user-vsock-device", "vhost-user-fs-device"];

pub(super) fn look() -> Subject {
    let mut checks = vec![qemu()];
    if is_fine(&checks) {
        checks.push(devices());
    }
    match kernels::find(&Choice::Newest) {
        Ok(kernel) => {
            checks.push(Check::ok("kernel", format!("{} ({})", kernel.release, kernel.image.display())));
            checks.push(modules(&kernel));
            if is_fine(&checks) {
                checks.push(processor(&kernel));
                checks.push(guest());
            }
        }
        Err(error) => {
            let text = error.to_string();
            let (found, advice) = text.split_once('\n').unwrap_or((&text, "kso kernels fetch"));
            checks.push(Check::missing("kernel", found, advice));
        }
    }
    Subject::new("vm", "kso vm (programs in a microVM)", checks)
}

fn is_fine(checks: &[Check]) -> bool {
    checks.iter().all(|check| check.state != State::Missing)
}

fn qemu() -> Check {
    let (program, package) = QEMU;
    match attempt(Command::new(program).arg("--version"), TOLD) {
        Ok(text) => Check::ok("QEMU", text.lines().next().unwrap_or_default()),
        Err(error) => {
            Check::missing("QEMU", format!("{program}: {error}"), format!("apt-get install {package}"))
        }
    }
}

fn devices() -> Check {
    let name = "its devices";
    let (program, package) = QEMU;
    let said = match attempt(Command::new(program).args(["-device", "help"]), TOLD) {
        Ok(said) => said,
        Err(error) => return Check::missing(name, error, format!("apt-get install {package}")),
    };
    let lacks: Vec<&str> = DEVICES.into_iter().filter(|device| !said.contains(device)).collect();
    if lacks.is_empty() {
        return Check::ok(name, "vhost-user vsock and fs");
    }
    let found = format!("this QEMU has no {}", lacks.join(", "));
    Check::missing(name, found, format!("a QEMU with vhost-user is needed: apt-get install {package}"))
}

fn modules(kernel: &Kernel) -> Check {
    match initramfs::compose(kernel, MachineKind::Microvm, &initramfs::Contents::guest(&[])) {
        Ok(_) => Check::ok("its modules", "vsock, virtiofs, overlay, tun"),
        Err(error) => Check::missing("its modules", error.to_string(), "another kernel: kso kernels fetch"),
    }
}

fn processor(kernel: &Kernel) -> Check {
    if kso_vm::accelerator(kernel) == Accelerator::Kvm {
        return Check::ok("KVM", format!("runs {}", kernel.release));
    }
    let path = Path::new("/dev/kvm");
    let (found, advice) = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => (
            format!("/dev/kvm is there, and does not run {}: this machine is a guest itself", kernel.release),
            "guests are emulated (TCG), which is several times slower: ask for nested virtualization",
        ),
        Err(error) if path.exists() => (
            format!("/dev/kvm: {error}"),
            "guests are emulated (TCG), which is several times slower: add this user to the group kvm",
        ),
        Err(_) => (
            "there is no /dev/kvm".into(),
            "guests are emulated (TCG), which is several times slower: modprobe kvm_intel (or kvm_amd), or switch virtualization on in the firmware",
        ),
    };
    Check::less("KVM", found, advice)
}

/// The proof.
fn guest() -> Check {
    let name = "a guest";
    let began = Instant::now();
    let words = ["vm", "--no-net", "--", "/bin/sh", "-c", "echo it runs"];
    let command = own(&words).map(|mut command| {
        command.current_dir("/");
        command
    });
    match command.and_then(|mut command| attempt(&mut command, BOOTED)) {
        Ok(text) if text.ends_with("it runs") => {
            Check::ok(name, format!("boots and ends in {:.1} s", began.elapsed().as_secs_f64()))
        }
        Ok(text) | Err(text) => Check::missing(name, text, "see what kso vm -vv -- true says"),
    }
}
