#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use super::*;
use crate::testing::{friends, greet, output, strangers};
use proptest::prelude::*;

#[test]
fn a_session_is_resumed() {
    let (mut one, mut other) = strangers();
    greet(&mut one, &mut other).unwrap();
    // Other tests share the client's memory: of several, those after the first are resumed at the latest.
    let resumed = (0..4).filter(|_| {
        let (mut one, mut other) = strangers();
        greet(&mut one, &mut other).unwrap();
        one.is_resumed() && other.is_resumed()
    });
    assert!(resumed.count() > 0);
}

#[test]
fn each_direction_ends_on_its_own() {
    let (mut one, mut other) = friends();
    let mut plain = Vec::new();
    one.send(b"last words").unwrap();
    one.end();
    other.receive(&output(&mut one), &mut plain).unwrap();
    assert_eq!((plain.as_slice(), other.has_ended(), one.has_ended()), (&b"last words"[..], true, false));
    plain.clear();
    other.send(b"an answer, later").unwrap();
    one.receive(&output(&mut other), &mut plain).unwrap();
    assert_eq!((plain.as_slice(), one.has_ended()), (&b"an answer, later"[..], false));
    other.end();
    one.receive(&output(&mut other), &mut plain).unwrap();
    assert!(one.has_ended());
}

#[test]
fn what_follows_an_end_is_dropped() {
    let (mut one, mut other) = friends();
    one.end();
    let mut wire = output(&mut one);
    wire.extend_from_slice(b"whatever comes now");
    let mut plain = Vec::new();
    other.receive(&wire, &mut plain).unwrap();
    other.receive(b"and later", &mut plain).unwrap();
    assert!(plain.is_empty() && other.has_ended());
}

#[test]
fn nonsense_breaks_it_and_is_answered_by_an_alert() {
    for nonsense in [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], &[0x16, 3, 1, 0xff, 0xff, 1, 2, 3], &[0; 64]]
    {
        let (_, mut server) = strangers();
        let mut plain = Vec::new();
        let broken = server.receive(nonsense, &mut plain).unwrap_err();
        assert!(matches!(broken, Broken::Tls(_)), "{broken}");
        assert!(server.has_output() && plain.is_empty());
    }
}

/// Feeds `wire` in pieces of these sizes, over and over.
fn feed(to: &mut Engine, wire: &[u8], sizes: &[usize], plain: &mut Vec<u8>) -> Result<(), Broken> {
    let (mut rest, mut sizes) = (wire, sizes.iter().cycle());
    while !rest.is_empty() {
        let (piece, more) = rest.split_at((*sizes.next().unwrap()).min(rest.len()));
        to.receive(piece, plain)?;
        rest = more;
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn however_it_is_cut_the_bytes_are_the_same(
        writes in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40_000), 0..6),
        pieces in proptest::collection::vec(1_usize..30_000, 1..8),
        from_client in any::<bool>(),
    ) {
        let (client, server) = friends();
        let (mut one, mut other) = if from_client { (client, server) } else { (server, client) };
        let mut wire = Vec::new();
        for write in &writes {
            one.send(write).unwrap();
            wire.extend(output(&mut one));
        }
        one.end();
        wire.extend(output(&mut one));
        let mut plain = Vec::new();
        feed(&mut other, &wire, &pieces, &mut plain).unwrap();
        prop_assert_eq!(plain, writes.concat());
        prop_assert!(other.has_ended());
    }

    #[test]
    fn what_is_cut_off_never_looks_ended(
        bytes in proptest::collection::vec(any::<u8>(), 0..50_000),
        cut in any::<proptest::sample::Index>(),
        pieces in proptest::collection::vec(1_usize..5_000, 1..8),
    ) {
        let (mut one, mut other) = friends();
        one.send(&bytes).unwrap();
        one.end();
        let wire = output(&mut one);
        let cut = cut.index(wire.len());
        let mut plain = Vec::new();
        feed(&mut other, &wire[..cut], &pieces, &mut plain).unwrap();
        prop_assert!(!other.has_ended());
        prop_assert_eq!(&plain[..], &bytes[..plain.len()]);
    }

    #[test]
    fn what_is_changed_on_the_way_breaks_it(
        bytes in proptest::collection::vec(any::<u8>(), 1..50_000),
        changed in any::<proptest::sample::Index>(),
        bit in 0_u8..8,
    ) {
        let (mut one, mut other) = friends();
        one.send(&bytes).unwrap();
        one.end();
        let mut wire = output(&mut one);
        let changed = changed.index(wire.len());
        wire[changed] ^= 1 << bit;
        let mut plain = Vec::new();
        // A length that grew makes it wait for more; the version of a record means nothing (RFC 8446, 5.1).
        let received = other.receive(&wire, &mut plain);
        prop_assert!(plain.len() <= bytes.len());
        prop_assert_eq!(&plain[..], &bytes[..plain.len()]);
        prop_assert!(received.is_err() || !other.has_ended() || plain.len() == bytes.len());
    }
}
