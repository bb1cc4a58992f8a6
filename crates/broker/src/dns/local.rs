//! Answers that are made here.

use super::{hosts, text};
use crate::guest::GUESTS;
use hickory_proto::op::{Edns, Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::rdata::opt::EdnsOption;
use hickory_proto::rr::rdata::{A, AAAA, PTR};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use kso_core::names::{HOST_NAME, NameMemory};
use kso_wire::TunAddresses;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Seconds that an answer made here holds: what it says may change with a file.
const LIFE: u32 = 10;
/// `INFO-CODE` of an Extended DNS Error: Prohibited (RFC 8914, 4.19).
const PROHIBITED: u16 = 18;
/// Code of the option that carries it.
const EXTENDED_ERROR: u16 = 15;
/// The UDP payload that our answers say we take (DNS Flag Day 2020).
const PAYLOAD: u16 = 1232;

/// Answers to the question of `query` from what is known here.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Known<'a> {
    pub tun: &'a TunAddresses,
    pub names: &'a NameMemory,
    pub hosts: &'a str,
    /// The address of the guest that the question names.
    pub guest: Option<Ipv4Addr>,
}

/// The query in a message; else the answer to what is none, if it deserves one.
pub(crate) fn question(bytes: &[u8]) -> Result<Message, Vec<u8>> {
    let query = match Message::from_vec(bytes) {
        Ok(query) => query,
        Err(_) => return Err(bare_error(bytes, ResponseCode::FormErr)),
    };
    if query.metadata.message_type != MessageType::Query || query.queries.len() != 1 {
        return Err(bare_error(bytes, ResponseCode::FormErr));
    }
    // Zone transfers are many messages, and no business of a stub resolver.
    let transfer = query
        .queries
        .first()
        .is_some_and(|question| matches!(question.query_type(), RecordType::AXFR | RecordType::IXFR));
    if query.metadata.op_code != OpCode::Query || transfer {
        return Err(bytes_of(&empty(&query, ResponseCode::NotImp)));
    }
    Ok(query)
}

/// A header alone, for what cannot be read: the ID and the bits that are copied (RFC 1035, 4.1.1).
fn bare_error(bytes: &[u8], code: ResponseCode) -> Vec<u8> {
    let (Some(&[high, low]), Some(flags)) = (bytes.first_chunk::<2>(), bytes.get(2)) else {
        return Vec::new();
    };
    // QR, the opcode and RD of the query; RA and the code.
    let [_, code] = u16::from(code).to_be_bytes();
    vec![high, low, 0x80 | flags & 0x79, 0x80 | code, 0, 0, 0, 0, 0, 0, 0, 0]
}

/// An answer without records.
pub(crate) fn empty(query: &Message, code: ResponseCode) -> Message {
    let mut answer = Message::response(query.metadata.id, query.metadata.op_code);
    answer.metadata.recursion_desired = query.metadata.recursion_desired;
    answer.metadata.checking_disabled = query.metadata.checking_disabled;
    answer.metadata.recursion_available = true;
    answer.metadata.response_code = code;
    answer.queries.clone_from(&query.queries);
    if let Some(asked) = &query.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(PAYLOAD).set_version(0).set_dnssec_ok(asked.flags().dnssec_ok);
        answer.set_edns(edns);
    }
    answer
}

/// The answer to a query that policy denies; programs that ask for it learn why (RFC 8914).
pub(crate) fn refused(query: &Message, reason: &str) -> Vec<u8> {
    let mut answer = empty(query, ResponseCode::Refused);
    if let Some(edns) = &mut answer.edns {
        let mut option = PROHIBITED.to_be_bytes().to_vec();
        option.extend(reason.bytes().take(256));
        edns.options_mut().insert(EdnsOption::Unknown(EXTENDED_ERROR, option));
    }
    bytes_of(&answer)
}

/// The answer when no server gave one.
pub(crate) fn failed(query: &Message) -> Vec<u8> {
    bytes_of(&empty(query, ResponseCode::ServFail))
}

pub(crate) fn bytes_of(answer: &Message) -> Vec<u8> {
    answer.to_vec().unwrap_or_default()
}

/// `localhost` and what is below it (RFC 6761, 6.3): the sandbox's own.
pub(crate) fn localhost(query: &Message) -> Option<Vec<u8>> {
    let question = query.queries.first()?;
    let name = text(question.name()).to_ascii_lowercase();
    if name != "localhost" && !name.ends_with(".localhost") {
        return None;
    }
    Some(addresses(query, &[Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]))
}

/// The answer, if the name is known here.
pub(crate) fn answer(query: &Message, known: Known<'_>) -> Option<Vec<u8>> {
    let question = query.queries.first()?;
    if !matches!(question.query_class(), DNSClass::IN | DNSClass::ANY) {
        return None;
    }
    if let Some(address) = reverse(question.name(), question.query_type()) {
        let name = if known.tun.is_gateway(address) {
            HOST_NAME
        } else if address.is_loopback() || known.tun.is_guest(address) {
            "localhost"
        } else {
            hosts::name_of(known.hosts, address)?
        };
        let mut answer = empty(query, ResponseCode::NoError);
        let name = Name::from_ascii(name).ok()?.append_name(&Name::root()).ok()?;
        answer.add_answer(Record::from_rdata(question.name().clone(), LIFE, RData::PTR(PTR(name))));
        return Some(bytes_of(&answer));
    }
    let name = text(question.name());
    if name.eq_ignore_ascii_case(HOST_NAME) {
        return Some(addresses(query, &known.tun.gateway));
    }
    if let Some(guest) = known.guest {
        return Some(addresses(query, &[guest.into()]));
    }
    if name.to_ascii_lowercase().ends_with(GUESTS) {
        // Nobody else's business: it is not asked outside.
        return Some(bytes_of(&empty(query, ResponseCode::NXDomain)));
    }
    match known.names.addresses_of(&name) {
        [] => None,
        found => Some(addresses(query, found)),
    }
}

