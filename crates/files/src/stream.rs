//! A share that is performed for another kernel: requests come by a stream of bytes.
//!
//! ```text
//!   stream -- hello: which kernel this is ----------------------------------------------------> who asks
//!     |
//!     +--> the thread whose turn it is: reads a request, lets the next thread read, performs, writes the reply
//!          the next thread: ...            as many as there are slow requests, up to MAX_THREADS
//!     locks that were waited for: a thread of the service's writes the reply
//! ```
//!
//! No request is handed from one thread to another: where kernels share a core that would cost more than most of them.

use crate::Pieces;
use crate::abi;
use crate::frames::{Frames, Link, MAX_FRAME, Malformed, PING};
use crate::hello::{self, Boot};
use crate::inodes::lock;
use crate::locks::Completer;
use crate::request;
use crate::service::Service;
use crate::worker::{Outcome, Worker, bare_reply};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use vm_memory::VolatileSlice;

/// At most so many requests are performed at once; more wait in the stream.
const MAX_THREADS: usize = 32;

/// Performs what is asked on `stream`, a connected stream socket, until it ends. Then everything that was open for it is let
/// go of. The service is for this stream alone: see [`Service::detached`].
///
/// # Errors
/// What came was no request, or the stream failed. An end is none.
pub fn serve(service: Arc<Service>, stream: OwnedFd) -> io::Result<()> {
    let link = Arc::new(Link::new(stream)?);
    let reader = link.reader()?;
    service.locks.attach(Arc::new(Late(link.clone())));
    let serving = Arc::new(Serving {
        service: service.clone(),
        link: link.clone(),
        frames: Mutex::new(Frames::new(reader, abi::IN_HEADER)),
        reading: AtomicUsize::new(0),
        failure: Mutex::default(),
    });
    let begun = match link.send(&hello::encode(Boot::own()), None) {
        Ok(()) => serving.run(),
        // It has ended already.
        Err(_) => Ok(()),
    };
    link.end();
    service.disconnect();
    service.locks.detach();
    begun?;
    let failure = lock(&serving.failure).take();
    failure.map_or(Ok(()), Err)
}

/// Reads a request. `false`: there are no more.
fn next(frames: &mut Frames<UnixStream>, request: &mut Vec<u8>) -> io::Result<bool> {
    match frames.next(request) {
        Ok(more) => Ok(more),
        // Who asks is gone without having read all replies.
        Err(Malformed::Io(error)) if error.kind() == io::ErrorKind::ConnectionReset => Ok(false),
        Err(Malformed::Io(error)) => Err(error),
        Err(error) => Err(io::Error::other(error)),
    }
}

#[derive(Debug)]
struct Late(Arc<Link>);

impl Completer for Late {
    fn reply(&self, ticket: u64, reply: &[u8]) {
        if self.0.send(reply, None).is_err() {
            tracing::debug!(ticket, "nobody waits any more");
        }
    }
}

#[derive(Debug)]
struct Serving {
    service: Arc<Service>,
    link: Arc<Link>,
    /// Whose turn it is to read.
    frames: Mutex<Frames<UnixStream>>,
    /// Threads that read or wait for their turn.
    reading: AtomicUsize,
    failure: Mutex<Option<io::Error>>,
}

/// One more thread is needed, and is to have this.
struct More(Sender<More>);

impl Serving {
    /// Starts threads as they are needed, until all have ended. Here, because a thread that performs has given up what a new
    /// one would have to give up by itself.
    fn run(self: &Arc<Self>) -> io::Result<()> {
        let (more, wanted) = channel();
        let mut threads = vec![self.start(more)?];
        while let Ok(More(more)) = wanted.recv() {
            if threads.len() < MAX_THREADS {
                match self.start(more) {
                    Ok(thread) => threads.push(thread),
                    Err(error) => tracing::debug!(%error, "those that are there go on"),
                }
            }
        }
        for thread in threads {
            let _ = thread.join();
        }
        Ok(())
    }

    fn start(self: &Arc<Self>, more: Sender<More>) -> io::Result<JoinHandle<()>> {
        let serving = self.clone();
        self.reading.fetch_add(1, Ordering::SeqCst);
        let thread = std::thread::Builder::new().name("kso-files".into()).spawn(move || {
            if let Err(error) = serving.work(&more) {
                lock(&serving.failure).get_or_insert(error);
            }
            // The others end too.
            serving.link.end();
        });
        thread.inspect_err(|_| {
            self.reading.fetch_sub(1, Ordering::SeqCst);
        })
    }

    /// What a thread does, counted among those that read already.
    fn work(&self, more: &Sender<More>) -> io::Result<()> {
        let mut worker = Worker::new(self.service.clone())?;
        let mut request = Vec::new();
        let mut reply = vec![0; MAX_FRAME];
        loop {
            {
                let mut frames = lock(&self.frames);
                if self.link.is_over() || !next(&mut frames, &mut request)? {
                    return Ok(());
                }
            }
            if self.reading.fetch_sub(1, Ordering::SeqCst) == 1 {
                // It listens for as long as this thread lives.
                let _ = more.send(More(more.clone()));
            }
            self.perform(&mut worker, &mut request, &mut reply);
            self.reading.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn perform(&self, worker: &mut Worker, request: &mut [u8], reply: &mut [u8]) {
        if let Some(header) = request::header(request).filter(|header| header.opcode == PING) {
            let _ = self.link.send(&bare_reply(header.unique, 0), None);
            return;
        }
        let readable = [VolatileSlice::from(request)];
        let writable = [VolatileSlice::from(&mut *reply)];
        if let Outcome::Reply(length) = worker.serve(Pieces::new(&readable), Pieces::new(&writable)) {
            // If nobody reads it, reading will tell.
            let _ = self.link.send(reply.get(..length).unwrap_or_default(), None);
        }
    }
}
