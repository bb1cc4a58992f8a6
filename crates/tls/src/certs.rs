//! `kso provide certs`: an authority of one's own, and certificates for a provider and for brokers.
//!
//! ```text
//!   DIR/ca.pem      both sides: whom to trust          DIR/ca.key      keep it; needed only to make more
//!   DIR/HOST.pem    the provider's                     DIR/HOST.key
//!   DIR/broker.pem  the brokers'                       DIR/broker.key
//! ```
//!
//! A provider's certificate is for servers only, and a broker's for clients only: neither can play the other.

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, date_time_ymd,
};
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Clocks differ.
const BEFORE: Duration = DAY;
/// The authority's certificate holds so long.
const AUTHORITY: Duration = DAY.saturating_mul(3650);
/// Another holds so long.
const OTHER: Duration = DAY.saturating_mul(825);

/// Why none can be made.
#[derive(Debug, thiserror::Error)]
pub enum CertsError {
    /// A file.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is one already.
    #[error("{} exists already: remove it to make another", .0.display())]
    Exists(PathBuf),
    /// Half an authority.
    #[error("{} is there, but not {}: an authority consists of both", .0.display(), .1.display())]
    Half(PathBuf, PathBuf),
    /// The name is none.
    #[error("`{0}` is no name or address of a host")]
    Name(String),
    /// Something in them.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
}

/// What was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    /// Whether the authority is new.
    pub authority: bool,
    /// The provider's certificate.
    pub provider: PathBuf,
    /// The brokers' certificate.
    pub broker: PathBuf,
    /// Whether that is new.
    pub broker_is_new: bool,
}

/// Makes certificates in `directory` for a provider that is reached by `names`, of the authority that is there, or of a new one.
///
/// # Errors
/// See [`CertsError`].
pub fn make(directory: &Path, names: &[String]) -> Result<Made, CertsError> {
    let Some(first) = names.first() else { return Err(CertsError::Name(String::new())) };
    for name in names {
        // It becomes the name of a file, too.
        let fits = |character: char| character.is_ascii_alphanumeric() || "-.:_*".contains(character);
        if name.is_empty() || name.starts_with('.') || !name.chars().all(fits) {
            return Err(CertsError::Name(name.clone()));
        }
    }
    fs::create_dir_all(directory)
        .map_err(|source| CertsError::File { path: directory.to_owned(), source })?;
    let files = |name: &str| (directory.join(format!("{name}.pem")), directory.join(format!("{name}.key")));
    let (provider, provider_key) = files(&first.replace('*', "_"));
    for path in [&provider, &provider_key] {
        if path.exists() {
            return Err(CertsError::Exists(path.clone()));
        }
    }
    let (authority, issuer) = authority(files("ca"))?;
    let purpose = ExtendedKeyUsagePurpose::ServerAuth;
    issue(&issuer, (&provider, &provider_key), first, names.to_vec(), purpose)?;
    let (broker, broker_key) = files("broker");
    let broker_is_new = !broker.exists();
    if broker_is_new {
        let purpose = ExtendedKeyUsagePurpose::ClientAuth;
        issue(&issuer, (&broker, &broker_key), "kso broker", Vec::new(), purpose)?;
    }
    Ok(Made { authority, provider, broker, broker_is_new })
}

/// The authority in these files; new ones, if there are none.
fn authority((path, key_path): (PathBuf, PathBuf)) -> Result<(bool, Issuer<'static, KeyPair>), CertsError> {
    match (path.exists(), key_path.exists()) {
        (true, true) => {
            let text = fs::read_to_string(&key_path)
                .map_err(|source| CertsError::File { path: key_path.clone(), source })?;
            let key = KeyPair::from_pem(&text)?;
            Ok((false, Issuer::new(authority_params(&key)?, key)))
        }
        (false, false) => {
            let key = KeyPair::generate()?;
            let params = authority_params(&key)?;
            write(&key_path, &key.serialize_pem(), 0o600)?;
            write(&path, &params.self_signed(&key)?.pem(), 0o644)?;
            Ok((true, Issuer::new(params, key)))
        }
        (true, false) => Err(CertsError::Half(path, key_path)),
        (false, true) => Err(CertsError::Half(key_path, path)),
    }
}

/// All of it follows from the key: so the key alone is needed to make more.
fn authority_params(key: &KeyPair) -> Result<CertificateParams, CertsError> {
    let mut params = CertificateParams::new(Vec::new())?;
    // Two authorities are never called the same: a wrong one is told from a forged one.
    let mark: String = key.public_key_raw().iter().rev().take(4).map(|byte| format!("{byte:02x}")).collect();
    params.distinguished_name = named(&format!("kso authority {mark}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid_for(&mut params, AUTHORITY);
    Ok(params)
}

fn issue(
    issuer: &Issuer<'_, KeyPair>,
    (path, key_path): (&Path, &Path),
    name: &str,
    names: Vec<String>,
    purpose: ExtendedKeyUsagePurpose,
) -> Result<(), CertsError> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name = named(name);
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![purpose];
    params.use_authority_key_identifier_extension = true;
    valid_for(&mut params, OTHER);
    let certificate = params.signed_by(&key, issuer)?;
    write(key_path, &key.serialize_pem(), 0o600)?;
    write(path, &certificate.pem(), 0o644)
}

fn named(name: &str) -> DistinguishedName {
    let mut full = DistinguishedName::new();
    full.push(DnType::CommonName, name);
    full
}

fn valid_for(params: &mut CertificateParams, time: Duration) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let epoch = date_time_ymd(1970, 1, 1);
    params.not_before = epoch + now.saturating_sub(BEFORE);
    params.not_after = epoch + (now + time);
}

fn write(path: &Path, text: &str, mode: u32) -> Result<(), CertsError> {
    let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(|source| CertsError::File { path: path.to_owned(), source })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn an_authority_is_used_again_and_nothing_is_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let made = make(directory.path(), &["one.test".into(), "192.0.2.1".into()]).unwrap();
        assert!(made.authority && made.broker_is_new);
        for key in ["ca.key", "one.test.key", "broker.key"] {
            assert_eq!(fs::metadata(path(key)).unwrap().permissions().mode() & 0o777, 0o600);
        }
        let authority = fs::read(path("ca.pem")).unwrap();
        let again = make(directory.path(), &["one.test".into()]).unwrap_err();
        assert!(again.to_string().contains("exists already"), "{again}");
        let other = make(directory.path(), &["2001:db8::1".into()]).unwrap();
        assert!(!other.authority && !other.broker_is_new);
        assert_eq!(fs::read(path("ca.pem")).unwrap(), authority);
        fs::remove_file(path("ca.key")).unwrap();
        assert!(matches!(make(directory.path(), &["x".into()]), Err(CertsError::Half(..))));
        for name in ["", "../x", "a b", ".hidden"] {
            assert!(matches!(make(directory.path(), &[name.into()]), Err(CertsError::Name(_))));
        }
    }
}
