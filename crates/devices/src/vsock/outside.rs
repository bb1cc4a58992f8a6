//! What the device asks of the world outside.

use kso_wire::Errno;
use kso_wire::guest::StreamKey;
use std::os::fd::{BorrowedFd, OwnedFd};

/// Names a guest of a hub.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GuestId(pub u32);

/// What shall become of a REQUEST.
#[derive(Debug)]
pub enum Verdict {
    /// This non-blocking stream socket, whose connection is under way or up: RESPONSE once it is up.
    Socket(OwnedFd),
    /// The control stream: its bytes go to [`Outside::control`].
    Control,
    /// A listener of a guest of the same hub (or of the same guest): joined memory to memory. The key is the stream's name
    /// in that guest.
    Guest(GuestId, StreamKey),
    /// RST.
    Refused(Errno),
}

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// Bytes that the guest sent.
    pub bytes_out: u64,
    /// Bytes that the guest was given.
    pub bytes_in: u64,
    /// The error of the socket outside, if it broke.
    pub errno: Option<Errno>,
}

/// The broker, as the device sees it. Nothing here waits, and nothing here calls the hub.
///
/// ```text
///   request -> Verdict::Socket  -> established -> ended      the guest connects
///                               -> failed
///           -> Verdict::Guest   -> established (in both guests) -> ended (each)
///                               -> failed
///           -> Verdict::Control -> control, control_output -> ended
///           -> Verdict::Refused
///   Hub::dial                   -> established -> ended      the guest is connected to
///                               -> rejected
/// ```
///
/// After [`Self::gone`] none of these comes for what the guest had.
pub trait Outside {
    /// The guest connects. What it wrote to the control stream before has been given to [`Self::control`]. A second
    /// request for a stream that is not up yet takes the place of the first, of which nothing more is told.
    fn request(&mut self, guest: GuestId, stream: StreamKey) -> Verdict;

    /// A connection that [`Self::request`] began is up, or the guest took one that was dialled. Called before
    /// RESPONSE is written. There is no socket if the other end is a guest.
    fn established(&mut self, guest: GuestId, stream: StreamKey, socket: Option<BorrowedFd<'_>>);

    /// A connection that [`Self::request`] began failed; or it could not be asked for, as the guest has too many
    /// streams (ENOBUFS). Called before RST is written. ECONNRESET: the guest itself took it back.
    fn failed(&mut self, guest: GuestId, stream: StreamKey, errno: Errno);

    /// The guest did not take a stream that was dialled: no listener, or its queue is full. The socket comes back.
    fn rejected(&mut self, guest: GuestId, stream: StreamKey, socket: OwnedFd);

    /// A stream that was dialled has another name: its VMM gave it one. Called before [`Self::established`].
    fn renamed(&mut self, _guest: GuestId, _from: StreamKey, _to: StreamKey) {}

    /// An established stream, or the control stream, is over. If it broke: called before RST is written. EPROTO: the
    /// guest broke the rules; ENOBUFS: it sent more than is held for all its streams whose far ends are slow. What it
    /// sent before it closed may still be on its way.
    fn ended(&mut self, guest: GuestId, stream: StreamKey, end: End);

    /// What came of [`super::Hub::send_file`]: so many bytes were sent (fewer than asked for: the file ends there, it was stopped, or
    /// there is no room), or none and the guest's own kernel may try. Called before [`Self::ended`]. EOPNOTSUPP: the guest has no
    /// files that are sent from.
    fn sent(&mut self, _guest: GuestId, _ticket: u64, _result: Result<Option<u64>, Errno>) {}

    /// Bytes of the guest's control stream. An error drops it, and all streams of the guest.
    ///
    /// # Errors
    /// They are no messages.
    fn control(&mut self, guest: GuestId, bytes: &[u8]) -> Result<(), String>;

    /// What is to be written to the guest's control stream: the device takes from its front what the guest has room
    /// for. Looked at after each of the calls above, and when the hub is told to flush.
    fn control_output(&mut self, guest: GuestId) -> Option<&mut Vec<u8>>;

    /// The guest's device was reset, or its VMM is gone: nothing of it is left.
    fn gone(&mut self, guest: GuestId);
}
