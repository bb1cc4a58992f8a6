//! Names: what the sandbox asks, and what it is answered.
//!
//! ```text
//!   query --> not a query -----------------------> FORMERR, NOTIMP
//!         --> localhost -------------------------> here
//!         --> policy says no --------------------> REFUSED, Extended DNS Error 18 (Prohibited)
//!         --> host.kso.internal, /etc/hosts -----> here
//!         --> else the host's name servers ------> their answer, as it is
//! ```
//!
//! An answer is passed on byte for byte (but for its ID), so that every type, section and flag that the
//! host's resolver gives reaches the program; it is only *read* ([`observe`]), to remember which addresses a
//! name stands for.

pub(crate) mod conf;
pub(crate) mod forward;
pub(crate) mod hosts;
pub(crate) mod local;

use hickory_proto::op::{Message, MessageType, ResponseCode};
use hickory_proto::rr::rdata::svcb::SvcParamValue;
use hickory_proto::rr::{Name, RData, Record};
use std::net::IpAddr;
use std::time::Duration;

/// Longest chain of aliases that is followed, as resolvers do.
const MAX_CHAIN: usize = 16;
/// Most addresses of an answer that are remembered.
const MAX_ADDRESSES: usize = 256;

/// Why a message was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ObserveError {
    /// Not a DNS message.
    #[error("not a DNS message: {0}")]
    Malformed(String),
    /// Not an answer to one question.
    #[error("not an answer to one question")]
    NotAnAnswer,
}

/// What an answer says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    /// The name that was asked for.
    pub name: String,
    /// The type that was asked for: `A`, `MX`, ...
    pub record: String,
    /// `NOERROR`, `NXDOMAIN`, ...
    pub code: String,
    /// The name and its aliases, in the order of the chain.
    pub names: Vec<String>,
    /// The addresses at the end of the chain, and the shortest life of what leads to them.
    pub addresses: Vec<(IpAddr, Duration)>,
}

/// Reads an answer: the question, the chain of aliases that begins with it, and the addresses at its end (those
/// of HTTPS and SVCB hints too, because programs connect to them). Records that are not on the chain say
/// nothing about the name and are passed over.
///
/// # Errors
/// It is no answer. Never panics, whatever the bytes are.
pub fn observe(message: &[u8]) -> Result<Observed, ObserveError> {
    let message = Message::from_vec(message).map_err(|error| ObserveError::Malformed(error.to_string()))?;
    let [question] = message.queries.as_slice() else { return Err(ObserveError::NotAnAnswer) };
    if message.metadata.message_type != MessageType::Response {
        return Err(ObserveError::NotAnAnswer);
    }
    let mut chain: Vec<&Name> = vec![question.name()];
    let mut life = u32::MAX;
    while let Some(record) = alias(&message.answers, &chain)
        && chain.len() <= MAX_CHAIN
    {
        life = life.min(record.ttl);
        if let RData::CNAME(next) = &record.data {
            chain.push(&next.0);
        }
    }
    let mut addresses = Vec::new();
    for record in message.answers.iter().filter(|record| chain.contains(&&record.name)) {
        let ttl = Duration::from_secs(life.min(record.ttl).into());
        addresses.extend(addresses_in(&record.data).into_iter().map(|address| (address, ttl)));
    }
    addresses.truncate(MAX_ADDRESSES);
    Ok(Observed {
        name: text(question.name()),
        record: question.query_type().to_string(),
        code: code(message.metadata.response_code),
        names: chain.into_iter().map(text).collect(),
        addresses,
    })
}

/// The record that makes the last name of the chain an alias of one that is not on it yet.
fn alias<'a>(answers: &'a [Record], chain: &[&Name]) -> Option<&'a Record> {
    let last = *chain.last()?;
    answers.iter().find(|record| {
        record.name == *last && matches!(&record.data, RData::CNAME(next) if !chain.contains(&&next.0))
    })
}