/// The address that a PTR query is about (RFC 1035, 3.5; RFC 3596, 2.5).
pub(crate) fn reverse(name: &Name, record: RecordType) -> Option<IpAddr> {
    if record != RecordType::PTR {
        return None;
    }
    let net = name.parse_arpa_name().ok()?;
    (net.prefix_len() == net.max_prefix_len()).then(|| net.addr())
}

/// The addresses of the family that was asked for; of a name that is known here nothing else exists.
fn addresses(query: &Message, addresses: &[IpAddr]) -> Vec<u8> {
    let mut answer = empty(query, ResponseCode::NoError);
    if let Some(question) = query.queries.first() {
        for address in addresses {
            let data = match (address, question.query_type()) {
                (IpAddr::V4(address), RecordType::A | RecordType::ANY) => RData::A(A(*address)),
                (IpAddr::V6(address), RecordType::AAAA | RecordType::ANY) => RData::AAAA(AAAA(*address)),
                _ => continue,
            };
            answer.add_answer(Record::from_rdata(question.name().clone(), LIFE, data));
        }
    }
    bytes_of(&answer)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use hickory_proto::op::Query;

    fn query(name: &str, record: RecordType) -> Message {
        let mut message = Message::query();
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), record));
        message.set_edns(Edns::new());
        message
    }

    fn ask(name: &str, record: RecordType) -> Option<Message> {
        let mut names = NameMemory::new(1);
        let hosts = "192.0.2.7 db.example\n";
        names.load_hosts(hosts);
        let guest = (name == "web.kso.internal.").then_some(Ipv4Addr::new(198, 19, 0, 1));
        let known = Known { tun: &TunAddresses::standard(), names: &names, hosts, guest };
        let query = query(name, record);
        let bytes = localhost(&query).or_else(|| answer(&query, known))?;
        let answer = Message::from_vec(&bytes).unwrap();
        assert_eq!(answer.metadata.id, query.metadata.id);
        assert!(answer.metadata.recursion_available && answer.metadata.recursion_desired);
        assert!(answer.edns.is_some());
        Some(answer)
    }

    fn data(name: &str, record: RecordType) -> Vec<String> {
        ask(name, record).unwrap().answers.iter().map(|record| record.data.to_string()).collect()
    }

    #[test]
    fn what_is_known_here_is_answered_here() {
        assert_eq!(data("Host.Kso.Internal.", RecordType::A), ["198.18.0.1"]);
        assert_eq!(data("host.kso.internal.", RecordType::AAAA), ["fd6b:736f::1"]);
        assert!(data("host.kso.internal.", RecordType::MX).is_empty());
        assert_eq!(data("a.localhost.", RecordType::AAAA), ["::1"]);
        assert_eq!(data("db.example.", RecordType::A), ["192.0.2.7"]);
        assert!(data("db.example.", RecordType::AAAA).is_empty());
        assert_eq!(data("7.2.0.192.in-addr.arpa.", RecordType::PTR), ["db.example."]);
        assert_eq!(data("1.0.18.198.in-addr.arpa.", RecordType::PTR), ["host.kso.internal."]);
        assert_eq!(data("web.kso.internal.", RecordType::A), ["198.19.0.1"]);
        assert!(data("web.kso.internal.", RecordType::AAAA).is_empty());
        let nobody = ask("nobody.kso.internal.", RecordType::A).unwrap();
        assert_eq!(nobody.metadata.response_code, ResponseCode::NXDomain);
        assert!(ask("other.example.", RecordType::A).is_none());
        assert!(ask("8.2.0.192.in-addr.arpa.", RecordType::PTR).is_none());
    }

    #[test]
    fn the_case_of_the_question_is_kept() {
        let bytes = localhost(&query("LocalHost.", RecordType::A)).unwrap();
        assert!(bytes.windows(9).any(|window| window == b"LocalHost"));
    }

    #[test]
    fn a_refusal_says_why() {
        let bytes = refused(&query("example.org.", RecordType::A), "because");
        let answer = Message::from_vec(&bytes).unwrap();
        assert_eq!(answer.metadata.response_code, ResponseCode::Refused);
        assert!(bytes.windows(9).any(|window| window == b"\x00\x12because"));
    }

    #[test]
    fn what_is_no_query_gets_an_error_of_its_own() {
        assert_eq!(question(&[]).unwrap_err(), Vec::<u8>::new());
        assert_eq!(question(&[1, 2, 1, 0, 0]).unwrap_err()[..4], [1, 2, 0x81, 0x81]);
        let transfer = query("example.org.", RecordType::AXFR).to_vec().unwrap();
        let answer = Message::from_vec(&question(&transfer).unwrap_err()).unwrap();
        assert_eq!(answer.metadata.response_code, ResponseCode::NotImp);
    }
}
