//! The TCP of the sandbox's side: smoltcp, with one set of one socket for each stream.
//!
//! A set of its own for each stream makes the work of a packet independent of how many streams there are:
//! smoltcp looks through all sockets of a set. A segment that belongs to no stream goes to the empty set, which
//! answers it with a reset.

use crate::device::Device;
use crate::packet::ip::MAX_PACKET;
use kso_wire::TunAddresses;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Checksum, DeviceCapabilities, Medium};
use smoltcp::socket::tcp;
use smoltcp::wire::{HardwareAddress, IpCidr, IpListenEndpoint};
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

/// Room for each direction of a stream, bytes. It is reserved at once and used as it fills.
const BUFFER: usize = 256 << 10;
/// The longest packet that is sent: IPv4's longest, bytes.
const MTU: usize = 65_535;

/// See the module.
pub struct Stack {
    interface: Interface,
    checksums: bool,
    scratch: Vec<u8>,
    start: Instant,
    nobody: SocketSet<'static>,
}

impl std::fmt::Debug for Stack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stack").field("checksums", &self.checksums).finish_non_exhaustive()
    }
}

/// A TCP connection of the sandbox.
pub struct End {
    set: SocketSet<'static>,
    handle: SocketHandle,
}

impl std::fmt::Debug for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("End").field("state", &self.set.get::<tcp::Socket<'_>>(self.handle).state()).finish()
    }
}

impl End {
    /// One that takes a connection to `address`. `None`: port 0.
    pub fn listening(address: SocketAddr) -> Option<Self> {
        let buffer = || tcp::SocketBuffer::new(vec![0; BUFFER]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        // What comes from outside was gathered there already.
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        let endpoint = IpListenEndpoint { addr: Some(address.ip().into()), port: address.port() };
        socket.listen(endpoint).ok()?;
        let mut set = SocketSet::new(Vec::with_capacity(1));
        let handle = set.add(socket);
        Some(Self { set, handle })
    }

    /// The socket.
    pub fn socket(&mut self) -> &mut tcp::Socket<'static> {
        self.set.get_mut(self.handle)
    }
}

impl Stack {
    /// For a sandbox with these addresses. `offload`: the device completes checksums.
    pub fn new(addresses: &TunAddresses, offload: bool) -> Self {
        let mut idle = Port { packet: None, device: None, scratch: &mut Vec::new(), checksums: !offload };
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed();
        let start = Instant::now();
        let mut interface = Interface::new(config, &mut idle, smoltcp::time::Instant::ZERO);
        interface.update_ip_addrs(|own| {
            for gateway in addresses.gateway {
                let _ = own.push(IpCidr::new(gateway.into(), if gateway.is_ipv4() { 30 } else { 64 }));
            }
        });
        // Packets to any address are taken if its route leads to ourselves.
        interface.set_any_ip(true);
        for gateway in addresses.gateway {
            let _ = match gateway {
                IpAddr::V4(gateway) => interface.routes_mut().add_default_ipv4_route(gateway).map(|_| ()),
                IpAddr::V6(gateway) => interface.routes_mut().add_default_ipv6_route(gateway).map(|_| ()),
            };
        }
        Self {
            interface,
            checksums: !offload,
            scratch: Vec::with_capacity(MAX_PACKET),
            start,
            nobody: SocketSet::new(Vec::new()),
        }
    }

    /// Gives a stream its packet, if there is one, and sends what it has to say. Tells when to come back.
    pub fn poll(
        &mut self,
        device: &mut Device,
        end: &mut End,
        packet: Option<&[u8]>,
        now: Instant,
    ) -> Option<Instant> {
        let time = self.time(now);
        let mut port =
            Port { packet, device: Some(device), scratch: &mut self.scratch, checksums: self.checksums };
        self.interface.poll(time, &mut port, &mut end.set);
        let at = self.interface.poll_at(time, &end.set)?;
        let micros = u64::try_from(at.total_micros()).unwrap_or(0);
        Some(self.start + std::time::Duration::from_micros(micros))
    }

    /// Answers a packet that belongs to no stream.
    pub fn refuse(&mut self, device: &mut Device, packet: &[u8], now: Instant) {
        let time = self.time(now);
        let mut port = Port {
            packet: Some(packet),
            device: Some(device),
            scratch: &mut self.scratch,
            checksums: self.checksums,
        };
        self.interface.poll(time, &mut port, &mut self.nobody);
    }

    fn time(&self, now: Instant) -> smoltcp::time::Instant {
        let since = now.saturating_duration_since(self.start);
        smoltcp::time::Instant::from_micros(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
    }
}

/// Initial sequence numbers are not to be guessed; the standard library's hasher is seeded by the kernel.
fn seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish()
}

/// The TUN for the time of one packet.
struct Port<'a> {
    packet: Option<&'a [u8]>,
    device: Option<&'a mut Device>,
    scratch: &'a mut Vec<u8>,
    checksums: bool,
}

struct Incoming<'a>(&'a [u8]);

struct Sending<'a> {
    device: Option<&'a mut Device>,
    scratch: &'a mut Vec<u8>,
}

impl phy::RxToken for Incoming<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

impl phy::TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        // Only what is longer than anything before is filled with zeroes: all bytes are written over.
        if self.scratch.len() < length {
            self.scratch.resize(length, 0);
        }
        let packet = self.scratch.get_mut(..length).unwrap_or_default();
        let result = f(packet);
        if let Some(device) = self.device
            && let Err(error) = device.write_tcp(packet)
        {
            tracing::debug!(%error, "a segment could not be written to the TUN");
        }
        result
    }
}

impl phy::Device for Port<'_> {
    type RxToken<'b>
        = Incoming<'b>
    where
        Self: 'b;
    type TxToken<'b>
        = Sending<'b>
    where
        Self: 'b;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Incoming<'_>, Sending<'_>)> {
        let packet = self.packet.take()?;
        Some((Incoming(packet), Sending { device: self.device.as_deref_mut(), scratch: self.scratch }))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Sending<'_>> {
        Some(Sending { device: self.device.as_deref_mut(), scratch: self.scratch })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        // What arrives was verified by the ingress, or is vouched for by the sandbox's kernel.
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities.checksum.tcp = if self.checksums { Checksum::Tx } else { Checksum::None };
        capabilities
    }
}
