//! What a front end has told: features, memory, rings.

use super::queue::{Layout, MAX_SIZE, Memory, Queue, Ring};
use rustix::fs::OFlags;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap, MmapRegion};

/// `VIRTIO_F_INDIRECT_DESC` (virtio 1.2, 6).
const INDIRECT: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`.
const EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`.
const VERSION_1: u64 = 1 << 32;
/// Most memory regions of a guest.
const MAX_REGIONS: usize = 64;

/// What a device is.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Feature bits of the device type; those of the transport are added.
    pub features: u64,
    /// How many queues it has at most.
    pub queues: usize,
    /// Its configuration space. The driver cannot write it.
    pub config: Vec<u8>,
}

/// What a message of the front end changed.
#[derive(Debug)]
pub enum Change {
    /// This queue runs. It may have something in it already.
    Started(usize, Arc<Queue>),
    /// It runs no more; its descriptors are the driver's again.
    Stopped(usize),
}

/// One ring as it is being set up.
#[derive(Debug, Default)]
struct Setup {
    layout: Layout,
    addressed: bool,
    enabled: bool,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    running: Option<Arc<Queue>>,
}

/// A region of guest memory, and where the front end has it mapped: it gives ring addresses as its own.
#[derive(Debug)]
struct Region {
    guest: u64,
    front: u64,
    size: u64,
    mapping: Arc<GuestRegionMmap<()>>,
}

#[derive(Debug)]
pub(super) struct State {
    spec: Spec,
    acked: u64,
    regions: Vec<Region>,
    memory: Option<Arc<Memory>>,
    rings: Vec<Setup>,
    pub changes: Vec<Change>,
}

fn invalid(_: impl std::fmt::Debug) -> Error {
    Error::InvalidParam
}

impl State {
    pub(super) fn new(spec: Spec) -> Self {
        let rings = (0..spec.queues).map(|_| Setup::default()).collect();
        State { spec, acked: 0, regions: Vec::new(), memory: None, rings, changes: Vec::new() }
    }

    fn ring(&mut self, index: u32) -> Result<&mut Setup> {
        let index = usize::try_from(index).map_err(invalid)?;
        self.rings.get_mut(index).ok_or(Error::InvalidParam)
    }

    fn has(&self, feature: u64) -> bool {
        self.acked & feature != 0
    }

    /// Stops ring `index` if it runs. Its owner hears of it, and it goes on later where it was.
    fn stop(&mut self, index: usize) {
        let Some(ring) = self.rings.get_mut(index) else { return };
        if let Some(queue) = ring.running.take() {
            ring.layout.next = queue.close();
            self.changes.push(Change::Stopped(index));
        }
    }

    pub(super) fn stop_all(&mut self) {
        (0..self.rings.len()).for_each(|index| self.stop(index));
    }

    /// Starts ring `index` if all is known of it.
    fn start(&mut self, index: u32) -> Result<()> {
        // Without VHOST_USER_F_PROTOCOL_FEATURES rings are born enabled (vhost-user, "Ring states").
        let born_enabled = !self.has(VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits());
        let event_idx = self.has(EVENT_IDX);
        let memory = self.memory.clone();
        let ring = self.ring(index)?;
        if ring.running.is_some() || !ring.addressed || !(ring.enabled || born_enabled) {
            return Ok(());
        }
        let (Some(memory), Some(kick)) = (memory, &ring.kick) else { return Ok(()) };
        let copy = |fd: &OwnedFd| fd.try_clone().map_err(Error::ReqHandlerError);
        let call = ring.call.as_ref().map(copy).transpose()?;
        let built = Ring::new(Layout { event_idx, ..ring.layout }, memory, call).map_err(invalid)?;
        let queue = Arc::new(Queue::new(copy(kick)?, built));
        ring.running = Some(Arc::clone(&queue));
        self.changes.push(Change::Started(usize::try_from(index).map_err(invalid)?, queue));
        Ok(())
    }

    fn restart(&mut self, index: u32) -> Result<()> {
        self.stop(usize::try_from(index).map_err(invalid)?);
        self.start(index)
    }

    /// The guest-physical address of what the front end has at `address`.
    fn translate(&self, address: u64) -> Result<u64> {
        let find = |region: &Region| {
            let offset = address.checked_sub(region.front).filter(|offset| *offset < region.size)?;
            region.guest.checked_add(offset)
        };
        self.regions.iter().find_map(find).ok_or(Error::InvalidParam)
    }

    fn map(region: &VhostUserMemoryRegion, file: File) -> Result<Region> {
        // A file that shrinks would kill whoever reads the mapping (SIGBUS). QEMU seals its memory; others may not.
        match rustix::fs::fcntl_get_seals(&file) {
            Ok(seals) if seals.contains(rustix::fs::SealFlags::SHRINK) => {}
            _ => tracing::debug!("guest memory is not sealed against shrinking: its VMM must be trusted"),
        }
        let size = usize::try_from(region.memory_size).map_err(invalid)?;
        let at = FileOffset::new(file, region.mmap_offset);
        let mapping = MmapRegion::from_file(at, size).map_err(invalid)?;
        let mapping = GuestRegionMmap::new(mapping, GuestAddress(region.guest_phys_addr));
        Ok(Region {
            guest: region.guest_phys_addr,
            front: region.user_addr,
            size: region.memory_size,
            mapping: Arc::new(mapping.ok_or(Error::InvalidParam)?),
        })
    }