fn addresses_in(data: &RData) -> Vec<IpAddr> {
    let service = match data {
        RData::A(address) => return vec![address.0.into()],
        RData::AAAA(address) => return vec![address.0.into()],
        RData::HTTPS(service) => &service.0,
        RData::SVCB(service) => service,
        _ => return Vec::new(),
    };
    let hints = service.svc_params.iter().flat_map(|(_, value)| match value {
        SvcParamValue::Ipv4Hint(hint) => hint.0.iter().map(|address| address.0.into()).collect(),
        SvcParamValue::Ipv6Hint(hint) => hint.0.iter().map(|address| address.0.into()).collect(),
        _ => Vec::<IpAddr>::new(),
    });
    hints.collect()
}

/// A name without the dot at its end.
pub(crate) fn text(name: &Name) -> String {
    let text = name.to_ascii();
    match text.strip_suffix('.') {
        Some(rest) if !rest.is_empty() => rest.to_owned(),
        _ => text,
    }
}

/// A response code as dig(1) shows it.
pub(crate) fn code(code: ResponseCode) -> String {
    match code {
        ResponseCode::NoError => "NOERROR".into(),
        ResponseCode::FormErr => "FORMERR".into(),
        ResponseCode::ServFail => "SERVFAIL".into(),
        ResponseCode::NXDomain => "NXDOMAIN".into(),
        ResponseCode::NotImp => "NOTIMP".into(),
        ResponseCode::Refused => "REFUSED".into(),
        other => format!("RCODE{}", u16::from(other)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use hickory_proto::op::{OpCode, Query};
    use hickory_proto::rr::RecordType;
    use hickory_proto::rr::rdata::{A, CNAME};

    fn name(text: &str) -> Name {
        Name::from_ascii(text).unwrap()
    }

    fn answer(records: &[Record]) -> Vec<u8> {
        let mut message = Message::response(7, OpCode::Query);
        message.add_query(Query::query(name("www.example.org."), RecordType::A));
        message.add_answers(records.iter().cloned());
        message.to_vec().unwrap()
    }

    fn cname(from: &str, to: &str, ttl: u32) -> Record {
        Record::from_rdata(name(from), ttl, RData::CNAME(CNAME(name(to))))
    }

    fn a(of: &str, address: [u8; 4], ttl: u32) -> Record {
        Record::from_rdata(name(of), ttl, RData::A(A(address.into())))
    }

    #[test]
    fn the_chain_is_followed_in_any_order_and_nothing_else() {
        let observed = observe(&answer(&[
            a("edge.example.net.", [192, 0, 2, 1], 300),
            cname("cdn.example.org.", "edge.example.net.", 60),
            a("bank.example.", [192, 0, 2, 66], 300),
            cname("WWW.example.org.", "cdn.example.org.", 600),
        ]))
        .unwrap();
        assert_eq!(observed.names, ["www.example.org", "cdn.example.org", "edge.example.net"]);
        assert_eq!(observed.addresses, [([192, 0, 2, 1].into(), Duration::from_secs(60))]);
        assert_eq!((observed.record.as_str(), observed.code.as_str()), ("A", "NOERROR"));
    }

    #[test]
    fn a_circle_ends() {
        let observed =
            observe(&answer(&[cname("www.example.org.", "b.", 1), cname("b.", "www.example.org.", 1)]))
                .unwrap();
        assert_eq!(observed.names, ["www.example.org", "b"]);
        assert!(observed.addresses.is_empty());
    }

    #[test]
    fn what_is_no_answer_is_an_error() {
        assert_eq!(observe(&Message::query().to_vec().unwrap()), Err(ObserveError::NotAnAnswer));
        let whole = answer(&[a("www.example.org.", [192, 0, 2, 1], 300)]);
        for length in 0..whole.len() {
            assert!(observe(&whole[..length]).is_err(), "{length}");
        }
    }
}
