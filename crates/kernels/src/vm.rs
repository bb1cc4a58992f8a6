//! A Linux of any version in a virtual machine, with a provider inside.
//!
//! ```text
//!   the kernel's thread                                          the machine
//!     Session: control, relays                                     init = kso: network card, disks, provider
//!        | ticketed streams (socket pairs)                           |  control --> port PROVIDE of the host
//!     Hub: vhost-user vsock device, in the same loop  <== QEMU ==>   |  streams <-- port PROVIDE of the guest
//!     Machine: QEMU, its console and its end                       its own TCP/IP <==> TAP
//! ```
//!
//! A stream of the provider is a vsock stream: its credit is the flow control, so a socket that is slow stalls no other.
//! QEMU is killed with the thread that started it, whatever happens to that.

use crate::carrier::Carrier;
use crate::make::StartError;
use crate::network::Tap;
use kso_core::kernels::{KernelSpec, MachineSpec};
use kso_devices::vsock::{Endpoint, GuestId, Hub, Limits, Outside, Verdict};
use kso_provider::relay::stream_pair;
use kso_vm::initramfs::Contents;
use kso_vm::{Choice, DeviceSocket, Machine, MachineConfig, MachineKind, Nic};
use kso_wire::Errno;
use kso_wire::guest::{StreamKey, ports};
use kso_wire::machine;
use kso_wire::provide::Ticket;
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::net::{SendFlags, send};
use std::collections::VecDeque;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// The CID by which a guest knows its host (`VMADDR_CID_HOST`, vsock(7)).
const HOST_CID: u32 = 2;
/// A stream that the guest did not take, because its queue was full, is offered again after this time.
const AGAIN: Duration = Duration::from_millis(20);
/// So often.
const TRIES: u32 = 200;
/// A machine that boots is given up when it has used so much of a processor, however long that took on a busy host ...
const BOOT_WORK: Duration = Duration::from_secs(20);
/// ... or less than a step for so long, ...
const BOOT_REST: Duration = Duration::from_secs(20);
/// See above.
const BOOT_STEP: Duration = Duration::from_millis(200);
/// ... or after this time.
const BOOT: Duration = Duration::from_secs(120);
/// How often it is looked at meanwhile.
const LOOK: Duration = Duration::from_secs(1);
/// How long a machine that is to end may take to write its disks.
const LEAVE: Duration = Duration::from_secs(10);
/// How long QEMU may take to end after its device is gone.
const LAST: Duration = Duration::from_millis(300);
/// What a kernel says before it gives up.
const PANIC: &str = "Kernel panic - not syncing: ";

/// See the module.
pub(crate) struct Vm {
    hub: Hub,
    guest: GuestId,
    streams: Streams,
    next_port: u32,
    machine: Machine,
    /// Its console, and its end.
    rare: OwnedFd,
    boots: Boots,
    disks: bool,
    // Removed after the machine.
    _tap: Tap,
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm").field("machine", &self.machine).finish_non_exhaustive()
    }
}

/// A machine that boots.
struct Boots {
    next_look: Instant,
    /// What QEMU has used, and since when.
    used: Duration,
    since: Instant,
}

/// What the device asks for.
struct Streams {
    /// Until the guest comes for it.
    control: Option<OwnedFd>,
    /// Streams that the guest did not take: when to try again, how often it was tried.
    refused: VecDeque<(Instant, u32, OwnedFd)>,
    /// How often those were tried that are on their way.
    tries: Vec<(StreamKey, u32)>,
}

/// The newest, a version, or a path.
fn choice(spec: &MachineSpec) -> Choice {
    match spec.kernel.as_deref() {
        None => Choice::Newest,
        Some(path) if path.contains('/') => Choice::Image { image: path.into(), modules: None },
        Some(release) => Choice::Release(release.to_owned()),
    }
}

