//! The interface: a TAP whose frames begin with a virtio-net header.

use crate::stack::Link;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// See the module.
#[derive(Debug)]
pub struct Tap {
    device: OwnedFd,
    hardware: [u8; 6],
    lost: u64,
}

impl Tap {
    /// Over a descriptor of `kso_sys::tap::create`. The stack behind it gets an address that nobody else has.
    #[must_use]
    pub fn new(device: OwnedFd) -> Self {
        let [a, b, c, d, e, ..] = random().to_ne_bytes();
        // Locally administered (IEEE 802).
        Self { device, hardware: [0x02, a, b, c, d, e], lost: 0 }
    }

    /// The hardware address of the stack.
    #[must_use]
    pub fn hardware(&self) -> [u8; 6] {
        self.hardware
    }

    /// Reads a frame. `None`: there is none.
    ///
    /// # Errors
    /// The interface is gone.
    pub fn receive<'b>(&mut self, buffer: &'b mut [u8]) -> io::Result<Option<&'b [u8]>> {
        match rustix::io::read(&self.device, &mut *buffer) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => Ok(buffer.get(..count)),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl Link for Tap {
    fn send(&mut self, frame: &[u8]) {
        // It is down, or without memory: lost, as on any link.
        if let Err(error) = rustix::io::write(&self.device, frame) {
            self.lost += 1;
            if self.lost.is_power_of_two() {
                tracing::debug!(%error, lost = self.lost, "frames cannot be sent");
            }
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

/// Not to be guessed: the hasher of the standard library is seeded by the kernel.
pub fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish()
}
