//! One TLS connection as a value: ciphertext in, plaintext out, and back. No descriptor, no clock.
//!
//! ```text
//!   handshaking --> open --> each direction ends by close_notify, on its own
//!        +------------+--> broken: whatever else ends it
//! ```
//!
//! An end without close_notify is a truncation, which anybody on the way can bring about: it is never taken for an end.
//! Nothing is kept here but one unfinished record, and what was encrypted and not yet taken.

use rustls::client::ClientConnection;
use rustls::pki_types::ServerName;
use rustls::server::ServerConnection;
use rustls::{AlertDescription, CertificateError, ClientConfig, Connection, ServerConfig};
use std::fmt;
use std::io::{self, Read as _, Write};
use std::sync::Arc;

/// Why a TLS connection is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// It ended without close_notify.
    Truncated,
    /// It, or what is in it, is not as it has to be.
    Tls(#[from] rustls::Error),
    /// TCP failed.
    Io(#[from] rustix::io::Errno),
    /// Our own side closed its end early.
    Local,
}

impl fmt::Display for Broken {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        use rustls::Error as Tls;
        match self {
            Self::Truncated => write!(to, "the connection was closed"),
            Self::Local => write!(to, "the connection was closed from here"),
            Self::Io(error) => write!(to, "{error}"),
            Self::Tls(Tls::NoCertificatesPresented) => write!(to, "it showed no certificate"),
            Self::Tls(Tls::InvalidCertificate(error)) => certificate(error, to),
            Self::Tls(Tls::AlertReceived(alert)) if is_about_certificates(*alert) => write!(
                to,
                "it refuses our certificate ({alert:?}): both sides' certificates have to be of the same authority"
            ),
            Self::Tls(Tls::InvalidMessage(error)) => write!(to, "what it sends is no TLS ({error:?})"),
            Self::Tls(error) => write!(to, "TLS: {error}"),
        }
    }
}

fn certificate(error: &CertificateError, to: &mut fmt::Formatter<'_>) -> fmt::Result {
    use CertificateError as Error;
    match error {
        Error::UnknownIssuer | Error::BadSignature => {
            write!(to, "its certificate is not of the authority that is trusted here")
        }
        Error::NotValidForName | Error::NotValidForNameContext { .. } => write!(
            to,
            "its certificate is for another name ({error}): name it with server_name=NAME, or make one for this name"
        ),
        Error::Expired | Error::ExpiredContext { .. } => {
            write!(to, "its certificate has expired, or the clock is wrong")
        }
        Error::InvalidPurpose | Error::InvalidPurposeContext { .. } => write!(
            to,
            "its certificate is not for this purpose: a provider's is for servers, a broker's for clients"
        ),
        other => write!(to, "its certificate is not valid: {other}"),
    }
}

fn is_about_certificates(alert: AlertDescription) -> bool {
    use AlertDescription as Alert;
    matches!(
        alert,
        Alert::CertificateRequired
            | Alert::BadCertificate
            | Alert::UnsupportedCertificate
            | Alert::CertificateRevoked
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::UnknownCA
            | Alert::AccessDenied
            | Alert::DecryptError
    )
}

/// See the module.
#[derive(Debug)]
pub struct Engine {
    tls: Connection,
    ended: bool,
}

impl Engine {
    /// The side that connects.
    ///
    /// # Errors
    /// The configuration cannot serve this name.
    pub fn client(config: &Arc<ClientConfig>, name: &ServerName<'static>) -> Result<Self, Broken> {
        let mut tls = ClientConnection::new(Arc::clone(config), name.clone())?;
        // What is given to it is bounded by who gives it.
        tls.set_buffer_limit(None);
        Ok(Self { tls: tls.into(), ended: false })
    }

    /// The side that accepts.
    ///
    /// # Errors
    /// The configuration is of no use.
    pub fn server(config: &Arc<ServerConfig>) -> Result<Self, Broken> {
        let mut tls = ServerConnection::new(Arc::clone(config))?;
        tls.set_buffer_limit(None);
        Ok(Self { tls: tls.into(), ended: false })
    }

    /// Whether nothing can be sent yet.
    #[must_use]
    pub fn is_handshaking(&self) -> bool {
        self.tls.is_handshaking()
    }

    /// Whether an earlier session was resumed: no certificates were sent.
    #[must_use]
    pub fn is_resumed(&self) -> bool {
        self.tls.handshake_kind() == Some(rustls::HandshakeKind::Resumed)
    }

    /// Whether the other side sends no more, and said so.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Takes what came; the plaintext of it is appended to `plain`. What follows the other side's end is dropped.
    ///
    /// # Errors
    /// It is no TLS, or not as it has to be. What it calls for (an alert) is to be sent still.
    pub fn receive(&mut self, mut wire: &[u8], plain: &mut Vec<u8>) -> Result<(), Broken> {
        while !wire.is_empty() && !self.ended {
            let taken = self.tls.read_tls(&mut wire).map_err(|error| general(&error))?;
            let state = self.tls.process_new_packets()?;
            let ready = state.plaintext_bytes_to_read() as u64;
            self.ended = state.peer_has_closed();
            if ready > 0 {
                let read = self.tls.reader().take(ready).read_to_end(plain);
                read.map_err(|error| general(&error))?;
            }
            if taken == 0 {
                break;
            }
        }
        Ok(())
    }

    /// Encrypts. To be called only after the handshake, and with little at a time: all of it is kept until it is taken.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn send(&mut self, plain: &[u8]) -> Result<(), Broken> {
        self.tls.writer().write_all(plain).map_err(|error| general(&error))
    }

    /// Says that no more is sent from here.
    pub fn end(&mut self) {
        self.tls.send_close_notify();
    }

    /// Whether something is to be taken by [`Self::take`].
    #[must_use]
    pub fn has_output(&self) -> bool {
        self.tls.wants_write()
    }

    /// Writes ciphertext to where it goes, once.
    ///
    /// # Errors
    /// Those of `to`.
    pub fn take(&mut self, to: &mut dyn Write) -> io::Result<usize> {
        self.tls.write_tls(to)
    }
}

fn general(error: &io::Error) -> Broken {
    Broken::Tls(rustls::Error::General(error.to_string()))
}

#[cfg(test)]
mod tests;