/// The same for the same address: what others remember of it holds for the next machine that has it.
fn hardware_address(addresses: &[IpAddr]) -> [u8; 6] {
    let octets = match addresses.first() {
        Some(IpAddr::V4(v4)) => v4.octets(),
        Some(IpAddr::V6(v6)) => {
            let [.., a, b, c, d] = v6.octets();
            [a, b, c, d]
        }
        None => std::process::id().to_be_bytes(),
    };
    let [a, b, c, d] = octets;
    // Locally administered.
    [0x02, 0x6b, a, b, c, d]
}

impl Vm {
    /// Starts it: the machine, and the control stream of its provider.
    pub fn start(spec: &KernelSpec, program: &Path) -> Result<(Self, OwnedFd), StartError> {
        let kernel = kso_vm::kernels::find(&choice(&spec.machine))?;
        let addresses: Vec<IpAddr> = spec.addresses.iter().map(ipnet::IpNet::addr).collect();
        let (tap, device) = Tap::make(spec)?;
        let disks = &spec.machine.disks;
        let modules: &[&str] = if disks.is_empty() { &[] } else { &["virtio_blk", "ext4"] };
        let modules: Vec<String> = modules.iter().map(|&name| name.to_owned()).collect();
        let contents = Contents::provider(program, &modules);
        let accelerator = kso_vm::accelerator(&kernel);
        let mut config = MachineConfig::with(&kernel, MachineKind::Microvm, accelerator, &contents)?;
        let told = machine::Machine {
            addresses: spec.addresses.iter().map(|net| (net.addr(), net.prefix_len())).collect(),
            gateways: spec.gateways.clone(),
            disks: disks.iter().enumerate().map(|(index, disk)| disk_told(index, disk)).collect(),
        };
        config.memory = spec.machine.memory;
        config.append = told.words();
        config.append.extend(spec.machine.append.iter().cloned());
        config.arguments = spec.machine.qemu.iter().map(Into::into).collect();
        config.nics.push(Nic { tap: device, address: hardware_address(&addresses) });
        for (disk, told) in disks.iter().zip(&told.disks) {
            if let Err(error) = std::fs::File::open(&disk.image) {
                return Err(StartError::step(format!("open the disk {}", disk.image.display()))(error));
            }
            config.disks.push(kso_vm::Disk {
                image: disk.image.clone(),
                serial: told.serial.clone(),
                read_only: disk.read_only,
            });
        }
        let device = || StartError::step("make the machine's vsock device");
        let (ours, theirs) = UnixStream::pair().map_err(device())?;
        let mut hub = Hub::new(Limits::default()).map_err(device())?;
        hub.pass_resets();
        let guest = hub.add_guest(Endpoint::Connected(ours)).map_err(device())?;
        config.vsock = Some(DeviceSocket::Connected(theirs.into()));
        let (control, given) = stream_pair().map_err(device())?;
        let machine = Machine::start(&config)?;
        let rare = watch(&machine).map_err(device())?;
        let streams = Streams { control: Some(given), refused: VecDeque::new(), tries: Vec::new() };
        let disks = disks.iter().any(|disk| !disk.read_only);
        let now = Instant::now();
        let boots = Boots { next_look: now + LOOK, used: Duration::ZERO, since: now };
        let next_port = 1024;
        Ok((Self { hub, guest, streams, next_port, machine, rare, boots, disks, _tap: tap }, control))
    }

    /// Ends it. One that does not fail writes its disks first.
    pub fn end(mut self, in_order: bool) {
        // It was told by the end of its control stream.
        let until = Instant::now() + LEAVE;
        while in_order && self.disks && Instant::now() < until {
            if self.run_ready().is_err() {
                return;
            }
            let wait = if self.next_deadline().is_some_and(|at| at <= Instant::now()) { 0 } else { 10 };
            let timeout = Timespec { tv_sec: 0, tv_nsec: wait * 1_000_000 };
            let [hub, rare] = [self.hub.poll_fd(), self.rare.as_fd()];
            let mut polled = [hub, rare].map(|one| PollFd::from_borrowed_fd(one, PollFlags::IN));
            let _ = poll(&mut polled, Some(&timeout));
        }
        self.machine.kill();
        let _ = self.machine.wait();
    }

