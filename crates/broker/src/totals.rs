//! What all sessions did together, for metrics. Plain numbers: one thread owns them.

use kso_wire::Failure;

/// See the module.
#[derive(Clone, Debug, Default)]
pub(crate) struct Totals {
    pub connects_ok: u64,
    pub connects_failed: u64,
    pub connects_denied: u64,
    pub flows_ok: u64,
    pub flows_failed: u64,
    pub flows_denied: u64,
    pub echoes_ok: u64,
    pub echoes_failed: u64,
    pub names_denied: u64,
    /// By response code.
    pub queries: Vec<(String, u64)>,
    pub accepts: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub sessions_opened: u64,
    /// Parts of files that went to sockets outside without passing their guest.
    pub files_sent: u64,
    pub file_bytes_sent: u64,
}

/// Most response codes that are told apart.
const MAX_CODES: usize = 32;

impl Totals {
    pub fn connected(&mut self, result: &Result<(), Failure>) {
        match result {
            Ok(()) => self.connects_ok += 1,
            Err(failure) if failure.denied => self.connects_denied += 1,
            Err(_) => self.connects_failed += 1,
        }
    }

    pub fn flow(&mut self, result: &Result<(), Failure>) {
        match result {
            Ok(()) => self.flows_ok += 1,
            Err(failure) if failure.denied => self.flows_denied += 1,
            Err(_) => self.flows_failed += 1,
        }
    }

    pub fn echo(&mut self, opened: bool) {
        if opened {
            self.echoes_ok += 1;
        } else {
            self.echoes_failed += 1;
        }
    }

    pub fn resolved(&mut self, code: &str) {
        let room = self.queries.len() < MAX_CODES;
        match self.queries.iter_mut().find(|(known, _)| known == code) {
            Some((_, count)) => *count += 1,
            None if room => self.queries.push((code.to_owned(), 1)),
            None => {}
        }
    }
}
