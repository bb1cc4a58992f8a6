//! Names, against name servers of the test's own on loopback.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use common::{Client, NameServer, allow, config_with, hello, query, response};
use hickory_proto::op::{Edns, Message, ResponseCode};
use hickory_proto::rr::rdata::{A, CNAME, SOA, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use kso_broker::BrokerConfig;
use kso_wire::{Hello, OpenDatagram, Request};
use std::time::{Duration, Instant};

fn a(address: [u8; 4]) -> RData {
    RData::A(A(address.into()))
}

fn name(text: &str) -> Name {
    Name::from_ascii(text).unwrap()
}

fn good() -> NameServer {
    NameServer::start(|query, _| {
        vec![response(query, &[("www.example.", a([192, 0, 2, 1]))]).to_vec().unwrap()]
    })
}

#[test]
fn an_answer_is_passed_on_byte_for_byte() {
    let server = NameServer::start(|query, _| {
        let mut answer = response(query, &[]);
        answer.metadata.response_code = ResponseCode::NXDomain;
        answer.metadata.authentic_data = true;
        let soa = SOA::new(name("ns.example."), name("root.example."), 1, 2, 3, 4, 5);
        answer.add_authority(Record::from_rdata(name("example."), 60, RData::SOA(soa)));
        answer.add_additional(Record::from_rdata(
            name("x.example."),
            60,
            RData::TXT(TXT::new(vec!["t".into()])),
        ));
        let mut edns = Edns::new();
        edns.set_max_payload(1400);
        answer.set_edns(edns);
        vec![answer.to_vec().unwrap()]
    });
    let mut client = Client::new(config_with(&[&server]), &hello());
    let asked = query("NoWhere.Example.", RecordType::TXT);
    let answer = client.resolve_raw(asked.to_vec().unwrap());
    assert!(answer.windows(7).any(|window| window == b"NoWhere"));
    let answer = Message::from_vec(&answer).unwrap();
    assert_eq!(answer.metadata.id, asked.metadata.id);
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    assert!(answer.metadata.authentic_data);
    assert_eq!((answer.authorities.len(), answer.additionals.len()), (1, 1));
    assert_eq!(answer.edns.unwrap().max_payload(), 1400);
}

#[test]
fn a_truncated_answer_is_fetched_over_tcp() {
    let server = NameServer::start(|query, tcp| {
        let text = TXT::new(vec!["x".repeat(255); 40]);
        let mut answer = response(query, &[("www.example.", RData::TXT(text))]);
        if !tcp {
            answer = answer.truncate();
        }
        vec![answer.to_vec().unwrap()]
    });
    let mut client = Client::new(config_with(&[&server]), &hello());
    let answer = client.resolve("www.example.", RecordType::TXT);
    assert!(!answer.metadata.truncation);
    assert_eq!(answer.answers.len(), 1);
    assert_eq!(server.asked(), (1, 1));
}

#[test]
fn forged_answers_are_passed_over() {
    let server = NameServer::start(|query, _| {
        let mut wrong_id = response(query, &[("www.example.", a([192, 0, 2, 66]))]);
        wrong_id.metadata.id ^= 1;
        let mut wrong_name = response(query, &[("www.example.", a([192, 0, 2, 66]))]);
        wrong_name.queries[0].set_name(name("other.example."));
        let right = response(query, &[("www.example.", a([192, 0, 2, 1]))]);
        [wrong_id, wrong_name, right].iter().map(|answer| answer.to_vec().unwrap()).collect()
    });
    let mut client = Client::new(config_with(&[&server]), &hello());
    let answer = client.resolve("www.example.", RecordType::A);
    assert_eq!(answer.answers[0].data, a([192, 0, 2, 1]));
}

#[test]
fn the_next_server_is_asked_when_one_fails_or_is_silent() {
    let failing = NameServer::start(|query, _| {
        let mut answer = response(query, &[]);
        answer.metadata.response_code = ResponseCode::ServFail;
        vec![answer.to_vec().unwrap()]
    });
    let silent = NameServer::start(|_, _| Vec::new());
    let good = good();
    let mut client = Client::new(config_with(&[&failing, &silent, &good]), &hello());
    let started = Instant::now();
    assert_eq!(client.resolve("www.example.", RecordType::A).answers.len(), 1);
    assert!(started.elapsed() < Duration::from_secs(6));
    // The one that answered is asked first from now on.
    let started = Instant::now();
    assert_eq!(client.resolve("www.example.", RecordType::A).answers.len(), 1);
    assert!(started.elapsed() < Duration::from_secs(1));
}

#[test]
fn when_no_server_is_there_it_fails_quickly() {
    let address = format!("127.0.0.1:{}", common::free_port()).parse().unwrap();
    let config = BrokerConfig { name_servers: Some(vec![address]), ..common::config() };
    let mut client = Client::new(config, &hello());
    let started = Instant::now();
    let answer = client.resolve("www.example.", RecordType::A);
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    assert!(started.elapsed() < Duration::from_secs(2));
}

#[test]
fn too_many_questions_at_once_are_answered_all_the_same() {
    let server = NameServer::start(|_, _| Vec::new());
    let mut client = Client::new(config_with(&[&server]), &hello());
    let mut refused = 0;
    for n in 0..300 {
        let question = query(&format!("n{n}.example."), RecordType::A).to_vec().unwrap();
        let id = kso_wire::RequestId::gateway(n);
        let caller = kso_wire::Caller::default();
        let submitted = client.broker.handle(client.session, id, &caller, Request::Resolve(question));
        refused += usize::from(matches!(submitted, kso_wire::Submitted::Done(_)));
    }
    assert_eq!(refused, 300 - 256);
    for n in 0..300 {
        client.broker.forget(client.session, kso_wire::RequestId::gateway(n));
    }
    assert_eq!(client.broker.next_deadline(), None);
}

#[test]
fn rules_by_name_hold_for_what_was_resolved() {
    let server = NameServer::start(|query, _| {
        let records = [
            ("www.example.", RData::CNAME(CNAME(name("edge.example.net.")))),
            ("edge.example.net.", a([192, 0, 2, 1])),
        ];
        vec![response(query, &records).to_vec().unwrap()]
    });
    let mut client = Client::new(config_with(&[&server]), &allow(&["www.example"]));
    // A connected datagram socket sends nothing by itself: the address is not reached by this test.
    let open = |client: &mut Client, peer: &str| {
        let guest = "198.18.0.2:1".parse().unwrap();
        let answer = client.ask(Request::OpenDatagram(OpenDatagram { guest, peer: peer.parse().unwrap() }));
        !matches!(answer.result, Err(failure) if failure.denied)
    };
    assert!(!open(&mut client, "192.0.2.1:443"));
    assert_eq!(client.resolve("www.example.", RecordType::A).answers.len(), 2);
    assert!(open(&mut client, "192.0.2.1:443"));
    assert!(!open(&mut client, "192.0.2.2:443"));
    // A name that no rule could allow is not even asked for.
    server.asked();
    let answer = client.resolve("secret-in-a-label.attacker.example.", RecordType::A);
    assert_eq!(answer.metadata.response_code, ResponseCode::Refused);
    assert_eq!(server.asked(), (0, 0));
}

#[test]
fn without_a_network_nothing_is_asked() {
    let server = good();
    let mut client = Client::new(config_with(&[&server]), &Hello { no_net: true, ..hello() });
    let answer = client.resolve("www.example.", RecordType::A);
    assert_eq!(answer.metadata.response_code, ResponseCode::Refused);
    assert_eq!(client.resolve("localhost.", RecordType::A).answers.len(), 1);
    assert_eq!(server.asked(), (0, 0));
}

#[test]
fn the_hosts_file_answers_and_is_read_again() {
    let directory = tempfile::tempdir().unwrap();
    let hosts = directory.path().join("hosts");
    std::fs::write(&hosts, "192.0.2.7 db.example\n").unwrap();
    let server = good();
    let config = BrokerConfig { hosts: hosts.clone(), ..config_with(&[&server]) };
    let mut client = Client::new(config, &allow(&["db.example"]));
    assert_eq!(client.resolve("db.example.", RecordType::A).answers[0].data, a([192, 0, 2, 7]));
    std::fs::write(&hosts, "192.0.2.18 db.example\n").unwrap();
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(client.resolve("db.example.", RecordType::A).answers[0].data, a([192, 0, 2, 18]));
    assert_eq!(server.asked(), (0, 0));
}
