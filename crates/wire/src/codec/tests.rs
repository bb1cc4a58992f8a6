#![allow(clippy::unwrap_used)]

use super::*;
use crate::message::*;
use crate::{Errno, OptionName, SocketOptions};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use std::net::{IpAddr, SocketAddr};

const V4: &str = "192.0.2.1:443";
const V6: &str = "[2001:db8::1]:443";

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn options() -> SocketOptions {
    let mut options = SocketOptions::default();
    options.push(OptionName::NoDelay, 1);
    options.push(OptionName::Linger, -1);
    options
}

fn hello() -> Hello {
    Hello {
        version: VERSION,
        name: "web".into(),
        command: "curl".into(),
        pid: 300,
        rules: vec![(true, "*:443".into()), (false, "host".into())],
        no_net: false,
        publish: vec![Publication {
            address: None,
            outer_port: 8080,
            inner_port: 80,
            protocol: Protocol::Tcp,
        }],
        loopback: LoopbackMode::External,
        tun: TunAddresses::standard(),
    }
}

fn asked(request: Request) -> ToBroker {
    ToBroker::Request { id: RequestId(5), caller: Caller { pid: 7, program: "nc".into() }, request }
}

fn answered(result: Result<Reply, Failure>, descriptor: bool) -> ToRunner {
    ToRunner::Answered { id: RequestId::gateway(1), result, descriptor }
}

fn to_broker_examples() -> Vec<(ToBroker, &'static str)> {
    let connect = Connect {
        peer: address(V6),
        family: Family::V6,
        local: Some(address(V4)),
        options: options(),
        origin: Origin::Tun,
    };
    let listen = Listen {
        local: address(V4),
        family: Family::V4,
        backlog: Some(128),
        options: SocketOptions::default(),
    };
    vec![
        (
            ToBroker::Hello(hello()),
            "000103776562046375726cac020201052a3a3434330004686f7374000100903f50000100c612000201fd6b736f00000000000000000000000200c612000101fd6b736f000000000000000000000001",
        ),
        (
            asked(Request::Connect(connect)),
            "010507026e63000120010db8000000000000000000000001bb03010100c0000201bb03020d02030101",
        ),
        (asked(Request::Listen(listen)), "010507026e630100c0000201bb030001800200"),
        (
            asked(Request::OpenDatagram(OpenDatagram { guest: address(V4), peer: address(V4) })),
            "010507026e630200c0000201bb0300c0000201bb03",
        ),
        (
            asked(Request::BindDatagram(BindDatagram { publication: 2, family: Family::V6 })),
            "010507026e63030201",
        ),
        (
            asked(Request::OpenEcho(OpenEcho { peer: address(V4).ip(), identifier: 9 })),
            "010507026e630400c000020109",
        ),
        (asked(Request::Resolve(vec![1, 2, 255])), "010507026e6305030102ff"),
        (asked(Request::Release(address(V4))), "010507026e630600c0000201bb03"),
        (ToBroker::Forget(RequestId::interceptor(u64::MAX)), "02ffffffffffffffff7f"),
    ]
}

fn to_runner_examples() -> Vec<(ToRunner, &'static str)> {
    vec![
        (ToRunner::Welcome(Welcome { version: VERSION, session: 3 }), "000103"),
        (ToRunner::Refused("no".into()), "01026e6f"),
        (
            answered(Ok(Reply::Socket { local: Some(address(V4)) }), true),
            "028180808080808080800100000100c0000201bb0301",
        ),
        (answered(Ok(Reply::StayInside), false), "0281808080808080808001000100"),
        (answered(Ok(Reply::Echo { raw: true }), true), "028180808080808080800100020101"),
        (answered(Ok(Reply::Resolved(vec![9])), false), "02818080808080808080010003010900"),
        (answered(Err(Failure::denied(Errno::EACCES)), false), "028180808080808080800101070100"),
        (answered(Err(Failure::kernel(Errno::EPROTO)), false), "028180808080808080800101280000"),
    ]
}

/// Messages of another version of this crate must mean the same: these bytes never change, except with
/// [`VERSION`].
#[test]
fn golden_bytes() {
    for (message, golden) in to_broker_examples() {
        let bytes = encode(&message).unwrap();
        assert_eq!(hex(&bytes), golden, "{message:?}");
        assert_eq!(decode::<ToBroker>(&bytes).unwrap(), message);
    }
    for (message, golden) in to_runner_examples() {
        let bytes = encode(&message).unwrap();
        assert_eq!(hex(&bytes), golden, "{message:?}");
        assert_eq!(decode::<ToRunner>(&bytes).unwrap(), message);
    }
}

