//! For tests: identities, and engines that have shaken hands.
#![allow(clippy::unwrap_used)]

use crate::engine::{Broken, Engine};
use crate::identity::{self, Files};
use rustls::{ClientConfig, ServerConfig};
use std::path::Path;
use std::sync::{Arc, LazyLock};

pub const NAME: &str = "provider.test";

pub fn files(directory: &Path, name: &str) -> Files {
    let path = |end: &str| directory.join(format!("{name}.{end}"));
    Files { ca: directory.join("ca.pem"), cert: path("pem"), key: path("key") }
}

/// Certificates of an authority of its own.
pub fn authority() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    crate::certs::make(directory.path(), &[NAME.to_owned(), "127.0.0.1".to_owned()]).unwrap();
    directory
}

type Configs = (Arc<ClientConfig>, Arc<ServerConfig>);

static CONFIGS: LazyLock<Configs> = LazyLock::new(|| {
    let directory = authority();
    let client = identity::client(&files(directory.path(), "broker")).unwrap();
    (client, identity::server(&files(directory.path(), NAME)).unwrap())
});

/// Two sides that have not said anything.
pub fn strangers() -> (Engine, Engine) {
    let name = rustls::pki_types::ServerName::try_from(NAME).unwrap();
    (Engine::client(&CONFIGS.0, &name).unwrap(), Engine::server(&CONFIGS.1).unwrap())
}

/// What waits to be sent.
pub fn output(engine: &mut Engine) -> Vec<u8> {
    let mut wire = Vec::new();
    while engine.has_output() {
        engine.take(&mut wire).unwrap();
    }
    wire
}

/// Lets them say what they have to say.
pub fn greet(one: &mut Engine, other: &mut Engine) -> Result<(), Broken> {
    let mut plain = Vec::new();
    loop {
        let (ahead, back) = (output(one), output(other));
        if ahead.is_empty() && back.is_empty() {
            assert!(plain.is_empty() && !one.is_handshaking() && !other.is_handshaking());
            return Ok(());
        }
        other.receive(&ahead, &mut plain)?;
        one.receive(&back, &mut plain)?;
    }
}

/// Two sides whose handshake is made.
pub fn friends() -> (Engine, Engine) {
    let (mut one, mut other) = strangers();
    greet(&mut one, &mut other).unwrap();
    (one, other)
}