    /// Offers a stream to the guest.
    fn dial(&mut self, tries: u32, socket: OwnedFd) {
        self.next_port = self.next_port.wrapping_add(1).max(1024);
        let key = StreamKey { local_port: ports::PROVIDE, peer_cid: HOST_CID, peer_port: self.next_port };
        match self.hub.dial(self.guest, key, socket) {
            Ok(()) if tries > 0 => self.streams.tries.push((key, tries)),
            Ok(()) => {}
            Err(socket) => self.streams.again(tries, socket),
        }
    }

    /// Whether it comes up, as far as can be seen.
    fn look_at_boot(&mut self, now: Instant) -> Result<(), String> {
        if self.streams.control.is_none() || now < self.boots.next_look {
            return Ok(());
        }
        self.boots.next_look = now + LOOK;
        let used = self.machine.processor_time().unwrap_or_default();
        if used >= self.boots.used + BOOT_STEP {
            self.boots.used = used;
            self.boots.since = now;
        }
        if used >= BOOT_WORK || now.saturating_duration_since(self.boots.since) >= BOOT_REST {
            return Err(self.not_up());
        }
        Ok(())
    }

    fn not_up(&mut self) -> String {
        self.machine.serve_console(&mut |_| {});
        self.with_last_words("its kernel did not come up in time".into())
    }

    fn has_ended(&self, wait: Duration) -> bool {
        let wait = Timespec::try_from(wait).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
        poll(&mut [PollFd::from_borrowed_fd(self.machine.ended_fd(), PollFlags::IN)], Some(&wait)) == Ok(1)
    }

    /// Why the machine is no more.
    fn death(&mut self) -> String {
        let status = self.machine.wait();
        self.machine.serve_console(&mut |_| {});
        let what = match (panic_line(&self.machine.console()), status) {
            (Some(line), _) => format!("its kernel panicked: {line}"),
            (None, _) if self.streams.control.is_some() => "its machine ended before it served".into(),
            (None, Ok(status)) => format!("its machine ended ({status})"),
            (None, Err(_)) => "its machine ended".into(),
        };
        self.with_last_words(what)
    }

    fn with_last_words(&self, what: String) -> String {
        match self.machine.last_words() {
            words if words.is_empty() => what,
            words => format!("{what}\n{words}"),
        }
    }
}