/// The tables are append-only: where each name stands is its number on the wire.
#[test]
fn tables_keep_their_order() {
    let symbols: Vec<&str> = Errno::ALL.iter().map(|errno| errno.symbol()).collect();
    assert_eq!(
        symbols.join(" "),
        "EPERM ENOENT EINTR EIO EBADF EAGAIN ENOMEM EACCES EFAULT EBUSY EINVAL EMFILE ENFILE ENOSPC EPIPE ENOSYS \
         ENOTSOCK EDESTADDRREQ EMSGSIZE EPROTOTYPE ENOPROTOOPT EPROTONOSUPPORT EOPNOTSUPP EAFNOSUPPORT EADDRINUSE \
         EADDRNOTAVAIL ENETDOWN ENETUNREACH ENETRESET ECONNABORTED ECONNRESET ENOBUFS EISCONN ENOTCONN ETIMEDOUT \
         ECONNREFUSED EHOSTDOWN EHOSTUNREACH EALREADY EINPROGRESS EPROTO ENOTDIR ELOOP ENAMETOOLONG"
    );
    let names: Vec<String> = (0..32).map(|index| format!("{:?}", option_name(index))).collect();
    assert_eq!(
        names.join(" "),
        "ReuseAddress ReusePort KeepAlive Linger SendBuffer ReceiveBuffer ReceiveTimeout SendTimeout Priority \
         OutOfBandInline ReceiveLowWater Timestamp BusyPoll NoDelay Cork KeepIdle KeepInterval KeepCount UserTimeout \
         SynCount MaxSegment DeferAccept Linger2 NotSentLowWater WindowClamp TypeOfService TimeToLive MtuDiscover \
         ReceiveErrors V6Only UnicastHops TrafficClass"
    );
}

fn option_name(index: u8) -> OptionName {
    postcard::from_bytes(&[index]).unwrap()
}

#[test]
fn what_is_over_its_bound_is_neither_written_nor_read() {
    let over = |hello: Hello| encode(&ToBroker::Hello(hello)).unwrap_err();
    assert_eq!(
        over(Hello { name: "x".repeat(MAX_RULE + 1), ..hello() }),
        CodecError::Bound("name or command")
    );
    assert_eq!(
        over(Hello { command: "x".repeat(MAX_RULE + 1), ..hello() }),
        CodecError::Bound("name or command")
    );
    assert_eq!(
        over(Hello { rules: vec![(true, String::new()); MAX_RULES + 1], ..hello() }),
        CodecError::Bound("rules")
    );
    assert_eq!(
        over(Hello { rules: vec![(true, "x".repeat(MAX_RULE + 1))], ..hello() }),
        CodecError::Bound("rule")
    );
    assert_eq!(
        over(Hello { rules: vec![(true, "x".repeat(MAX_RULE)); MAX_RULES], ..hello() }),
        CodecError::TooLong(527_427)
    );
    let caller = Caller { pid: 1, program: "x".repeat(MAX_PROGRAM + 1) };
    let long_program = ToBroker::Request { id: RequestId(1), caller, request: Request::Resolve(vec![]) };
    assert_eq!(encode(&long_program).unwrap_err(), CodecError::Bound("program"));
    assert_eq!(
        encode(&asked(Request::Resolve(vec![0; MAX_DNS + 1]))).unwrap_err(),
        CodecError::Bound("query")
    );
    assert!(encode(&asked(Request::Resolve(vec![0; MAX_DNS]))).is_ok());
    assert_eq!(encode(&ToRunner::Refused("x".repeat(4097))).unwrap_err(), CodecError::Bound("reason"));
    assert_eq!(
        encode(&answered(Ok(Reply::Resolved(vec![0; MAX_DNS + 1])), false)).unwrap_err(),
        CodecError::Bound("answer")
    );
    assert!(encode(&answered(Ok(Reply::Resolved(vec![0; MAX_DNS])), false)).is_ok());

    // A peer that does not keep the bounds.
    let raw = |message: &ToBroker| decode::<ToBroker>(&postcard::to_stdvec(message).unwrap()).unwrap_err();
    assert_eq!(raw(&long_program), CodecError::Bound("program"));
    assert_eq!(
        raw(&ToBroker::Hello(Hello { rules: vec![(true, "x".repeat(MAX_RULE + 1))], ..hello() })),
        CodecError::Bound("rule")
    );
    for hello in [
        Hello { rules: vec![(true, String::new()); MAX_RULES + 1], ..hello() },
        Hello { publish: vec![hello().publish.pop().unwrap(); MAX_RULES + 1], ..hello() },
    ] {
        assert_eq!(raw(&ToBroker::Hello(hello)), CodecError::Malformed(postcard::Error::SerdeDeCustom));
    }
    assert_eq!(
        decode::<ToBroker>(&vec![0; MAX_MESSAGE + 1]).unwrap_err(),
        CodecError::TooLong(MAX_MESSAGE + 1)
    );
}

