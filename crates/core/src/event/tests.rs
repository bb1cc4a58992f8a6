#![allow(clippy::unwrap_used)]

use super::*;

fn event(kind: Kind) -> Event {
    let time = Time::from_micros(1_732_451_696_789_012);
    Event { time, session: 1, pid: 12, program: "curl".into(), kind }
}

fn examples() -> Vec<(Event, &'static str)> {
    let peer: SocketAddr = "192.0.2.1:443".parse().unwrap();
    let local: SocketAddr = "10.0.0.5:40000".parse().unwrap();
    let names = vec!["example.org".to_owned()];
    let denied = Denied {
        address: Some(peer.ip()),
        port: Some(22),
        protocol: Protocol::Tcp,
        names: vec![],
        error: Errno::EACCES,
        reason: "no --allow rule matches".into(),
    };
    [
        (
            Kind::SessionStart(SessionStart { name: "web".into(), command: "curl \u{1b}]x".into() }),
            "session web started: curl ?]x",
        ),
        (
            Kind::SessionEnd(SessionEnd { name: "web".into(), duration_us: Micros(1_500_000) }),
            "session web ended <1.5 s>",
        ),
        (
            Kind::Connect(Connect { peer, names: names.clone(), local: Some(local), error: None }),
            "connect(example.org 192.0.2.1:443) = 0 from 10.0.0.5:40000",
        ),
        (
            Kind::Connect(Connect { peer, names: vec![], local: None, error: Some(Errno::ENETUNREACH) }),
            "connect(192.0.2.1:443) = -1 ENETUNREACH (network is unreachable)",
        ),
        (
            Kind::Listen(Listen { local, published: Some(peer), error: None }),
            "listen(10.0.0.5:40000) = 0 published on 192.0.2.1:443",
        ),
        (Kind::Listen(Listen { local, published: None, error: None }), "listen(10.0.0.5:40000) = 0 inside"),
        (Kind::Accept(Accept { local, peer }), "accept(10.0.0.5:40000) = 192.0.2.1:443"),
        (
            Kind::Closed(Closed {
                peer,
                names: names.clone(),
                local: Some(local),
                direction: Direction::Out,
                bytes_in: 1_234_567,
                bytes_out: 78,
                duration_us: Micros(12_345),
                error: Some(Errno::ECONNRESET),
            }),
            "closed(example.org 192.0.2.1:443) ECONNRESET (connection reset by peer) in 1.2 MB out 78 B <12.3 ms>",
        ),
        (
            Kind::Closed(Closed {
                peer,
                names: vec![],
                local: Some(local),
                direction: Direction::In,
                bytes_in: 0,
                bytes_out: 1_000,
                duration_us: Micros(999),
                error: None,
            }),
            "closed(10.0.0.5:40000 from 192.0.2.1:443) in 0 B out 1.0 kB <999 us>",
        ),
        (
            Kind::Resolve(Resolve {
                name: "example.org".into(),
                record: "A".into(),
                code: "NOERROR".into(),
                addresses: vec![peer.ip(), local.ip()],
                duration_us: Micros(2_000),
            }),
            "resolve(example.org A) = 192.0.2.1 10.0.0.5 <2.0 ms>",
        ),
        (
            Kind::Resolve(Resolve {
                name: "no.example".into(),
                record: "AAAA".into(),
                code: "NXDOMAIN".into(),
                addresses: vec![],
                duration_us: Micros(0),
            }),
            "resolve(no.example AAAA) = NXDOMAIN <0 us>",
        ),
        (Kind::Denied(denied.clone()), "connect(192.0.2.1:22) = -1 EACCES DENIED: no --allow rule matches"),
        (
            Kind::Denied(Denied { address: None, port: None, protocol: Protocol::Udp, names: names.clone(), ..denied }),
            "resolve(example.org) = -1 EACCES DENIED: no --allow rule matches",
        ),
        (
            Kind::Datagram(Datagram { local, peer, names: names.clone(), error: None, ended: None }),
            "udp(example.org 192.0.2.1:443 from 10.0.0.5:40000) = 0",
        ),
        (
            Kind::Datagram(Datagram {
                local,
                peer,
                names: vec![],
                error: None,
                ended: Some(Flow { bytes_in: 5_000_000_000, bytes_out: 0, duration_us: Micros(1) }),
            }),
            "udp(192.0.2.1:443 from 10.0.0.5:40000) ended in 5.0 GB out 0 B <1 us>",
        ),
        (Kind::Echo(Echo { peer: peer.ip(), names, error: None }), "echo(example.org 192.0.2.1) = 0"),
    ]
    .map(|(kind, text)| (event(kind), text))
    .into()
}

#[test]
fn lines_for_people() {
    for (event, text) in examples() {
        assert_eq!(event.to_string(), format!("12:34:56.789 #1 curl[12] {text}"));
    }
    let (mut unknown, _) = examples().remove(2);
    (unknown.pid, unknown.program) = (0, String::new());
    assert!(unknown.to_string().starts_with("12:34:56.789 #1 connect("));
}

#[test]
fn json_is_one_line_and_is_read_back() {
    for (event, _) in examples() {
        let json = serde_json::to_string(&event).unwrap();
        assert!(!json.contains('\n'));
        assert_eq!(serde_json::from_str::<Event>(&json).unwrap(), event, "{json}");
    }
}

#[test]
fn json_has_these_fields() {
    let (event, _) = examples().remove(2);
    let json: serde_json::Value = serde_json::to_value(&event).unwrap();
    let expected = serde_json::json!({
        "time": "2024-11-24T12:34:56.789012Z", "session": 1, "pid": 12, "program": "curl", "event": "connect",
        "peer": "192.0.2.1:443", "names": ["example.org"], "local": "10.0.0.5:40000", "error": null,
    });
    assert_eq!(json, expected);
}