impl Carrier for Vm {
    fn open(&mut self, ticket: Ticket) -> io::Result<OwnedFd> {
        let (own, theirs) = stream_pair()?;
        // A new stream has room for it.
        let sent = send(&own, &ticket.bytes(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
        if sent != Ticket::SIZE {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.dial(0, theirs);
        Ok(own)
    }

    fn welcome_within(&self) -> Option<Duration> {
        Some(BOOT)
    }

    fn poll_fds(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.hub.poll_fd(), self.rare.as_fd()]
    }

    fn next_deadline(&self) -> Option<Instant> {
        let again = self.streams.refused.front().map(|(at, ..)| *at);
        let look = self.streams.control.as_ref().map(|_| self.boots.next_look);
        [self.hub.next_deadline(), again, look].into_iter().flatten().min()
    }

    fn run_ready(&mut self) -> Result<(), String> {
        self.hub.run_ready(&mut self.streams);
        let now = Instant::now();
        while self.streams.refused.front().is_some_and(|(at, ..)| *at <= now)
            && let Some((_, tries, socket)) = self.streams.refused.pop_front()
        {
            self.dial(tries, socket);
        }
        self.look_at_boot(now)?;
        let mut events = Vec::with_capacity(2);
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let _ = epoll::wait(&self.rare, rustix::buffer::spare_capacity(&mut events), Some(&zero));
        if events.is_empty() {
            return Ok(());
        }
        self.machine.serve_console(&mut |_| {});
        if self.has_ended(Duration::ZERO) { Err(self.death()) } else { Ok(()) }
    }

    fn explain(&mut self, gone: bool) -> Option<String> {
        // QEMU's end takes its device along a moment before it is told itself.
        if self.has_ended(if gone { LAST } else { Duration::ZERO }) {
            return Some(self.death());
        }
        if self.streams.control.is_some() {
            return Some(self.not_up());
        }
        // It may take long over its last words.
        self.machine.serve_console(&mut |_| {});
        let line = panic_line(&self.machine.console())?;
        Some(self.with_last_words(format!("its kernel panicked: {line}")))
    }
}

impl Streams {
    /// Keeps a stream that was not taken, for a while.
    fn again(&mut self, tries: u32, socket: OwnedFd) {
        if tries < TRIES {
            self.refused.push_back((Instant::now() + AGAIN, tries + 1, socket));
        } else {
            tracing::debug!("a machine does not take a stream");
        }
    }

    fn tried(&mut self, stream: StreamKey) -> u32 {
        let found = self.tries.iter().position(|(key, _)| *key == stream);
        found.map_or(0, |index| self.tries.swap_remove(index).1)
    }
}

impl Outside for Streams {
    fn request(&mut self, _: GuestId, stream: StreamKey) -> Verdict {
        let known = stream.peer_cid == HOST_CID && stream.peer_port == ports::PROVIDE;
        match self.control.take_if(|_| known) {
            Some(control) => Verdict::Socket(control),
            None => Verdict::Refused(Errno::ECONNREFUSED),
        }
    }

    fn established(&mut self, _: GuestId, stream: StreamKey, _: Option<BorrowedFd<'_>>) {
        self.tried(stream);
    }

    fn failed(&mut self, _: GuestId, _: StreamKey, _: Errno) {}

    fn rejected(&mut self, _: GuestId, stream: StreamKey, socket: OwnedFd) {
        let tries = self.tried(stream);
        self.again(tries, socket);
    }

    fn ended(&mut self, _: GuestId, _: StreamKey, _: kso_devices::vsock::End) {}

    fn control(&mut self, _: GuestId, _: &[u8]) -> Result<(), String> {
        Err("it has none".into())
    }

    fn control_output(&mut self, _: GuestId) -> Option<&mut Vec<u8>> {
        None
    }

    fn gone(&mut self, _: GuestId) {
        self.refused.clear();
        self.tries.clear();
    }
}

fn disk_told(index: usize, disk: &kso_core::kernels::DiskSpec) -> machine::Disk {
    machine::Disk { serial: format!("kso{index}"), target: disk.target.clone(), read_only: disk.read_only }
}

fn watch(machine: &Machine) -> io::Result<OwnedFd> {
    let rare = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    for descriptor in [machine.ended_fd(), machine.console_fd()] {
        epoll::add(&rare, descriptor, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
    }
    Ok(rare)
}

/// Why a kernel gave up, as its console has it: fit for a terminal.
fn panic_line(console: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(console);
    let line = text.lines().rev().find_map(|line| Some(line.split_once(PANIC)?.1.to_owned()))?;
    Some(line.chars().filter(|c| !c.is_control()).take(200).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_found_on_the_console() {
        let console = b"[    1.0] hello\r\n[  3.1] Kernel panic - not syncing: NMI: Not continuing\x1b[0m\r\n[ 3.2] CPU: 0\r\n";
        assert_eq!(panic_line(console).unwrap(), "NMI: Not continuing[0m");
        assert_eq!(panic_line(b"kso: bye"), None);
    }

    #[test]
    fn a_kernel_is_a_version_or_a_path() {
        let of = |text: &str| choice(&MachineSpec { kernel: Some(text.into()), ..MachineSpec::default() });
        assert_eq!(of("6.12"), Choice::Release("6.12".into()));
        assert_eq!(of("./bzImage"), Choice::Image { image: "./bzImage".into(), modules: None });
        assert_eq!(hardware_address(&["10.79.0.2".parse().unwrap()]), [2, 0x6b, 10, 79, 0, 2]);
    }
}