#[test]
fn a_message_is_all_of_its_bytes() {
    for (message, _) in to_broker_examples() {
        let bytes = encode(&message).unwrap();
        for cut in 0..bytes.len() {
            assert!(
                matches!(decode::<ToBroker>(bytes.get(..cut).unwrap()), Err(CodecError::Malformed(_))),
                "{cut}"
            );
        }
        let longer: Vec<u8> = bytes.iter().copied().chain([0, 0]).collect();
        assert_eq!(decode::<ToBroker>(&longer).unwrap_err(), CodecError::Trailing(2));
    }
}

/// A length of 2^64-1 where a list, a text or bytes begin.
#[test]
fn a_claimed_length_allocates_nothing() {
    let huge = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
    let tail = vec![0; MAX_MESSAGE - 100];
    for start in [
        &b"\x00\x01"[..],                                // the name of a session
        b"\x00\x01\x00\x00\x00",                         // its rules
        b"\x00\x01\x00\x00\x00\x00\x00",                 // its publications
        b"\x01\x05\x07",                                 // the name of a program
        b"\x01\x05\x07\x00\x05",                         // a DNS message
        b"\x01\x05\x07\x00\x00\x00\x7f\0\0\x01\x50\0\0", // the options of a socket
    ] {
        let bytes: Vec<u8> = start.iter().chain(&huge).chain(&tail).copied().collect();
        assert!(matches!(decode::<ToBroker>(&bytes), Err(CodecError::Malformed(_))), "{start:?}");
    }
}

/// The number of an interface means nothing on another kernel.
#[test]
fn a_scope_does_not_cross() {
    let scoped = "[fe80::1%3]:80".parse::<std::net::SocketAddrV6>().unwrap();
    let bytes = encode(&asked(Request::Release(scoped.into()))).unwrap();
    assert_eq!(decode::<ToBroker>(&bytes).unwrap(), asked(Request::Release(address("[fe80::1]:80"))));
}

fn any_address() -> impl Strategy<Value = SocketAddr> {
    any::<(IpAddr, u16)>().prop_map(SocketAddr::from)
}

fn any_options() -> impl Strategy<Value = SocketOptions> {
    vec((0..32_u8, any::<i64>()), 0..=SocketOptions::MAX).prop_map(|pairs| {
        let mut options = SocketOptions::default();
        pairs.into_iter().for_each(|(name, value)| options.push(option_name(name), value));
        options
    })
}

fn any_family() -> impl Strategy<Value = Family> {
    prop_oneof![Just(Family::V4), Just(Family::V6)]
}

fn any_protocol() -> impl Strategy<Value = Protocol> {
    prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp), Just(Protocol::Icmp)]
}

fn any_request() -> impl Strategy<Value = Request> {
    let origin = prop_oneof![Just(Origin::Intercepted), Just(Origin::Tun)];
    prop_oneof![
        (any_address(), any_family(), option::of(any_address()), any_options(), origin).prop_map(
            |(peer, family, local, options, origin)| {
                Request::Connect(Connect { peer, family, local, options, origin })
            }
        ),
        (any_address(), any_family(), any::<Option<i32>>(), any_options()).prop_map(
            |(local, family, backlog, options)| Request::Listen(Listen { local, family, backlog, options })
        ),
        (any_address(), any_address())
            .prop_map(|(guest, peer)| Request::OpenDatagram(OpenDatagram { guest, peer })),
        (any::<u32>(), any_family())
            .prop_map(|(publication, family)| Request::BindDatagram(BindDatagram { publication, family })),
        any::<(IpAddr, u16)>()
            .prop_map(|(peer, identifier)| Request::OpenEcho(OpenEcho { peer, identifier })),
        vec(any::<u8>(), 0..600).prop_map(Request::Resolve),
        any_address().prop_map(Request::Release),
    ]
}

