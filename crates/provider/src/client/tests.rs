#![allow(clippy::unwrap_used)]

use super::*;
use crate::relay::stream_pair;
use kso_wire::{Errno, Family, SocketOptions, frame};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

const PATIENCE: Duration = Duration::from_millis(40);

fn liar() -> (Client, UnixStream) {
    let (one, other) = stream_pair().unwrap();
    (Client::new(one, "test", PATIENCE).unwrap(), UnixStream::from(other))
}

fn bytes(messages: &[ToBroker]) -> Vec<u8> {
    let mut bytes = Vec::new();
    messages.iter().for_each(|message| frame::append(message, &mut bytes).unwrap());
    bytes
}

fn welcome() -> ToBroker {
    let version = PROVIDE_VERSION;
    let (kernel, services, addresses) = ("Lies 1".into(), Vec::new(), Vec::new());
    ToBroker::Welcome(Welcome { version, kernel, services, addresses, session: 0 })
}

/// What becomes of a provider that says this.
fn fault(said: &[u8]) -> String {
    let (mut client, mut provider) = liar();
    let (_own, given) = stream_pair().unwrap();
    let peer = "192.0.2.1:80".parse().unwrap();
    let order =
        Connect { stream: StreamId(1), peer, family: Family::V4, port: 0, options: SocketOptions::default() };
    client.connect(order, given).unwrap();
    provider.write_all(said).unwrap();
    for _ in 0..1000 {
        match client.receive() {
            Err(fault) => return fault.to_string(),
            Ok(None) => return "nothing".into(),
            Ok(Some(_)) => {}
        }
    }
    "too much was believed".into()
}

#[test]
fn a_provider_that_lies_is_dropped_with_a_clear_reason() {
    let stream = StreamId(9);
    let local = "192.0.2.1:80".parse().unwrap();
    let ended = |stream| ToBroker::Ended { stream, bytes_in: 0, bytes_out: 0, errno: None };
    for (said, why) in [
        (bytes(&[ToBroker::Pong(1)]), "welcome first"),
        (bytes(&[welcome(), welcome()]), "welcome twice"),
        (bytes(&[welcome(), ToBroker::Connected { stream, local }]), "a stream that it does not have"),
        (bytes(&[welcome(), ended(StreamId(1))]), "a stream that it does not have"),
        (bytes(&[welcome(), ToBroker::Pong(7)]), "heartbeat"),
        (bytes(&[welcome(), ToBroker::Answered { id: 1, result: Err(Errno::EIO) }]), "was not asked"),
        (bytes(&vec![ToBroker::Draining; 500]), "welcome first"),
        (bytes(&[ToBroker::Refused("no room".into())]), "it refused: no room"),
        (vec![0xff; 64], "no message"),
        (vec![3, 0, 0, 0, 0xee, 0xee, 0xee], "no message"),
        (bytes(&[welcome(), ToBroker::Failed { stream: StreamId(1), errno: Errno::EIO }]), "nothing"),
    ] {
        assert!(fault(&said).contains(why), "{}: {why}", fault(&said));
    }
    let mut endless = bytes(&[welcome()]);
    (0..10_000).for_each(|_| endless.extend(bytes(&[ended(StreamId(1))])));
    assert!(fault(&endless).contains("does not have"));
}

#[test]
fn a_provider_that_falls_silent_is_dropped() {
    let (mut client, mut provider) = liar();
    provider.write_all(&bytes(&[welcome()])).unwrap();
    assert!(matches!(client.receive().unwrap(), Some(ToBroker::Welcome(_))));
    let mut now = Instant::now();
    for number in 1..4 {
        client.tick(now).unwrap();
        provider.write_all(&bytes(&[ToBroker::Pong(number)])).unwrap();
        assert_eq!(client.receive().unwrap(), None);
        now = client.next_deadline();
    }
    client.tick(now).unwrap();
    assert!(client.tick(now + PATIENCE / 2).is_ok());
    assert!(matches!(client.tick(now + PATIENCE), Err(Fault::Silent(_))));
    // It does not even have to say welcome for that.
    let (mut client, _provider) = liar();
    assert!(matches!(client.tick(Instant::now() + WELCOME), Err(Fault::Silent(_))));
}

#[test]
fn a_provider_that_is_gone_is_told() {
    let (mut client, mut provider) = liar();
    let mut hello = [0; 64];
    assert!(provider.read(&mut hello).unwrap() > 4);
    drop(provider);
    assert!(matches!(client.receive(), Err(Fault::Channel(ChannelError::Closed))));
}
