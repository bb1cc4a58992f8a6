//! QEMU's command line: a pure function of what the machine is to be.

use crate::initramfs::{Contents, InitramfsError};
use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// The kind of machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MachineKind {
    /// QEMU's `microvm`: no PCI; starts quickest.
    #[default]
    Microvm,
    /// A PC of 2009, with PCI.
    Q35,
}

impl MachineKind {
    /// As QEMU has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Microvm => "microvm",
            Self::Q35 => "q35",
        }
    }

    /// The module by which the guest finds its devices.
    pub(crate) fn transport(self) -> &'static str {
        match self {
            Self::Microvm => "virtio_mmio",
            Self::Q35 => "virtio_pci",
        }
    }

    /// How the names of virtio devices end.
    fn bus(self) -> &'static str {
        match self {
            Self::Microvm => "device",
            Self::Q35 => "pci",
        }
    }
}

/// What executes the guest's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The processor itself.
    Kvm,
    /// QEMU's emulation.
    Tcg,
}

impl Accelerator {
    /// As QEMU has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// Where a vhost-user device is reached.
#[derive(Debug)]
pub enum DeviceSocket {
    /// A unix socket on which it listens already.
    Path(PathBuf),
    /// One end of a socketpair(2) whose other end it serves: nothing in the file system.
    Connected(OwnedFd),
}

/// A shared directory.
#[derive(Debug)]
pub struct FileSystem {
    /// What the guest mounts it by.
    pub tag: String,
    /// Its device.
    pub socket: DeviceSocket,
    /// Request queues.
    pub queues: u16,
}

/// A network card, on a TAP device of the host.
#[derive(Debug)]
pub struct Nic {
    /// The TAP device, with virtio-net headers.
    pub tap: OwnedFd,
    /// Its hardware address.
    pub address: [u8; 6],
}

/// A disk.
#[derive(Clone, Debug)]
pub struct Disk {
    /// A raw image.
    pub image: PathBuf,
    /// By which the guest finds it.
    pub serial: String,
    /// No writing.
    pub read_only: bool,
}

/// What the machine is to be.
#[derive(Debug)]
pub struct MachineConfig {
    /// The emulator.
    pub qemu: PathBuf,
    /// The kernel image.
    pub kernel: PathBuf,
    /// See [`crate::initramfs::compose`].
    pub initramfs: PathBuf,
    /// What kind.
    pub kind: MachineKind,
    /// What executes it: see [`crate::accelerator`].
    pub accelerator: Accelerator,
    /// Guest memory, MiB.
    pub memory: u32,
    /// Processors.
    pub cpus: u16,
    /// The vsock device; `None` for a guest that is only to boot.
    pub vsock: Option<DeviceSocket>,
    /// Shared directories.
    pub file_systems: Vec<FileSystem>,
    /// Network cards.
    pub nics: Vec<Nic>,
    /// Disks.
    pub disks: Vec<Disk>,
    /// More words for the kernel's command line. Those with a dot before any `=` that no module has are for init.
    pub append: Vec<String>,
    /// More words for QEMU itself, last on its command line: an expert's devices.
    pub arguments: Vec<OsString>,
    /// The kernel tells of its start on the console.
    pub talkative: bool,
}

impl MachineConfig {
    /// A machine of this kernel with 512 MiB and one processor, and no devices yet. Its init loads what kso needs and
    /// `modules`, for devices of [`Self::arguments`].
    ///
    /// # Errors
    /// The initramfs cannot be made.
    pub fn new(
        kernel: &crate::Kernel,
        kind: MachineKind,
        accelerator: Accelerator,
        modules: &[String],
    ) -> Result<Self, InitramfsError> {
        Self::with(kernel, kind, accelerator, &Contents::guest(modules))
    }

    /// The same with something else in its initramfs.
    ///
    /// # Errors
    /// The initramfs cannot be made.
    pub fn with(
        kernel: &crate::Kernel,
        kind: MachineKind,
        accelerator: Accelerator,
        contents: &Contents<'_>,
    ) -> Result<Self, InitramfsError> {
        Ok(Self {
            qemu: PathBuf::from(default_qemu()),
            kernel: kernel.image.clone(),
            initramfs: crate::initramfs::compose(kernel, kind, contents)?,
            kind,
            accelerator,
            memory: 512,
            cpus: 1,
            vsock: None,
            file_systems: Vec::new(),
            nics: Vec::new(),
            disks: Vec::new(),
            append: Vec::new(),
            arguments: Vec::new(),
            talkative: false,
        })
    }

    /// The descriptors that QEMU has to inherit.
    pub(crate) fn inherited(&self) -> Vec<BorrowedFd<'_>> {
        let sockets = self.vsock.iter().chain(self.file_systems.iter().map(|one| &one.socket));
        let sockets = sockets.filter_map(|socket| match socket {
            DeviceSocket::Connected(descriptor) => Some(descriptor.as_fd()),
            DeviceSocket::Path(_) => None,
        });
        sockets.chain(self.nics.iter().map(|nic| nic.tap.as_fd())).collect()
    }
}

