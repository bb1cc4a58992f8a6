#![allow(clippy::unwrap_used)]

use super::*;
use std::io::{Read, Write};
use std::net::{Shutdown as Direction, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;

/// The program's TCP socket, the pair, the provider's end of the stream.
fn joined() -> (TcpStream, Pair, UnixStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (near, _) = listener.accept().unwrap();
    near.set_nonblocking(true).unwrap();
    let (own, other) = stream_pair().unwrap();
    let other = UnixStream::from(other);
    other.set_nonblocking(false).unwrap();
    (far, Pair::new(near.into(), own), other)
}

/// Runs a pair until it waits; everything may be ready.
fn run(pair: &mut Pair) -> Step {
    let mut scratch = vec![0; BUFFER];
    for side in [Side::Tcp, Side::Stream] {
        pair.ready(side, epoll::EventFlags::IN | epoll::EventFlags::OUT);
    }
    loop {
        match pair.run(&mut scratch) {
            Step::Again => {}
            other => return other,
        }
    }
}

#[test]
fn bytes_and_ends_pass_in_both_directions() {
    let (mut far, mut pair, mut other) = joined();
    far.write_all(b"question").unwrap();
    far.shutdown(Direction::Write).unwrap();
    assert_eq!(run(&mut pair), Step::Wait);
    let mut text = String::new();
    other.read_to_string(&mut text).unwrap();
    assert_eq!(text, "question");
    other.write_all(b"answer").unwrap();
    other.shutdown(Direction::Write).unwrap();
    assert_eq!(run(&mut pair), Step::Over(End { bytes_in: 8, bytes_out: 6, errno: None }));
    drop(pair);
    text.clear();
    far.read_to_string(&mut text).unwrap();
    assert_eq!(text, "answer");
}

#[test]
fn a_stream_that_closes_early_resets_the_connection() {
    for shut_before in [false, true] {
        let (mut far, mut pair, other) = joined();
        if shut_before {
            far.shutdown(Direction::Write).unwrap();
            assert_eq!(run(&mut pair), Step::Wait);
        }
        drop(other);
        let step = run(&mut pair);
        if shut_before {
            // It may be an orderly end: who must know asks for the word.
            assert!(matches!(step, Step::Over(End { errno: None, .. })), "{step:?}");
        } else {
            assert!(matches!(step, Step::Over(End { errno: Some(Errno::ECONNRESET), .. })), "{step:?}");
            drop(pair);
            let error = far.read(&mut [0; 8]).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
    }
}

#[test]
fn an_end_that_may_be_a_death_waits_for_the_word() {
    for (word, expected) in [(None, None), (Some(Errno::ETIMEDOUT), Some(Errno::ETIMEDOUT))] {
        let (far, pair, other) = joined();
        let Pair { tcp, stream, .. } = pair;
        let mut pair = Pair::strict(tcp, stream);
        far.shutdown(Direction::Write).unwrap();
        assert_eq!(run(&mut pair), Step::Wait);
        drop(other);
        assert_eq!(run(&mut pair), Step::Wait);
        pair.told(word);
        assert!(matches!(run(&mut pair), Step::Over(End { errno, .. }) if errno == expected));
    }
}

#[test]
fn a_reset_connection_closes_the_stream_early() {
    let (far, mut pair, other) = joined();
    reset(far.into());
    assert!(matches!(run(&mut pair), Step::Over(End { errno: Some(Errno::ECONNRESET), .. })));
    drop(pair);
    assert!(has_hung_up(other.as_fd()));
}

#[test]
fn a_writer_that_is_full_holds_the_reader_back() {
    let (mut far, mut pair, mut other) = joined();
    far.set_nonblocking(true).unwrap();
    let chunk = vec![7; 1 << 20];
    let mut sent = 0;
    for _ in 0..64 {
        match far.write(&chunk) {
            Ok(count) => sent += count,
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
        assert_eq!(run(&mut pair), Step::Wait);
    }
    assert!(sent < 32 << 20, "what nobody reads is not gathered: {sent}");
    assert!(pair.inward.waiting.len() <= BUFFER);
    far.shutdown(Direction::Write).unwrap();
    let mut got = 0;
    let mut buffer = vec![0; 1 << 20];
    loop {
        run(&mut pair);
        match other.read(&mut buffer).unwrap() {
            0 => break,
            count => got += count,
        }
    }
    assert_eq!(got, sent);
}
