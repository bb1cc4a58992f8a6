#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use super::*;
use crate::testing::{friends, output};
use kso_provider::relay::stream_pair;
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;

/// A tunnel, the end of its socket pair, and the other side: its engine and its TCP socket.
struct Rig {
    tunnel: Tunnel,
    inner: UnixStream,
    far: TcpStream,
    engine: Engine,
    scratch: Scratch,
    fate: Arc<Fate>,
}

fn rig() -> Rig {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (near, _) = listener.accept().unwrap();
    near.set_nonblocking(true).unwrap();
    far.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let (engine, own) = friends();
    let (inner, given) = stream_pair().unwrap();
    let fate = Arc::new(Fate::default());
    let tunnel = Tunnel::new(near.into(), own, given, Vec::new()).telling(Some(Arc::clone(&fate)));
    Rig { tunnel, inner: inner.into(), far, engine, scratch: Scratch::default(), fate }
}

impl Rig {
    /// Runs until there is nothing to do; the descriptors count as ready.
    fn run(&mut self) -> Step {
        let all = epoll::EventFlags::IN | epoll::EventFlags::OUT;
        self.tunnel.ready(Side::Tcp, all);
        self.tunnel.ready(Side::Inner, all);
        loop {
            match self.tunnel.run(&mut self.scratch) {
                Step::Again => {}
                step => return step,
            }
        }
    }

    /// Runs it until it ends.
    fn end(&mut self) -> Step {
        for _ in 0..2000 {
            match self.run() {
                Step::Wait => std::thread::sleep(Duration::from_millis(5)),
                step => return step,
            }
        }
        panic!("it does not end");
    }

    fn far_sends(&mut self) {
        let wire = output(&mut self.engine);
        self.far.write_all(&wire).unwrap();
    }

    /// What the other side gets, until it is told the end.
    fn far_reads(&mut self) -> Vec<u8> {
        let (mut plain, mut bytes) = (Vec::new(), [0; 4096]);
        while !self.engine.has_ended() {
            let count = self.far.read(&mut bytes).unwrap();
            assert_ne!(count, 0, "cut off");
            self.engine.receive(&bytes[..count], &mut plain).unwrap();
        }
        plain
    }
}

/// What comes by the socket pair, until it is shut down or closed.
fn read_all(inner: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    inner.set_nonblocking(false).unwrap();
    inner.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    inner.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn both_directions_end_in_order() {
    let mut rig = rig();
    rig.inner.write_all(b"question").unwrap();
    rig.inner.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(matches!(rig.run(), Step::Wait));
    assert_eq!(rig.far_reads(), b"question");
    rig.engine.send(b"answer").unwrap();
    rig.engine.end();
    rig.far_sends();
    assert!(matches!(rig.end(), Step::Over));
    assert_eq!(read_all(&mut rig.inner), b"answer");
    assert_eq!(rig.fate.get(), None);
}

#[test]
fn an_inner_end_that_is_closed_early_cuts_the_connection() {
    for shut in [false, true] {
        let mut rig = rig();
        rig.inner.write_all(b"words").unwrap();
        if shut {
            rig.inner.shutdown(std::net::Shutdown::Write).unwrap();
            assert!(matches!(rig.run(), Step::Wait));
        }
        let (inner, _unused) = UnixStream::pair().unwrap();
        drop(std::mem::replace(&mut rig.inner, inner));
        // As epoll would tell.
        rig.tunnel.ready(Side::Inner, epoll::EventFlags::HUP);
        assert!(matches!(rig.end(), Step::Broken(Broken::Local)));
        let Rig { tunnel, mut far, mut engine, .. } = rig;
        drop(tunnel);
        let (mut wire, mut plain) = (Vec::new(), Vec::new());
        far.read_to_end(&mut wire).unwrap();
        engine.receive(&wire, &mut plain).unwrap();
        // What was said before has come; that it was all is said only when it was.
        assert_eq!((plain.as_slice(), engine.has_ended()), (&b"words"[..], shut));
    }
}

#[test]
fn a_connection_that_is_cut_closes_the_inner_end_early() {
    let mut rig = rig();
    rig.engine.send(b"all that came").unwrap();
    let wire = output(&mut rig.engine);
    rig.far.write_all(&wire).unwrap();
    // A record that is not whole.
    rig.engine.send(b"more").unwrap();
    let wire = output(&mut rig.engine);
    rig.far.write_all(&wire[..wire.len() - 1]).unwrap();
    rig.far.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(matches!(rig.end(), Step::Broken(Broken::Truncated)));
    let Rig { tunnel, mut inner, fate, .. } = rig;
    drop(tunnel);
    assert_eq!(read_all(&mut inner), b"all that came");
    assert!(has_hung_up(inner.as_fd()), "closed, not shut down");
    assert_eq!(fate.get().as_deref(), Some("the connection was closed"));
}

#[test]
fn who_does_not_read_is_not_read_from() {
    let mut rig = rig();
    let mut sent = 0_usize;
    let chunk = vec![7; 256 << 10];
    rig.far.set_nonblocking(true).unwrap();
    let mut wire = Vec::new();
    // Until TCP itself is full: nobody reads the socket pair.
    let mut full = 0;
    while full < 20 {
        if wire.is_empty() {
            rig.engine.send(&chunk).unwrap();
            wire = output(&mut rig.engine);
        }
        match rig.far.write(&wire) {
            Ok(count) => {
                wire.drain(..count);
                sent += count;
                full = 0;
            }
            Err(_) => {
                full += 1;
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        assert!(matches!(rig.run(), Step::Wait));
        assert!(rig.tunnel.waiting.len() <= READ, "bounded");
        assert!(sent < 256 << 20, "there is no end to it");
    }
    // All of it comes when it is read.
    let mut left = sent / (chunk.len() + 4096) * chunk.len();
    let mut bytes = vec![0; 64 << 10];
    while left > 0 {
        assert!(matches!(rig.run(), Step::Wait));
        match rig.inner.read(&mut bytes) {
            Ok(count) => {
                assert!(bytes[..count].iter().all(|byte| *byte == 7));
                left = left.saturating_sub(count);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => panic!("{error}"),
        }
    }
}
