//! What a provider says to its broker, and a broker to its provider. The first byte says which.
//!
//! A broker believes a provider that lies no more than what it asked: its ledger holds, and whatever is read can be written
//! and read again.
#![no_main]

use kso_provider::client::Ledger;
use kso_wire::codec::Bounded;
use kso_wire::frame::{self, Frames};
use kso_wire::provide::{ListenerId, StreamId, ToBroker, ToProvider};
use libfuzzer_sys::fuzz_target;

fn check<M>(bytes: &[u8], mut each: impl FnMut(M) -> bool)
where
    M: serde::Serialize + serde::de::DeserializeOwned + Bounded + PartialEq + std::fmt::Debug,
{
    let mut frames = Frames::default();
    // As it comes off a socket: in pieces.
    for piece in bytes.chunks(7) {
        frames.push(piece);
        while let Ok(Some(message)) = frames.next_message::<M>() {
            assert_eq!(message.over_bound(), None);
            let mut written = Vec::new();
            frame::append(&message, &mut written).expect("what was read can be written");
            let mut again = Frames::default();
            again.push(&written);
            assert_eq!(again.next_message::<M>().expect("what was written can be read").as_ref(), Some(&message));
            if !each(message) {
                return;
            }
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((direction, bytes)) = bytes.split_first() else { return };
    if direction & 1 == 0 {
        return check::<ToProvider>(bytes, |_| true);
    }
    let mut ledger = Ledger::default();
    ledger.connect(StreamId(1));
    ledger.listen(ListenerId(1));
    ledger.offer(ListenerId(1), StreamId(2));
    ledger.share(StreamId(3));
    check::<ToBroker>(bytes, |message| {
        let believed = ledger.check(&message).is_ok();
        let (streams, listeners) = ledger.load();
        assert!(!believed || streams <= 3 && listeners <= 1);
        believed
    });
});
