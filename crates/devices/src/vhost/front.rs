//! The connection of a front end.

use super::state::{Change, Spec, State};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use vhost::vhost_user::BackendReqHandler;

/// Bytes of a message's header.
const HEADER: u64 = 12;

/// Why a front end is gone.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It closed its end.
    #[error("the VMM closed the connection")]
    Closed,
    /// It sent nonsense, or what this back end does not do.
    #[error("the VMM's vhost-user message: {0}")]
    Message(#[from] vhost::vhost_user::Error),
    /// It sent a part of a header, or does not read its answers.
    #[error("the VMM does not speak vhost-user")]
    Stalled,
    /// The socket.
    #[error("the VMM's socket: {0}")]
    Io(#[from] io::Error),
}

/// A connected front end (a VMM) of one device.
pub struct FrontEnd {
    handler: BackendReqHandler<Mutex<State>>,
    state: Arc<Mutex<State>>,
    stream: UnixStream,
}

impl std::fmt::Debug for FrontEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrontEnd").field("stream", &self.stream).finish_non_exhaustive()
    }
}

impl FrontEnd {
    /// Takes over a connection that a VMM made (or the other end of a socketpair that it was given).
    ///
    /// # Errors
    /// Descriptors ran out.
    pub fn new(stream: UnixStream, spec: Spec) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let state = Arc::new(Mutex::new(State::new(spec)));
        let handler = BackendReqHandler::from_stream(stream.try_clone()?, Arc::clone(&state));
        Ok(FrontEnd { handler, state, stream })
    }

    /// Handles what has come, and tells which queues started and stopped.
    ///
    /// # Errors
    /// The front end is gone, or to be dropped: call [`Self::close`] for the queues that it leaves.
    pub fn handle(&mut self) -> Result<Vec<Change>, Error> {
        while self.ready()? {
            self.handler.handle_request()?;
        }
        Ok(self.changes())
    }

    /// Whether a message is there, and room for its answer. vhost's reader would spin on half a header and its writer
    /// on a full socket; whole messages come in one piece from every VMM.
    fn ready(&self) -> Result<bool, Error> {
        let mut polled = [PollFd::new(&self.stream, PollFlags::IN | PollFlags::OUT)];
        poll(&mut polled, Some(&Timespec::default())).map_err(io::Error::from)?;
        let events = polled.first().map_or(PollFlags::empty(), PollFd::revents);
        if !events.intersects(PollFlags::IN | PollFlags::HUP) {
            return Ok(false);
        }
        match rustix::io::ioctl_fionread(&self.stream).map_err(io::Error::from)? {
            0 => Err(Error::Closed),
            HEADER.. if events.contains(PollFlags::OUT) => Ok(true),
            _ => Err(Error::Stalled),
        }
    }

    /// Stops all queues; the changes that were not told yet.
    pub fn close(&mut self) -> Vec<Change> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).stop_all();
        self.changes()
    }

    fn changes(&self) -> Vec<Change> {
        std::mem::take(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner).changes)
    }
}

impl Drop for FrontEnd {
    fn drop(&mut self) {
        self.close();
    }
}

impl AsFd for FrontEnd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
