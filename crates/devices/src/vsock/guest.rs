//! One guest of a hub: its VMM's connection, its queues, and what is under way for it.

use super::packet::Header;
use super::table::Id;
use crate::vhost::{Broken, FrontEnd, Queue, Spec};
use kso_files::Files;
use kso_wire::guest::{GUEST_CID, StreamKey};
use std::collections::{HashMap, VecDeque};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

/// Queue of packets to the guest (virtio 1.2, 5.10.2).
pub(super) const RX: usize = 0;
/// Queue of packets from the guest.
pub(super) const TX: usize = 1;
/// RX, TX, and that of events, which this device never uses (and QEMU keeps to itself).
const QUEUES: usize = 3;

/// Where a VMM comes from.
#[derive(Debug)]
pub enum Endpoint {
    /// It connects here. When it is gone another one may.
    Listener(UnixListener),
    /// It is connected already (it was given the other end).
    Connected(UnixStream),
    /// It is in this process: RX and TX.
    Queues(Queue, Queue),
}

/// Why a guest is dropped.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    #[error(transparent)]
    Broken(#[from] Broken),
    #[error(transparent)]
    Malformed(#[from] super::chain::Malformed),
    #[error("control stream: {0}")]
    Control(String),
}

#[derive(Debug, Default)]
pub(super) struct Guest {
    pub listener: Option<UnixListener>,
    pub front: Option<FrontEnd>,
    pub rx: Option<Arc<Queue>>,
    pub tx: Option<Arc<Queue>>,
    pub names: HashMap<StreamKey, Id>,
    pub control: Option<Id>,
    /// Streams that wait for buffers.
    pub line: VecDeque<Id>,
    /// RSTs that wait for buffers.
    pub resets: VecDeque<Header>,
    /// Streams that are not open yet.
    pub half_open: usize,
    /// Bytes held for slow far ends.
    pub held: usize,
    /// Packets returned since the guest was last interrupted for it.
    pub unsignalled: u32,
    /// It had no buffer left when one was wanted.
    pub starved: bool,
    /// What it may send from, by the tags by which it mounts them.
    pub files: HashMap<String, Files>,
    /// It was told of to the outside, or may have been.
    pub alive: bool,
}

impl Guest {
    pub fn spec() -> Spec {
        Spec { features: 0, queues: QUEUES, config: u64::from(GUEST_CID).to_le_bytes().to_vec() }
    }
}
