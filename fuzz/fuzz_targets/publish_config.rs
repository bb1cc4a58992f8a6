//! Texts that users and files give: `-p`, `kso.toml`, `/etc/hosts`, a line of `kso trace --json`. The first
//! byte says which.
#![no_main]

use kso_core::config::Config;
use kso_core::event::Event;
use kso_core::names::NameMemory;
use kso_core::publish;
use libfuzzer_sys::fuzz_target;
use std::time::Instant;

fn publication(text: &str) {
    match publish::parse(text) {
        Ok(publication) => {
            let written = publish::text(&publication);
            assert_eq!(publish::parse(&written).expect("what was written can be read"), publication);
            assert_eq!((publication.outer_port == 0), (publication.inner_port == 0));
        }
        Err(error) => {
            let error = error.to_string();
            assert!(!error.chars().any(|c| c.is_control() && c != '\n'), "{error:?}");
        }
    }
}

fn configuration(text: &str) {
    match Config::parse(text) {
        Ok(config) => drop(config.policy().expect("its rules were read")),
        Err(error) => drop(error.to_string()),
    }
}

fn hosts(text: &str) {
    let mut memory = NameMemory::new(8);
    memory.load_hosts(text);
    for word in text.split_ascii_whitespace().take(20) {
        for address in memory.addresses_of(word) {
            let mut names = Vec::new();
            memory.names_of(*address, Instant::now(), &mut names);
            assert!(!names.is_empty(), "each address of a name has the name");
        }
    }
}

fn event(text: &str) {
    let Ok(event) = serde_json::from_str::<Event>(text) else { return };
    let line = event.to_string();
    assert!(!line.chars().any(char::is_control), "{line:?}");
    let written = serde_json::to_string(&event).expect("an event can be written");
    assert_eq!(serde_json::from_str::<Event>(&written).expect("what was written can be read"), event);
}

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, text)) = bytes.split_first() else { return };
    let text = String::from_utf8_lossy(text);
    match kind % 4 {
        0 => publication(&text),
        1 => configuration(&text),
        2 => hosts(&text),
        _ => event(&text),
    }
});
