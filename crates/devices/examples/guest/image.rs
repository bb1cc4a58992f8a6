//! The initramfs: this program, and the modules it needs.

use std::io::Write;
use std::path::{Path, PathBuf};

/// In the order in which they are loaded.
const MODULES: &[&str] = &[
    "virtio_ring",
    "virtio",
    "virtio_mmio",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
    "failover",
    "net_failover",
    "virtio_net",
];

fn find(directory: &Path, name: &str) -> Option<PathBuf> {
    for entry in std::fs::read_dir(directory).ok()?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            if let Some(found) = find(&path, name) {
                return Some(found);
            }
        } else if path.file_stem().is_some_and(|stem| stem == name) {
            return Some(path);
        }
    }
    None
}

fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, contents: &[u8]) {
    let fields = [1, mode, 0, 0, 1, 0, contents.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
    write!(archive, "070701").unwrap();
    fields.iter().for_each(|field| write!(archive, "{field:08x}").unwrap());
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend_from_slice(contents);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

pub fn build(kernel: &Path) -> Vec<u8> {
    let mut archive = Vec::new();
    for directory in ["proc", "sys", "dev", "modules"] {
        entry(&mut archive, directory, 0o40755, b"");
    }
    let modules = kernel.join("lib/modules");
    for (order, name) in MODULES.iter().enumerate() {
        // What is not there is built in.
        if let Some(path) = find(&modules, name) {
            entry(&mut archive, &format!("modules/{order:02}.ko"), 0o100644, &std::fs::read(path).unwrap());
        }
    }
    entry(&mut archive, "init", 0o100755, &std::fs::read("/proc/self/exe").unwrap());
    entry(&mut archive, "TRAILER!!!", 0, b"");
    archive
}

pub fn kernel(directory: &Path) -> PathBuf {
    let boot = std::fs::read_dir(directory.join("boot")).unwrap().flatten().map(|entry| entry.path());
    boot.into_iter()
        .find(|path| path.file_name().unwrap().to_string_lossy().starts_with("vmlinuz"))
        .expect("no kernel in boot/")
}