/// The emulator for guests of this processor.
#[must_use]
pub fn default_qemu() -> &'static str {
    if cfg!(target_arch = "aarch64") { "qemu-system-aarch64" } else { "qemu-system-x86_64" }
}

/// A comma ends an option's value; two stand for one (QEMU's manual, "Invocation").
fn escaped(path: &Path) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let bytes = path.as_os_str().as_bytes().iter().flat_map(|&byte| {
        let twice = if byte == b',' { 2 } else { 1 };
        std::iter::repeat_n(byte, twice)
    });
    OsString::from_vec(bytes.collect())
}

/// Words of QEMU's command line, without its own name. `tsc_khz` is the frequency of the host's time stamp counter.
pub(crate) fn arguments(config: &MachineConfig, tsc_khz: Option<u64>) -> Vec<OsString> {
    let mut words = Words::default();
    let machine = match config.kind {
        MachineKind::Microvm => "microvm,rtc=on",
        MachineKind::Q35 => "q35,usb=off,vmport=off,smbus=off,sata=off",
    };
    let accelerator = config.accelerator.name();
    words.pair("-machine", format!("{machine},accel={accelerator},memory-backend=memory"));
    let memory = config.memory;
    words.pair("-object", format!("memory-backend-memfd,id=memory,size={memory}M,share=on"));
    words.pair("-m", format!("{memory}M"));
    // With room for one processor only, TCG leaves out the memory barriers towards the host, and notifications in
    // shared memory get lost.
    words.pair("-smp", format!("{},maxcpus={}", config.cpus, config.cpus.max(2)));
    words.pair(
        "-cpu",
        match config.accelerator {
            Accelerator::Kvm => "host",
            // Emulated, `rep movsb` goes byte by byte; the others cost, and protect nothing from the host.
            Accelerator::Tcg => "max,-erms,-smap,-smep,-la57,-pku,-umip",
        },
    );
    for word in ["-no-reboot", "-nodefaults", "-no-user-config"] {
        words.single(word);
    }
    words.pair("-display", "none");
    // What escapes from the guest into QEMU shall find nothing to do there.
    words.pair("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    words.pair("-global", "virtio-mmio.force-legacy=false");
    words.pair("-chardev", "stdio,id=console,signal=off");
    words.pair("-serial", "chardev:console");
    words.pair("-kernel", config.kernel.as_os_str());
    words.pair("-initrd", config.initramfs.as_os_str());
    words.pair("-append", command_line(config, tsc_khz));
    let bus = config.kind.bus();
    if let Some(socket) = &config.vsock {
        words.device_socket("vsock", socket);
        words.pair("-device", format!("vhost-user-vsock-{bus},chardev=vsock"));
    }
    for (index, file_system) in config.file_systems.iter().enumerate() {
        let name = format!("fs{index}");
        words.device_socket(&name, &file_system.socket);
        let tag = escaped(Path::new(&file_system.tag));
        let mut device = OsString::from(format!("vhost-user-fs-{bus},chardev={name},"));
        device.push(format!("num-request-queues={},queue-size=1024,tag=", file_system.queues));
        device.push(tag);
        words.pair("-device", device);
    }
    for (index, nic) in config.nics.iter().enumerate() {
        words.pair("-netdev", format!("tap,id=net{index},fd={}", nic.tap.as_raw_fd()));
        let [a, b, c, d, e, f] = nic.address;
        let address = format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
        // It is not booted from: without a ROM.
        let rom = if config.kind == MachineKind::Q35 { ",romfile=" } else { "" };
        words.pair("-device", format!("virtio-net-{bus},netdev=net{index},mac={address}{rom}"));
    }
    for (index, disk) in config.disks.iter().enumerate() {
        let mode = if disk.read_only { "on" } else { "off" };
        let mut drive = OsString::from(format!("driver=raw,node-name=disk{index},read-only={mode},"));
        drive.push(format!("file.driver=file,file.read-only={mode},file.filename="));
        drive.push(escaped(&disk.image));
        words.pair("-blockdev", drive);
        words.pair("-device", format!("virtio-blk-{bus},drive=disk{index},serial={}", disk.serial));
    }
    for word in &config.arguments {
        words.single(word);
    }
    words.0
}

/// The kernel's command line.
fn command_line(config: &MachineConfig, tsc_khz: Option<u64>) -> String {
    // panic=-1: a panic restarts at once, and QEMU ends instead (-no-reboot). reboot=t: by a triple fault, not by a keyboard
    // controller that is looked for. preempt=none: what reads from a stream does not interrupt the worker that fills it at
    // each packet; eight streams are 2.5 times as fast. A kernel that has no such model says so and goes on. init_on_alloc=0:
    // Debian's kernels clear what they allocate, each buffer of a device, too: a fifth of the time in which a stream is received.
    let mut words = ["console=ttyS0", "panic=-1", "reboot=t", "preempt=none", "init_on_alloc=0"]
        .map(str::to_owned)
        .to_vec();
    if !config.talkative {
        words.push("quiet".to_owned());
    }
    if config.accelerator == Accelerator::Tcg {
        // A guest that calibrates by emulated timers often hangs there; one that doubts the counter later falls back
        // to ticks of 4 ms.
        words.push("tsc=reliable".to_owned());
        // An emulated processor does not speculate, and what guards against it is emulated at its full price.
        words.push("mitigations=off".to_owned());
        words.extend(tsc_khz.map(|khz| format!("tsc_early_khz={khz}")));
    }
    if config.kind == MachineKind::Q35 {
        // No disk, no keyboard: do not look for them.
        words.extend(["i8042.noaux", "i8042.nokbd"].map(str::to_owned));
    }
    words.extend(config.append.iter().cloned());
    words.join(" ")
}

#[derive(Default)]
struct Words(Vec<OsString>);

impl Words {
    fn single(&mut self, word: impl Into<OsString>) {
        self.0.push(word.into());
    }

    fn pair(&mut self, name: &str, value: impl Into<OsString>) {
        self.single(name);
        self.single(value);
    }

    fn device_socket(&mut self, name: &str, socket: &DeviceSocket) {
        let mut value = OsString::from(format!("socket,id={name},"));
        match socket {
            DeviceSocket::Path(path) => {
                value.push("path=");
                value.push(escaped(path));
            }
            DeviceSocket::Connected(descriptor) => value.push(format!("fd={}", descriptor.as_raw_fd())),
        }
        self.pair("-chardev", value);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn config(kind: MachineKind, accelerator: Accelerator) -> MachineConfig {
        MachineConfig {
            qemu: "qemu".into(),
            kernel: "/boot/vmlinuz".into(),
            initramfs: "/i,cpio".into(),
            kind,
            accelerator,
            memory: 256,
            cpus: 1,
            vsock: Some(DeviceSocket::Path("/tmp/a,b".into())),
            file_systems: vec![FileSystem {
                tag: "root".into(),
                socket: DeviceSocket::Path("/tmp/fs".into()),
                queues: 1,
            }],
            nics: vec![],
            disks: vec![],
            append: vec!["kso.test".into()],
            arguments: vec!["-device".into(), "virtio-net-device".into()],
            talkative: false,
        }
    }

    fn line(config: &MachineConfig) -> String {
        let words = arguments(config, Some(2_600_000));
        words.iter().map(|word| word.to_str().unwrap()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_microvm_has_what_its_devices_need() {
        let line = line(&config(MachineKind::Microvm, Accelerator::Tcg));
        for part in [
            "microvm,rtc=on,accel=tcg,memory-backend=memory",
            "size=256M,share=on",
            "-smp 1,maxcpus=2",
            "virtio-mmio.force-legacy=false",
            "-chardev socket,id=vsock,path=/tmp/a,,b -device vhost-user-vsock-device,chardev=vsock",
            "-device vhost-user-fs-device,chardev=fs0,num-request-queues=1,queue-size=1024,tag=root",
            "quiet tsc=reliable mitigations=off tsc_early_khz=2600000 kso.test",
            "-initrd /i,cpio",
            "tag=root -device virtio-net-device",
        ] {
            assert!(line.contains(part), "{part} in {line}");
        }
    }

    #[test]
    fn cards_and_disks_are_found_by_what_the_guest_is_told() {
        let mut config = config(MachineKind::Microvm, Accelerator::Tcg);
        let tap = std::fs::File::open("/dev/null").unwrap();
        let number = tap.as_raw_fd();
        config.nics.push(Nic { tap: tap.into(), address: [2, 0x6b, 10, 79, 0, 2] });
        config.disks.push(Disk { image: "/tmp/a,b".into(), serial: "kso0".into(), read_only: true });
        assert_eq!(config.inherited().len(), 1);
        let line = line(&config);
        for part in [
            &format!(
                "-netdev tap,id=net0,fd={number} -device virtio-net-device,netdev=net0,mac=02:6b:0a:4f:00:02"
            ),
            "read-only=on,file.driver=file,file.read-only=on,file.filename=/tmp/a,,b",
            "-device virtio-blk-device,drive=disk0,serial=kso0",
        ] {
            assert!(line.contains(part), "{part} in {line}");
        }
    }

    #[test]
    fn kvm_has_the_hosts_processor_and_a_pc_has_pci() {
        let mut config = config(MachineKind::Q35, Accelerator::Kvm);
        config.cpus = 4;
        let line = line(&config);
        for part in ["-cpu host", "-smp 4,maxcpus=4", "vhost-user-vsock-pci", "vhost-user-fs-pci"] {
            assert!(line.contains(part), "{part} in {line}");
        }
        assert!(!line.contains("tsc"), "{line}");
    }
}