fn any_hello() -> impl Strategy<Value = Hello> {
    let publication = (option::of(any::<IpAddr>()), any::<u16>(), any::<u16>(), any_protocol()).prop_map(
        |(address, outer_port, inner_port, protocol)| Publication {
            address,
            outer_port,
            inner_port,
            protocol,
        },
    );
    let loopback = prop_oneof![Just(LoopbackMode::Private), Just(LoopbackMode::External)];
    let tun =
        any::<([IpAddr; 2], [IpAddr; 2])>().prop_map(|(guest, gateway)| TunAddresses { guest, gateway });
    let texts = ("\\PC{0,100}", "\\PC{0,100}");
    (
        any::<(u16, u32, bool)>(),
        texts,
        vec((any::<bool>(), "\\PC{0,40}"), 0..20),
        vec(publication, 0..20),
        loopback,
        tun,
    )
        .prop_map(|((version, pid, no_net), (name, command), rules, publish, loopback, tun)| Hello {
            version,
            name,
            command,
            pid,
            rules,
            no_net,
            publish,
            loopback,
            tun,
        })
}

fn any_to_broker() -> impl Strategy<Value = ToBroker> {
    prop_oneof![
        any_hello().prop_map(ToBroker::Hello).boxed(),
        (any_hello(), vec(any::<u32>(), 0..=MAX_PORTS))
            .prop_map(|(hello, ports)| ToBroker::Guest(GuestHello { hello, ports }))
            .boxed(),
        (any::<(u64, u32)>(), "[a-z]{0,64}", any_request()).prop_map(|((id, pid), program, request)| {
            ToBroker::Request { id: RequestId(id), caller: Caller { pid, program }, request }
        }),
        any::<u64>().prop_map(|id| ToBroker::Forget(RequestId(id))),
    ]
}

fn any_to_runner() -> impl Strategy<Value = ToRunner> {
    let errno = (0..Errno::ALL.len()).prop_map(|index| *Errno::ALL.get(index).unwrap());
    let reply = prop_oneof![
        option::of(any_address()).prop_map(|local| Reply::Socket { local }),
        Just(Reply::StayInside),
        any::<bool>().prop_map(|raw| Reply::Echo { raw }),
        vec(any::<u8>(), 0..600).prop_map(Reply::Resolved),
    ];
    let failure = (errno, any::<bool>()).prop_map(|(errno, denied)| Failure { errno, denied });
    let result = prop_oneof![reply.prop_map(Ok), failure.prop_map(Err)];
    prop_oneof![
        any::<(u16, u64)>().prop_map(|(version, session)| ToRunner::Welcome(Welcome { version, session })),
        "\\PC{0,200}".prop_map(ToRunner::Refused),
        (any::<u64>(), result, any::<bool>()).prop_map(|(id, result, descriptor)| ToRunner::Answered {
            id: RequestId(id),
            result,
            descriptor
        }),
    ]
}

proptest! {
    #[test]
    fn to_broker_is_read_back(message in any_to_broker()) {
        prop_assert_eq!(decode::<ToBroker>(&encode(&message).unwrap()).unwrap(), message);
    }

    #[test]
    fn to_runner_is_read_back(message in any_to_runner()) {
        prop_assert_eq!(decode::<ToRunner>(&encode(&message).unwrap()).unwrap(), message);
    }

    #[test]
    fn noise_is_refused_or_read_within_bounds(bytes in vec(any::<u8>(), 0..2000)) {
        if let Ok(message) = decode::<ToBroker>(&bytes) {
            prop_assert_eq!(message.over_bound(), None);
        }
        if let Ok(message) = decode::<ToRunner>(&bytes) {
            prop_assert_eq!(message.over_bound(), None);
        }
    }

    /// Near misses reach deeper than noise.
    #[test]
    fn damage_is_refused_or_read_within_bounds(
        message in any_to_broker(), at in any::<prop::sample::Index>(), with: u8, cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = encode(&message).unwrap();
        let at = at.index(bytes.len());
        *bytes.get_mut(at).unwrap() = with;
        bytes.truncate(cut.index(bytes.len()) + 1);
        if let Ok(message) = decode::<ToBroker>(&bytes) {
            // What is read can be written again.
            prop_assert_eq!(decode::<ToBroker>(&encode(&message).unwrap()).unwrap(), message);
        }
    }
}
