//! An answer of a name server: what the broker learns from it.
#![no_main]

use kso_broker::dns::observe;
use kso_core::names::NameMemory;
use libfuzzer_sys::fuzz_target;
use std::time::{Duration, Instant};

fuzz_target!(|message: &[u8]| {
    let Ok(observed) = observe(message) else { return };
    assert!(!observed.names.is_empty(), "the name that was asked is one of them");
    assert!(observed.names.len() <= 32 && observed.addresses.len() <= 256);
    let now = Instant::now();
    let mut memory = NameMemory::new(64);
    for (address, life) in &observed.addresses {
        assert!(*life <= Duration::from_secs(u32::MAX.into()));
        for name in &observed.names {
            memory.remember(name, &[*address], *life, now);
        }
    }
    assert!(memory.len() <= 64);
});
