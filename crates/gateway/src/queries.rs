//! Queries for names that came in datagrams to the gateway's port 53. (Those that come by TCP: `streams`.)

use crate::datagrams::FlowKey;
use crate::dns::{self, Code};
use crate::gateway::Gateway;
use crate::watch::{QUERY_HEAD, Waiting};
use kso_wire::{Answer, BrokerLink, MAX_DNS, Reply, Request};

/// Where names are asked.
pub const PORT: u16 = 53;
/// At most so many requests are under way; a resolver in the sandbox asks again.
const MAX_WAITING: usize = 1024;

impl Gateway {
    pub(crate) fn query(
        &mut self,
        key: &FlowKey,
        payload: &[u8],
        segment: Option<u16>,
        link: &mut dyn BrokerLink,
    ) {
        // Several queries in one packet, as a program with UDP_SEGMENT may send them.
        let unit = segment.map_or(payload.len(), usize::from).max(1);
        for query in payload.chunks(unit) {
            if !dns::is_query(query) {
                self.stats.malformed += 1;
                continue;
            }
            if self.requests.len() >= MAX_WAITING {
                self.stats.datagrams_lost += 1;
                continue;
            }
            let head = query.get(..query.len().min(QUERY_HEAD)).unwrap_or_default().into();
            let limit = dns::answer_limit(query);
            let waiting = Waiting::Query { asker: key.guest, asked: key.peer, limit, head };
            if let Ok(answer) = self.ask(waiting.clone(), Request::Resolve(query.to_vec()), link) {
                self.query_answered(&waiting, answer);
            }
        }
    }

    pub(crate) fn query_answered(&mut self, waiting: &Waiting, answer: Answer) {
        let Waiting::Query { asker, asked, limit, head } = waiting else { return };
        let mut message = answer_or_failure(head, answer);
        dns::truncate(&mut message, *limit);
        let written = self.device.write_payload(*asked, *asker, &message);
        self.wrote(written.map(|()| 1));
    }
}

/// The message of an answer; or one that says that there is none.
pub fn answer_or_failure(query: &[u8], answer: Answer) -> Vec<u8> {
    match answer.result {
        Ok(Reply::Resolved(message)) if message.len() <= MAX_DNS => message,
        Err(failure) if failure.denied => dns::failure(query, Code::Refused),
        _ => dns::failure(query, Code::ServerFailure),
    }
}
