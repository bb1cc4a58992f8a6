//! Messages from a runner and from a broker, of a sandbox and of a guest. The first byte says which.
//!
//! What is read keeps every bound, can be written, and is then read as the same.
#![no_main]

use kso_wire::codec::Bounded;
use kso_wire::guest::{ToGuest, ToHost};
use kso_wire::{ToBroker, ToRunner, decode, encode};
use libfuzzer_sys::fuzz_target;

fn check<M>(bytes: &[u8])
where
    M: serde::Serialize + serde::de::DeserializeOwned + Bounded + PartialEq + std::fmt::Debug,
{
    let Ok(message) = decode::<M>(bytes) else { return };
    assert_eq!(message.over_bound(), None);
    let written = encode(&message).expect("what was read can be written");
    assert!(written.len() <= bytes.len(), "writing is the shortest form");
    assert_eq!(decode::<M>(&written).expect("what was written can be read"), message);
}

fuzz_target!(|bytes: &[u8]| {
    let Some((direction, bytes)) = bytes.split_first() else { return };
    match direction % 4 {
        0 => check::<ToBroker>(bytes),
        1 => check::<ToRunner>(bytes),
        2 => check::<ToHost>(bytes),
        _ => check::<ToGuest>(bytes),
    }
});
