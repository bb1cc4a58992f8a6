//! The thread of a queue.

use super::chain::{buffers, room};
use super::late::{Late, Parked};
use super::spin::Spin;
use crate::vhost::{Broken, Queue};
use kso_files::{Outcome, Performer, Pieces, Server};
use rustix::event::{EventfdFlags, epoll, eventfd};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

/// The queue of what must not wait behind requests: `FORGET` and `INTERRUPT`.
const HIGH_PRIORITY: usize = 0;
/// At most so many replies are pushed before the guest hears of them.
const BATCH: usize = 16;

/// Serves a queue in a thread of its own, until it is stopped: then the eventfd is to be written.
pub(super) fn start(
    index: usize,
    queue: Arc<Queue>,
    performer: Performer,
    late: Arc<Late>,
) -> io::Result<(Arc<OwnedFd>, JoinHandle<()>)> {
    let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&events, &stop, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
    let kicks = epoll::EventFlags::IN | epoll::EventFlags::ET;
    epoll::add(&events, queue.kick(), epoll::EventData::new_u64(1), kicks)?;
    let thread = std::thread::Builder::new().name(format!("fs-queue-{index}")).spawn(move || {
        let served = performer.server().map_err(Error::Identity).and_then(|server| {
            let spin = (index != HIGH_PRIORITY).then(Spin::default);
            Serving { queue, late, server, events, spin }.run()
        });
        if let Err(error) = served {
            tracing::error!(%error, index, "a queue of a file system is not served any more");
        }
    })?;
    Ok((stop, thread))
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("the thread cannot act for others: {0}")]
    Identity(#[source] io::Error),
    #[error(transparent)]
    Broken(#[from] Broken),
    #[error("cannot wait: {0}")]
    Wait(#[source] io::Error),
}

struct Serving {
    queue: Arc<Queue>,
    late: Arc<Late>,
    server: Server,
    events: OwnedFd,
    spin: Option<Spin>,
}

impl Serving {
    fn run(mut self) -> Result<(), Error> {
        loop {
            if !self.serve_all()? {
                return Ok(());
            }
            let queue = &self.queue;
            if let Some(spin) = &mut self.spin
                && spin.look(|| queue.lock().is_none_or(|ring| ring.has_available()))
            {
                continue;
            }
            match self.queue.lock() {
                None => return Ok(()),
                Some(mut ring) => {
                    if ring.await_kicks()? {
                        continue;
                    }
                }
            }
            let began = Instant::now();
            self.sleep()?;
            if let Some(spin) = &mut self.spin {
                spin.slept(began.elapsed());
            }
        }
    }

    fn sleep(&self) -> Result<(), Error> {
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 2];
        match epoll::wait(&self.events, &mut events[..], None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(Error::Wait(error.into())),
        }
    }

    /// Serves what is there. `false`: the queue was stopped.
    fn serve_all(&mut self) -> Result<bool, Error> {
        let mut unannounced = 0;
        loop {
            let Some(mut ring) = self.queue.lock() else { return Ok(false) };
            ring.suppress_kicks()?;
            let memory = ring.memory();
            let Some(chain) = ring.pop(memory.as_ref())? else {
                if unannounced > 0 {
                    ring.signal()?;
                }
                return Ok(true);
            };
            // Others may push meanwhile, and the front end may stop the queue.
            drop(ring);
            let head = chain.head_index();
            let outcome = match buffers(chain.clone(), memory.as_ref()) {
                Some(buffers) => {
                    self.server.serve(Pieces::new(&buffers.readable), Pieces::new(&buffers.writable))
                }
                None => Outcome::Silent,
            };
            let written = match outcome {
                Outcome::Reply(length) => length,
                Outcome::Silent => 0,
                Outcome::Later(ticket) => {
                    let room = room(chain);
                    let (queue, memory) = (self.queue.clone(), memory.clone());
                    self.late.park(ticket, Parked { queue, memory, head, room });
                    continue;
                }
            };
            let Some(mut ring) = self.queue.lock() else { return Ok(false) };
            ring.push(head, written as u32)?;
            unannounced += 1;
            if unannounced >= BATCH || !ring.has_available() {
                ring.signal()?;
                unannounced = 0;
            }
        }
    }
}
