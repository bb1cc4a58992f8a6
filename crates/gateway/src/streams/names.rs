//! Queries for names by TCP: each message has its length before it (RFC 1035, 4.2.2), and several may be under
//! way on a connection, answered in any order (RFC 7766).

use super::relay::Moved;
use super::stack::End;
use crate::packet::u16_at;
use smoltcp::socket::tcp::State;

/// Queries of one connection that are under way.
const MAX_WAITING: usize = 16;
/// Answers of one connection that were not sent yet, bytes.
const MAX_ANSWERS: usize = 256 << 10;

/// What a connection asked and is to be told.
#[derive(Debug, Default)]
pub struct Names {
    questions: Vec<u8>,
    answers: Vec<u8>,
    waiting: usize,
    closed: bool,
}

impl Names {
    /// Moves bytes; each whole query is given to `ask`, which is to be answered by [`Self::answer`].
    pub fn relay(&mut self, end: &mut End, mut ask: impl FnMut(Vec<u8>)) -> Moved {
        let socket = end.socket();
        let mut moved = false;
        while let Some(length) = self.next_length(socket.can_recv()) {
            if self.questions.len() < length {
                let wanted = length - self.questions.len();
                let read = socket.recv(|bytes| {
                    let take = bytes.get(..wanted.min(bytes.len())).unwrap_or_default();
                    self.questions.extend_from_slice(take);
                    (take.len(), take.len())
                });
                if !matches!(read, Ok(1..)) {
                    break;
                }
                moved = true;
            } else if length > 2 {
                let rest = self.questions.split_off(2);
                self.questions.clear();
                self.waiting += 1;
                ask(rest);
            }
        }
        if !self.answers.is_empty()
            && socket.can_send()
            && let Ok(sent) = socket.send_slice(&self.answers)
        {
            self.answers.drain(..sent);
            moved |= sent > 0;
        }
        let finished = matches!(socket.state(), State::CloseWait | State::LastAck);
        if finished && !socket.can_recv() && self.waiting == 0 && self.answers.is_empty() && !self.closed {
            self.closed = true;
            socket.close();
            moved = true;
        }
        match socket.state() {
            State::Closed | State::TimeWait => Moved::Over,
            _ if moved => Moved::Some,
            _ => Moved::None,
        }
    }

    /// How many bytes of questions are wanted: those of the length, or those and the message. `None`: no more now.
    fn next_length(&self, more: bool) -> Option<usize> {
        if self.waiting >= MAX_WAITING || self.answers.len() >= MAX_ANSWERS {
            return None;
        }
        let length = match u16_at(&self.questions, 0) {
            // An empty message is no query, and its length is read over.
            Some(length) => 2 + usize::from(length).max(1),
            None => 2,
        };
        (more || self.questions.len() >= length && length > 2).then_some(length)
    }

    /// An answer came.
    pub fn answer(&mut self, message: &[u8]) {
        self.waiting = self.waiting.saturating_sub(1);
        if let Ok(length) = u16::try_from(message.len()) {
            self.answers.extend_from_slice(&length.to_be_bytes());
            self.answers.extend_from_slice(message);
        }
    }
}
