//! What a provider was asked, and so what it may say. Pure.
//!
//! ```text
//!   stream    connect --> asked -- Connected --> live -- Ended --> forgotten
//!                           +-- Failed --> forgotten
//!             offer --> offered -- Accepted --> live
//!             share --> wanted -- Shared --> live
//!                           +-- Failed --> forgotten
//!   listener  listen --> asked -- Listening --> listening -- unlisten --> closing -- Unlistened --> forgotten
//!                           +-- NotListening, also later --> forgotten
//! ```
//!
//! Every message answers something, so a provider that sends without end is found out by the first that does not.

use kso_wire::provide::{ListenerId, StreamId, ToBroker, Welcome};
use std::collections::{HashMap, HashSet};

/// What cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lie {
    /// Something before Welcome.
    #[error("it did not say welcome first")]
    Early,
    /// Welcome again.
    #[error("it said welcome twice")]
    Twice,
    /// About a stream that it does not have.
    #[error("it spoke of a stream that it does not have in this way")]
    Stream,
    /// About a listener that it does not have.
    #[error("it spoke of a listener that it does not have in this way")]
    Listener,
    /// An answer to no question.
    #[error("it answered what it was not asked")]
    Answer,
    /// A heartbeat that was not asked for.
    #[error("it answered a heartbeat that it was not asked for")]
    Pong,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stream {
    Asked,
    Offered(ListenerId),
    Wanted,
    Live,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Listener {
    Asked,
    Listening,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Ledger {
    welcome: Option<Welcome>,
    streams: HashMap<StreamId, Stream>,
    listeners: HashMap<ListenerId, Listener>,
    closing: HashSet<ListenerId>,
    offered: usize,
    draining: bool,
}

impl Ledger {
    /// What it said of itself.
    #[must_use]
    pub fn welcome(&self) -> Option<&Welcome> {
        self.welcome.as_ref()
    }

    /// Connections, directories among them, and listeners.
    #[must_use]
    pub fn load(&self) -> (usize, usize) {
        (self.streams.len() - self.offered, self.listeners.len())
    }

    /// It is asked to connect.
    pub fn connect(&mut self, stream: StreamId) {
        self.streams.insert(stream, Stream::Asked);
    }

    /// It is asked for a directory.
    pub fn share(&mut self, stream: StreamId) {
        self.streams.insert(stream, Stream::Wanted);
    }

    /// It is asked to listen.
    pub fn listen(&mut self, listener: ListenerId) {
        self.listeners.insert(listener, Listener::Asked);
    }

    /// It is given a stream.
    pub fn offer(&mut self, listener: ListenerId, stream: StreamId) {
        self.streams.insert(stream, Stream::Offered(listener));
        self.offered += 1;
    }

    /// It is asked to close a listener. False: there is none.
    pub fn unlisten(&mut self, listener: ListenerId) -> bool {
        self.listeners.contains_key(&listener) && self.closing.insert(listener)
    }

    /// Whether it may say this; and notes it.
    ///
    /// # Errors
    /// It may not.
    pub fn check(&mut self, message: &ToBroker) -> Result<(), Lie> {
        if let ToBroker::Welcome(welcome) = message {
            return match self.welcome.replace(welcome.clone()) {
                None => Ok(()),
                Some(_) => Err(Lie::Twice),
            };
        }
        if self.welcome.is_none() {
            return Err(Lie::Early);
        }
        match *message {
            ToBroker::Connected { stream, .. } => match self.streams.get_mut(&stream) {
                Some(state @ Stream::Asked) => {
                    *state = Stream::Live;
                    Ok(())
                }
                _ => Err(Lie::Stream),
            },
            ToBroker::Shared { stream } => match self.streams.get_mut(&stream) {
                Some(state @ Stream::Wanted) => {
                    *state = Stream::Live;
                    Ok(())
                }
                _ => Err(Lie::Stream),
            },
            ToBroker::Failed { stream, .. } => match self.streams.remove(&stream) {
                Some(Stream::Asked | Stream::Wanted) => Ok(()),
                Some(Stream::Offered(_)) => {
                    self.offered -= 1;
                    Ok(())
                }
                _ => Err(Lie::Stream),
            },
            ToBroker::Ended { stream, .. } => match self.streams.remove(&stream) {
                Some(Stream::Live) => Ok(()),
                _ => Err(Lie::Stream),
            },
            ToBroker::Accepted { listener, stream, .. } => match self.streams.get_mut(&stream) {
                Some(state) if *state == Stream::Offered(listener) => {
                    *state = Stream::Live;
                    self.offered -= 1;
                    Ok(())
                }
                _ => Err(Lie::Stream),
            },
            ToBroker::Listening { listener, .. } => match self.listeners.get_mut(&listener) {
                Some(state @ Listener::Asked) => {
                    *state = Listener::Listening;
                    Ok(())
                }
                _ => Err(Lie::Listener),
            },
            ToBroker::NotListening { listener, .. } => match self.listeners.remove(&listener) {
                Some(_) => {
                    self.withdraw(listener);
                    Ok(())
                }
                None => Err(Lie::Listener),
            },
            ToBroker::Unlistened(listener) => {
                if !self.closing.remove(&listener) {
                    return Err(Lie::Listener);
                }
                self.listeners.remove(&listener);
                self.withdraw(listener);
                Ok(())
            }
            ToBroker::Draining if !self.draining => {
                self.draining = true;
                Ok(())
            }
            // Its number is the client's to check.
            ToBroker::Pong(_) => Ok(()),
            ToBroker::Answered { .. } | ToBroker::Draining | ToBroker::Refused(_) | ToBroker::Welcome(_) => {
                Err(Lie::Answer)
            }
        }
    }

    fn withdraw(&mut self, listener: ListenerId) {
        let before = self.streams.len();
        self.streams.retain(|_, state| *state != Stream::Offered(listener));
        self.offered -= before - self.streams.len();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use kso_wire::Errno;
    use proptest::prelude::*;

    fn welcome() -> ToBroker {
        let (kernel, services, addresses) = ("Linux 6".into(), Vec::new(), Vec::new());
        ToBroker::Welcome(Welcome { version: 1, kernel, services, addresses, session: 0 })
    }

    fn local() -> std::net::SocketAddr {
        "192.0.2.1:80".parse().unwrap()
    }

    #[test]
    fn a_provider_that_answers_what_it_was_asked_is_believed() {
        let mut ledger = Ledger::default();
        ledger.check(&welcome()).unwrap();
        let (stream, other, listener) = (StreamId(1), StreamId(2), ListenerId(1));
        ledger.connect(stream);
        ledger.check(&ToBroker::Connected { stream, local: local() }).unwrap();
        ledger.listen(listener);
        ledger.check(&ToBroker::Listening { listener, local: local() }).unwrap();
        ledger.offer(listener, other);
        assert_eq!(ledger.load(), (1, 1));
        let accepted = ToBroker::Accepted { listener, stream: other, peer: local(), local: local() };
        ledger.check(&accepted).unwrap();
        assert_eq!(ledger.check(&accepted), Err(Lie::Stream), "once");
        assert!(ledger.unlisten(listener));
        assert!(!ledger.unlisten(listener));
        ledger.check(&ToBroker::Unlistened(listener)).unwrap();
        assert_eq!(ledger.check(&ToBroker::Unlistened(listener)), Err(Lie::Listener));
        for stream in [stream, other] {
            let ended = ToBroker::Ended { stream, bytes_in: 0, bytes_out: 0, errno: None };
            ledger.check(&ended).unwrap();
            assert_eq!(ledger.check(&ended), Err(Lie::Stream));
        }
        assert_eq!(ledger.load(), (0, 0));
    }

    #[test]
    fn a_directory_is_no_connection() {
        let mut ledger = Ledger::default();
        ledger.check(&welcome()).unwrap();
        let (stream, other) = (StreamId(1), StreamId(2));
        ledger.share(stream);
        ledger.share(other);
        ledger.check(&ToBroker::Shared { stream }).unwrap();
        assert_eq!(ledger.check(&ToBroker::Shared { stream }), Err(Lie::Stream), "once");
        ledger.check(&ToBroker::Failed { stream: other, errno: Errno::EACCES }).unwrap();
        ledger.check(&ToBroker::Ended { stream, bytes_in: 0, bytes_out: 0, errno: None }).unwrap();
        assert_eq!(ledger.load(), (0, 0));
        ledger.share(StreamId(3));
        let connected = ToBroker::Connected { stream: StreamId(3), local: local() };
        assert_eq!(ledger.check(&connected), Err(Lie::Stream));
        ledger.connect(StreamId(4));
        assert_eq!(ledger.check(&ToBroker::Shared { stream: StreamId(4) }), Err(Lie::Stream));
    }

    #[test]
    fn both_sides_may_end_a_listener_at_once() {
        let mut ledger = Ledger::default();
        ledger.check(&welcome()).unwrap();
        let listener = ListenerId(1);
        ledger.listen(listener);
        ledger.check(&ToBroker::Listening { listener, local: local() }).unwrap();
        ledger.offer(listener, StreamId(9));
        assert!(ledger.unlisten(listener));
        ledger.check(&ToBroker::NotListening { listener, errno: Errno::EIO }).unwrap();
        ledger.check(&ToBroker::Unlistened(listener)).unwrap();
        assert_eq!(ledger.load(), (0, 0));
    }

    fn said() -> impl Strategy<Value = ToBroker> {
        let stream = || (0_u64..4).prop_map(StreamId);
        let listener = || (0_u64..3).prop_map(ListenerId);
        prop_oneof![
            Just(welcome()),
            stream().prop_map(|stream| ToBroker::Connected { stream, local: local() }),
            stream().prop_map(|stream| ToBroker::Failed { stream, errno: Errno::EIO }),
            stream().prop_map(|stream| ToBroker::Shared { stream }),
            stream().prop_map(|stream| ToBroker::Ended { stream, bytes_in: 0, bytes_out: 0, errno: None }),
            listener().prop_map(|listener| ToBroker::Listening { listener, local: local() }),
            listener().prop_map(|listener| ToBroker::NotListening { listener, errno: Errno::EIO }),
            listener().prop_map(ToBroker::Unlistened),
            (listener(), stream()).prop_map(|(listener, stream)| ToBroker::Accepted {
                listener,
                stream,
                peer: local(),
                local: local()
            }),
        ]
    }

    proptest! {
        #[test]
        fn whatever_is_said_the_counts_hold(steps in proptest::collection::vec((0_u8..6, said()), 0..64)) {
            let mut ledger = Ledger::default();
            for (index, (step, said)) in steps.into_iter().enumerate() {
                let fresh = index as u64;
                match step {
                    0 => ledger.connect(StreamId(fresh)),
                    1 => ledger.listen(ListenerId(fresh)),
                    2 => ledger.offer(ListenerId(fresh % 3), StreamId(fresh)),
                    3 => { ledger.unlisten(ListenerId(fresh % 3)); }
                    4 => ledger.share(StreamId(fresh)),
                    // A lie is final.
                    _ if ledger.check(&said).is_err() => return Ok(()),
                    _ => {}
                }
                let offered = ledger.streams.values().filter(|one| matches!(one, Stream::Offered(_))).count();
                prop_assert_eq!(ledger.offered, offered);
            }
        }
    }
}
