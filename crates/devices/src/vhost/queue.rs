//! A split virtqueue that a front end has started.

use rustix::event::EventfdFlags;
use std::num::Wrapping;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use virtio_queue::{DescriptorChain, Error, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The memory of a guest.
pub type Memory = GuestMemoryMmap<()>;
/// A chain of descriptors, ending where it makes no sense (loops, addresses outside, more than 4 GiB).
pub type Chain<M> = DescriptorChain<M>;

/// Most descriptors of a queue (virtio 1.2, 2.7).
pub(super) const MAX_SIZE: u16 = 1 << 15;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (virtio 1.2, 2.7.6).
const NO_INTERRUPT: u16 = 1;

/// The driver broke the rules of a queue; it works no more until it is reset.
#[derive(Debug, thiserror::Error)]
#[error("broken virtqueue: {0}")]
pub struct Broken(#[from] Error);

/// A queue from when the front end started it to when it stopped it.
#[derive(Debug)]
pub struct Queue {
    kick: OwnedFd,
    ring: Mutex<Ring>,
}

impl Queue {
    pub(super) fn new(kick: OwnedFd, ring: Ring) -> Self {
        Queue { kick, ring: Mutex::new(ring) }
    }

    /// A queue in memory of one's own, without a front end: for drivers in the same process (tests, fuzzing). The driver
    /// gets the descriptors to kick and to be called with.
    ///
    /// # Errors
    /// It does not lie in the memory; descriptors ran out.
    pub fn in_memory(
        memory: Arc<Memory>,
        size: u16,
        [descriptors, available, used]: [u64; 3],
        event_idx: bool,
    ) -> std::io::Result<(Self, [OwnedFd; 2])> {
        let notifier = || rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let (kick, call) = (notifier()?, notifier()?);
        let layout = Layout { size, descriptors, available, used, next: 0, event_idx };
        let ring = Ring::new(layout, memory, Some(call.try_clone()?)).map_err(std::io::Error::other)?;
        Ok((Queue::new(kick.try_clone()?, ring), [kick, call]))
    }

    /// Becomes readable when the driver has put something in. See the module about how to wait.
    #[must_use]
    pub fn kick(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// The ring; `None` if the front end stopped it.
    pub fn lock(&self) -> Option<MutexGuard<'_, Ring>> {
        Some(self.slot()).filter(|ring| ring.open)
    }

    fn slot(&self) -> MutexGuard<'_, Ring> {
        // Nothing in here panics half way.
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops it, lets go of the guest's memory, and tells how far it came in the available ring.
    pub(super) fn close(&self) -> u16 {
        let mut ring = self.slot();
        ring.open = false;
        ring.memory = Arc::new(Memory::new());
        ring.call = None;
        ring.queue.next_avail()
    }
}

/// Where a queue lies, as the front end set it up.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Layout {
    pub size: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    /// Where to go on in the available ring.
    pub next: u16,
    pub event_idx: bool,
}

/// The device's side of a split virtqueue (virtio 1.2, 2.7).
#[derive(Debug)]
pub struct Ring {
    queue: virtio_queue::Queue,
    memory: Arc<Memory>,
    call: Option<OwnedFd>,
    open: bool,
}

impl Ring {
    /// # Errors
    /// It does not lie in the memory.
    pub(super) fn new(layout: Layout, memory: Arc<Memory>, call: Option<OwnedFd>) -> Result<Self, Broken> {
        let mut queue = virtio_queue::Queue::new(MAX_SIZE)?;
        queue.try_set_size(layout.size)?;
        queue.try_set_desc_table_address(GuestAddress(layout.descriptors))?;
        queue.try_set_avail_ring_address(GuestAddress(layout.available))?;
        queue.try_set_used_ring_address(GuestAddress(layout.used))?;
        queue.set_event_idx(layout.event_idx);
        queue.set_next_avail(layout.next);
        queue.set_ready(true);
        if !queue.is_valid(memory.deref()) {
            return Err(Broken(Error::QueueNotReady));
        }
        // A front end that takes up a queue again (a new back end after a crash) does not tell the used index.
        let used = queue.used_idx(memory.deref(), Ordering::Acquire)?;
        queue.set_next_used(used.0);
        Ok(Ring { queue, memory, call, open: true })
    }

    /// The guest's memory, as it is mapped now.
    #[must_use]
    pub fn memory(&self) -> Arc<Memory> {
        Arc::clone(&self.memory)
    }

    pub(super) fn set_memory(&mut self, memory: Arc<Memory>) {
        self.memory = memory;
    }

    pub(super) fn set_call(&mut self, call: Option<OwnedFd>) {
        self.call = call;
    }

    /// Descriptors of the queue.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Whether the driver has put something in that was not taken yet.
    #[must_use]
    pub fn has_available(&self) -> bool {
        let index = self.queue.avail_idx(&*self.memory, Ordering::Acquire);
        // An unreadable ring counts as one with something in it: `pop` then tells that it is broken.
        index.map_or(true, |index| index != Wrapping(self.queue.next_avail()))
    }

    /// Takes the next chain. `memory` is [`Self::memory`], or a reference to it.
    ///
    /// # Errors
    /// The available index makes no sense.
    pub fn pop<M>(&mut self, memory: M) -> Result<Option<Chain<M>>, Broken>
    where
        M: Clone + Deref<Target = Memory>,
    {
        Ok(self.queue.iter(memory)?.next())
    }

    /// Gives back the chain that was popped last (and before it the one before, and so on), unused.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns a chain to the driver, with so many bytes written.
    ///
    /// # Errors
    /// The head is no descriptor of the queue.
    pub fn push(&mut self, head: u16, written: u32) -> Result<(), Broken> {
        if !self.open {
            return Ok(());
        }
        Ok(self.queue.add_used(&*self.memory, head, written)?)
    }

    /// Interrupts the driver if it wants to know of what was pushed since the last time.
    ///
    /// # Errors
    /// The ring cannot be read.
    pub fn signal(&mut self) -> Result<(), Broken> {
        let wanted = if self.queue.event_idx_enabled() {
            self.queue.needs_notification(&*self.memory)?
        } else {
            // The used index must be seen before the flags are read.
            fence(Ordering::SeqCst);
            let flags = self.memory.load::<u16>(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed);
            u16::from_le(flags.map_err(Error::GuestMemory)?) & NO_INTERRUPT == 0
        };
        if let Some(call) = self.call.as_ref().filter(|_| wanted) {
            // A full counter is a signal that is still to be seen; the descriptor does not block.
            let _ = rustix::io::write(call, &1_u64.to_ne_bytes());
        }
        Ok(())
    }

    /// Tells the driver that it need not kick. It may all the same.
    ///
    /// # Errors
    /// The ring cannot be written.
    pub fn suppress_kicks(&mut self) -> Result<(), Broken> {
        Ok(self.queue.disable_notification(&*self.memory)?)
    }

    /// Tells the driver to kick when it puts something in. True: something is there already.
    ///
    /// # Errors
    /// The ring cannot be written.
    pub fn await_kicks(&mut self) -> Result<bool, Broken> {
        Ok(self.queue.enable_notification(&*self.memory)?)
    }
}