    /// Gives the running rings the memory as it is now.
    fn remap(&mut self) -> Result<()> {
        let mut regions: Vec<_> = self.regions.iter().map(|region| Arc::clone(&region.mapping)).collect();
        regions.sort_by_key(|region| vm_memory::GuestMemoryRegion::start_addr(region.as_ref()));
        let memory = Arc::new(Memory::from_arc_regions(regions).map_err(invalid)?);
        for queue in self.rings.iter().filter_map(|ring| ring.running.as_ref()) {
            if let Some(mut ring) = queue.lock() {
                ring.set_memory(Arc::clone(&memory));
            }
        }
        self.memory = Some(memory);
        (0..self.rings.len()).try_for_each(|index| self.start(u32::try_from(index).map_err(invalid)?))
    }
}

/// Descriptors of notifications must not block, whatever they are.
fn notifier(file: Option<File>) -> Result<Option<OwnedFd>> {
    let Some(file) = file else { return Ok(None) };
    let flags = rustix::fs::fcntl_getfl(file.as_fd()).map_err(invalid)?;
    rustix::fs::fcntl_setfl(file.as_fd(), flags | OFlags::NONBLOCK).map_err(invalid)?;
    Ok(Some(file.into()))
}

impl VhostUserBackendReqHandlerMut for State {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.stop_all();
        self.rings.iter_mut().for_each(|ring| *ring = Setup::default());
        self.acked = 0;
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        let transport = VERSION_1 | INDIRECT | EVENT_IDX;
        Ok(self.spec.features | transport | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.get_features()? != 0 {
            return Err(Error::InvalidParam);
        }
        self.acked = features;
        Ok(())
    }

    fn set_mem_table(&mut self, regions: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<()> {
        let mapped = regions.iter().zip(files).map(|(region, file)| Self::map(region, file));
        self.regions = mapped.collect::<Result<_>>()?;
        self.remap()
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).ok().filter(|size| size.is_power_of_two() && *size <= MAX_SIZE);
        self.ring(index)?.layout.size = size.ok_or(Error::InvalidParam)?;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let [descriptors, available, used] = [descriptor, available, used].map(|at| self.translate(at));
        let (descriptors, available, used) = (descriptors?, available?, used?);
        let ring = self.ring(index)?;
        let size = ring.layout.size;
        ring.layout = Layout { size, descriptors, available, used, ..ring.layout };
        ring.addressed = size > 0;
        self.restart(index)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let ring = self.ring(index)?;
        if ring.running.is_some() {
            return Err(Error::InvalidParam);
        }
        ring.layout.next = u16::try_from(base).map_err(invalid)?;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.stop(usize::try_from(index).map_err(invalid)?);
        let ring = self.ring(index)?;
        // It starts again with a new kick only.
        ring.kick = None;
        ring.call = None;
        Ok(VhostUserVringState::new(index, ring.layout.next.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.stop(index.into());
        self.ring(index.into())?.kick = notifier(fd)?;
        self.start(index.into())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let ring = self.ring(index.into())?;
        ring.call = notifier(fd)?;
        let Some(queue) = &ring.running else { return self.start(index.into()) };
        // Replaced while it runs when the driver masks an MSI-X vector.
        let call = ring.call.as_ref().map(OwnedFd::try_clone).transpose().map_err(Error::ReqHandlerError)?;
        if let Some(mut ring) = queue.lock() {
            ring.set_call(call);
        }
        Ok(())
    }

    fn set_vring_err(&mut self, _index: u8, _fd: Option<File>) -> Result<()> {
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        let mut features = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        // A device whose configuration is the front end's own: QEMU complains of one that offers it.
        features.set(VhostUserProtocolFeatures::CONFIG, !self.spec.config.is_empty());
        Ok(features)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        u64::try_from(self.spec.queues).map_err(invalid)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.ring(index)?.enabled = enable;
        if enable {
            return self.start(index);
        }
        self.stop(usize::try_from(index).map_err(invalid)?);
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let offset = usize::try_from(offset).map_err(invalid)?;
        let size = usize::try_from(size).map_err(invalid)?;
        // What lies behind the fields of a device reads as zeroes.
        Ok(self.spec.config.iter().copied().chain(std::iter::repeat(0)).skip(offset).take(size).collect())
    }

    fn set_config(&mut self, _offset: u32, _buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        Err(Error::InvalidOperation("the configuration is read-only"))
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("not a GPU"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("no shared objects"))
    }

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidOperation("no in-flight region"))
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("no in-flight region"))
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        u64::try_from(MAX_REGIONS).map_err(invalid)
    }

    fn add_mem_region(&mut self, region: &VhostUserSingleMemoryRegion, file: File) -> Result<()> {
        if self.regions.len() >= MAX_REGIONS {
            return Err(Error::InvalidParam);
        }
        self.regions.push(Self::map(region, file)?);
        self.remap().inspect_err(|_| {
            self.regions.pop();
        })
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.regions
            .retain(|other| (other.guest, other.size) != (region.guest_phys_addr, region.memory_size));
        self.remap()
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("no migration"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("no migration"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("no shared memory"))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("no migration"))
    }
}
