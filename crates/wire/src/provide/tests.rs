#![allow(clippy::unwrap_used)]

use super::*;
use crate::{decode, encode};
use proptest::collection::vec;
use proptest::prelude::*;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn address() -> SocketAddr {
    "192.0.2.1:443".parse().unwrap()
}

fn options() -> SocketOptions {
    let mut options = SocketOptions::default();
    options.push(OptionName::NoDelay, 1);
    options
}

#[test]
fn messages_look_as_they_always_did() {
    let connect =
        Connect { stream: StreamId(7), peer: address(), family: Family::V4, port: 5000, options: options() };
    let listen = Listen {
        listener: ListenerId(3),
        address: address(),
        backlog: 128,
        options: SocketOptions::default(),
    };
    let (path, caching) = (b"/srv".to_vec(), Caching::Always);
    let share = Share { stream: StreamId(9), path, read_only: true, caching };
    let to_provider = [
        (ToProvider::Hello { version: 1, name: "web".into() }, "000103776562"),
        (ToProvider::Connect(connect), "010700c0000201bb03008827010d02"),
        (ToProvider::Listen(listen), "020300c0000201bb03800200"),
        (ToProvider::Offer(Offer { listener: ListenerId(3), stream: StreamId(8) }), "030308"),
        (ToProvider::Unlisten(ListenerId(3)), "0403"),
        (ToProvider::Ping(1), "0701"),
        (ToProvider::Share(share), "0809042f7372760102"),
    ];
    for (message, golden) in to_provider {
        let bytes = hex(&encode(&message).unwrap());
        assert!(bytes.starts_with(golden), "{message:?}: {bytes}");
    }
    let to_broker = [
        (ToBroker::Connected { stream: StreamId(7), local: address() }, "020700c0000201bb03"),
        (ToBroker::Failed { stream: StreamId(7), errno: Errno::ECONNREFUSED }, "030723"),
        (ToBroker::Pong(1), "0901"),
        (ToBroker::Draining, "0a"),
        (ToBroker::Shared { stream: StreamId(9) }, "0c09"),
    ];
    for (message, golden) in to_broker {
        assert_eq!(hex(&encode(&message).unwrap()), golden, "{message:?}");
    }
    let ticket = Ticket { session: 1, stream: StreamId(2) };
    assert_eq!(hex(&ticket.bytes()), "6b736f54010000000000000000000000000000000200000000000000");
    assert_eq!(Ticket::parse(&ticket.bytes()), Some(ticket));
    assert_eq!(Ticket::parse(&[0; Ticket::SIZE]), None);
    assert!(u32::from_le_bytes(*b"ksoT") as usize > crate::frame::MAX_FRAME);
}

fn addresses() -> impl Strategy<Value = SocketAddr> {
    any::<SocketAddr>().prop_map(|address| match address {
        // The scope and flow of an IPv6 address do not cross the wire: they mean nothing elsewhere.
        SocketAddr::V6(v6) => SocketAddr::new((*v6.ip()).into(), v6.port()),
        v4 => v4,
    })
}

fn errnos() -> impl Strategy<Value = Errno> {
    proptest::sample::select(Errno::ALL)
}

fn to_broker() -> impl Strategy<Value = ToBroker> {
    prop_oneof![
        (
            ".{0,32}",
            vec(proptest::sample::select(&Service::ALL[..]), 0..=6),
            vec(any::<IpAddr>(), 0..8),
            any::<u128>()
        )
            .prop_map(|(kernel, services, addresses, session)| {
                ToBroker::Welcome(Welcome { version: 1, kernel, services, addresses, session })
            }),
        ".{0,64}".prop_map(ToBroker::Refused),
        (any::<u64>(), addresses())
            .prop_map(|(id, local)| ToBroker::Connected { stream: StreamId(id), local }),
        (any::<u64>(), errnos()).prop_map(|(id, errno)| ToBroker::Failed { stream: StreamId(id), errno }),
        any::<u64>().prop_map(|id| ToBroker::Shared { stream: StreamId(id) }),
        (any::<u64>(), any::<u64>(), addresses(), addresses()).prop_map(|(listener, stream, peer, local)| {
            ToBroker::Accepted { listener: ListenerId(listener), stream: StreamId(stream), peer, local }
        }),
        (any::<u64>(), any::<u64>(), any::<u64>(), proptest::option::of(errnos())).prop_map(
            |(id, bytes_in, bytes_out, errno)| ToBroker::Ended {
                stream: StreamId(id),
                bytes_in,
                bytes_out,
                errno
            }
        ),
        (any::<u64>(), vec(any::<u8>(), 0..64))
            .prop_map(|(id, bytes)| ToBroker::Answered { id, result: Ok(Reply::Resolved(bytes)) }),
    ]
}

#[test]
fn a_path_has_a_bound() {
    let share = |length: usize| {
        let (path, caching) = (vec![b'/'; length], Caching::Auto);
        ToProvider::Share(Share { stream: StreamId(1), path, read_only: false, caching })
    };
    assert_eq!(decode::<ToProvider>(&encode(&share(MAX_PATH)).unwrap()).unwrap(), share(MAX_PATH));
    assert!(encode(&share(MAX_PATH + 1)).is_err());
    let mut bytes = encode(&share(MAX_PATH - 1)).unwrap();
    // One more in the length and in the path, by hand: 4095 is ff 1f, 4097 is 81 20.
    bytes.splice(2..4, [0x81, 0x20]);
    bytes.splice(4..4, [b'/'; 2]);
    assert!(decode::<ToProvider>(&bytes).is_err());
}

proptest! {
    #[test]
    fn what_a_provider_says_is_read_as_it_was_written(message in to_broker()) {
        prop_assert_eq!(decode::<ToBroker>(&encode(&message).unwrap()).unwrap(), message);
    }

    #[test]
    fn noise_is_an_error_and_no_panic(bytes in vec(any::<u8>(), 0..512)) {
        let _ = decode::<ToBroker>(&bytes);
        let _ = decode::<ToProvider>(&bytes);
    }
}
