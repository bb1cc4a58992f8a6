//! Who we are and whom we trust: files in PEM form, as TLS configurations.
//!
//! TLS 1.3 alone, certificates on both sides, of the one authority that is given. There is no option that leaves
//! anything of it out.

use rustls::client::WebPkiServerVerifier;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The protocol inside (RFC 7301): a certificate of the same authority that is meant for something else leads to nothing.
const PROTOCOL: &[u8] = b"kso-provide";
/// Whoever has one of these permissions beside the owner is one too many. A group may read: so Debian's `ssl-cert` does it.
const OPEN: u32 = 0o037;

/// Where the files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// Certificates of the authority that the other side's has to be of.
    pub ca: PathBuf,
    /// Our own certificate, and those between it and the authority's.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// Why files are of no use. Each names the file.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// It cannot be read.
    #[error("cannot read {}: {source} (kso provide certs DIR --name HOST makes certificates)", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not what it has to be.
    #[error("{}: {why}", path.display())]
    Content {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The name is none.
    #[error("`{0}` is no name or address of a host: server_name=NAME says how its certificate calls it")]
    Name(String),
    /// They do not fit each other.
    #[error("{} and {} do not fit: {source}", cert.display(), key.display())]
    Unfit {
        /// The certificate.
        cert: PathBuf,
        /// The key.
        key: PathBuf,
        /// What is wrong.
        source: rustls::Error,
    },
}

struct Loaded {
    roots: RootCertStore,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

/// For the side that accepts.
///
/// # Errors
/// See [`IdentityError`].
pub fn server(files: &Files) -> Result<Arc<ServerConfig>, IdentityError> {
    let Loaded { roots, chain, key } = load(files)?;
    let provider = crypto();
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .build()
        .map_err(|error| content(&files.ca, error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .and_then(|builder| builder.with_client_cert_verifier(verifier).with_single_cert(chain, key))
        .map_err(unfit(files))?;
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    // Sessions are resumed from what the client keeps, encrypted with a key that nobody else has and that changes.
    config.ticketer = ring::Ticketer::new().map_err(unfit(files))?;
    Ok(Arc::new(config))
}

/// For the side that connects.
///
/// # Errors
/// See [`IdentityError`].
pub fn client(files: &Files) -> Result<Arc<ClientConfig>, IdentityError> {
    let Loaded { roots, chain, key } = load(files)?;
    let provider = crypto();
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .build()
        .map_err(|error| content(&files.ca, error.to_string()))?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .and_then(|builder| builder.with_webpki_verifier(verifier).with_client_auth_cert(chain, key))
        .map_err(unfit(files))?;
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    Ok(Arc::new(config))
}

fn crypto() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn load(files: &Files) -> Result<Loaded, IdentityError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&files.ca)? {
        roots.add(certificate).map_err(|error| content(&files.ca, error.to_string()))?;
    }
    let chain = certificates(&files.cert)?;
    let key = PrivateKeyDer::from_pem_slice(&read(&files.key)?)
        .map_err(|error| content(&files.key, format!("it has no private key in PEM form ({error})")))?;
    warn_if_open(&files.key);
    Ok(Loaded { roots, chain, key })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let bytes = read(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let found = found.map_err(|error| content(path, format!("it is not in PEM form ({error})")))?;
    if found.is_empty() {
        return Err(content(path, "it has no certificate in PEM form".into()));
    }
    Ok(found)
}

fn read(path: &Path) -> Result<Vec<u8>, IdentityError> {
    fs::read(path).map_err(|source| IdentityError::Read { path: path.to_owned(), source })
}

fn content(path: &Path, why: String) -> IdentityError {
    IdentityError::Content { path: path.to_owned(), why }
}

fn unfit(files: &Files) -> impl FnOnce(rustls::Error) -> IdentityError {
    let Files { cert, key, .. } = files.clone();
    move |source| IdentityError::Unfit { cert, key, source }
}

/// Others than its owner can use the key.
fn is_open(mode: u32) -> bool {
    mode & OPEN != 0
}

fn warn_if_open(key: &Path) {
    let mode = fs::metadata(key).map(|about| about.permissions().mode()).unwrap_or_default();
    if is_open(mode) {
        tracing::warn!(key = %key.display(), "others can read or change this key: chmod 600 it");
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::certs;

    #[test]
    fn errors_name_the_file_and_what_to_do() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let made = certs::make(directory.path(), &["provider.test".into()]).unwrap();
        let good = Files { ca: path("ca.pem"), cert: path("broker.pem"), key: path("broker.key") };
        client(&good).unwrap();
        server(&Files { cert: made.provider.clone(), key: path("provider.test.key"), ..good.clone() })
            .unwrap();
        let cases = [
            (Files { ca: path("nothing"), ..good.clone() }, "kso provide certs"),
            (Files { ca: path("ca.key"), ..good.clone() }, "no certificate"),
            (Files { key: path("ca.pem"), ..good.clone() }, "no private key"),
            (Files { key: path("ca.key"), ..good }, "do not fit"),
        ];
        for (files, why) in cases {
            let error = client(&files).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn keys_are_their_owners() {
        for (mode, open) in [(0o600, false), (0o400, false), (0o640, false), (0o660, true), (0o644, true)] {
            assert_eq!(is_open(mode), open, "{mode:o}");
        }
    }
}
