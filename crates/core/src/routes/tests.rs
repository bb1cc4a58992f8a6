#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use super::*;
use proptest::prelude::{any, prop_assert_eq, proptest};

fn asked(service: Service, address: &str, port: u16) -> Asked<'static> {
    Asked { service, address: address.parse().unwrap(), port, program: "nginx" }
}

#[test]
fn routes_are_read() {
    let route = Route::parse("tcp-listen:80=gvisor,host").unwrap();
    assert_eq!(route.services, [Service::TcpListen]);
    assert_eq!((route.ports, route.strategy), (Some(80..=80), Strategy::Failover));
    assert_eq!(route.kernels, ["gvisor", "host"]);
    let route = Route::parse("tcp-connect+udp:1-1023@2001:db8::/32%nginx=shuffle/5:a,b").unwrap();
    assert_eq!(route.services, [Service::TcpConnect, Service::Udp]);
    assert_eq!(route.network, Some("2001:db8::/32".parse().unwrap()));
    assert_eq!(route.program.as_deref(), Some("nginx"));
    assert_eq!(route.strategy, Strategy::Shuffle { every: Duration::from_secs(5) });
    assert_eq!(Route::parse("tcp@10.1.2.3=x").unwrap().network, Some("10.1.2.3/32".parse().unwrap()));
    assert_eq!(Route::parse("*=x").unwrap().services.len(), 6);
    assert_eq!(Route::all_tcp("gvisor").unwrap().strategy, Strategy::Fixed);
}

#[test]
fn errors_show_the_place() {
    for (text, at, why) in [
        ("tcp", 3, "a kernel is missing"),
        ("http=x", 0, "a service is one of"),
        ("tcp+=x", 4, "a service is one of"),
        ("tcp:0=x", 4, "a port is a number"),
        ("tcp:90-80=x", 4, "lower port"),
        ("tcp@10.0.0.0/33=x", 4, "a network"),
        ("tcp%=x", 4, "a program"),
        ("tcp=", 4, "name of a kernel"),
        ("tcp=a,,b", 6, "name of a kernel"),
        ("tcp=a,a", 6, "already"),
        ("tcp=best:a", 4, "a strategy is"),
        ("tcp=shuffle/0:a,b", 4, "seconds"),
        ("tcp=fixed:a,b", 10, "failover"),
    ] {
        let error = Route::parse(text).unwrap_err();
        assert_eq!(error.column(), at, "{error}");
        assert!(error.why().contains(why), "{error}");
    }
}

#[test]
fn the_first_route_that_fits_decides() {
    let routes = ["tcp-listen:80=a", "tcp@10.0.0.0/8=b", "tcp-connect%curl=c", "ping=d"];
    let mut routes = Routes::new(routes.map(|text| Route::parse(text).unwrap()).into());
    let mut first = |asked: &Asked<'_>| {
        routes.choose(asked, Instant::now(), 0, |_| true).map(|mut kernels| kernels.remove(0))
    };
    assert_eq!(first(&asked(Service::TcpListen, "10.0.0.1", 80)).as_deref(), Some("a"));
    assert_eq!(first(&asked(Service::TcpListen, "0.0.0.0", 81)), None);
    assert_eq!(first(&asked(Service::TcpConnect, "::ffff:10.0.0.1", 80)).as_deref(), Some("b"));
    let curl = Asked { program: "curl", ..asked(Service::TcpConnect, "192.0.2.1", 80) };
    assert_eq!(first(&curl).as_deref(), Some("c"));
    assert_eq!(first(&asked(Service::TcpConnect, "192.0.2.1", 80)), None);
    assert_eq!(routes.kernels(), ["a", "b", "c", "d"]);
}

#[test]
fn strategies_choose() {
    let now = Instant::now();
    let ask = asked(Service::TcpConnect, "192.0.2.1", 80);
    let of = |text: &str, times: usize, up: &[&str]| -> Vec<String> {
        let mut routes = Routes::new(vec![Route::parse(text).unwrap()]);
        let up = |name: &str| up.contains(&name);
        (0..times).map(|lot| routes.choose(&ask, now, lot as u64, up).unwrap().remove(0)).collect()
    };
    assert_eq!(of("tcp=a,b", 2, &["a", "b"]), ["a", "a"]);
    assert_eq!(of("tcp=a,b", 2, &["b"]), ["b", "b"]);
    assert_eq!(of("tcp=a,b", 1, &[]), ["a"]);
    assert_eq!(of("tcp=spread:a,b,c", 4, &["a", "b", "c"]), ["a", "b", "c", "a"]);
    assert_eq!(of("tcp=spread:a,b,c", 3, &["a", "c"]), ["a", "c", "a"]);
    let first = |turns| {
        let mut routes = Routes::after(vec![Route::parse("tcp=spread:a,b,c").unwrap()], turns);
        routes.choose(&ask, now, 0, |_| true).unwrap().remove(0)
    };
    assert_eq!(
        [first(0), first(1), first(5), first(720_721)],
        ["a", "b", "c", "b"],
        "sessions take turns, too"
    );
    assert_eq!(of("tcp=shuffle/60:a,b", 3, &["a", "b"]), ["a", "a", "a"], "a lot holds");
    assert_eq!(of("tcp=a", 1, &[]), ["a"]);
    let mut routes = Routes::new(vec![Route::parse("tcp=shuffle/60:a,b").unwrap()]);
    let first = routes.choose(&ask, now, 1, |_| true).unwrap();
    assert_eq!(first, ["b", "a"]);
    assert_eq!(routes.choose(&ask, now, 0, |name| name == "a").unwrap(), ["a"], "not one that is down");
    assert_eq!(routes.choose(&ask, now + Duration::from_secs(61), 1, |_| true).unwrap(), ["b", "a"]);
}

proptest! {
    #[test]
    fn noise_is_an_error_and_no_panic(text in "\\PC{0,64}") {
        let _ = Route::parse(&text);
    }

    #[test]
    fn who_is_up_is_asked_once_each_and_nobody_else(
        strategy in proptest::sample::select(vec!["failover", "spread", "shuffle/3"]),
        count in 1_usize..8,
        up in proptest::collection::vec(any::<bool>(), 8),
        lots in proptest::collection::vec((any::<u64>(), 0_u64..10), 1..20),
    ) {
        let names: Vec<String> = (0..count).map(|at| format!("k{at}")).collect();
        let route = Route::parse(&format!("tcp={strategy}:{}", names.join(","))).unwrap();
        let mut routes = Routes::new(vec![route]);
        let is_up = |name: &str| names.iter().position(|own| own == name).is_some_and(|at| up[at]);
        let ask = asked(Service::TcpConnect, "192.0.2.1", 80);
        let start = Instant::now();
        for (lot, seconds) in lots {
            let chosen = routes.choose(&ask, start + Duration::from_secs(seconds), lot, is_up).unwrap();
            let mut expected: Vec<String> = names.iter().filter(|name| is_up(name)).cloned().collect();
            if expected.is_empty() {
                expected.push(names[0].clone());
            }
            let mut sorted = chosen.clone();
            sorted.sort();
            prop_assert_eq!(&sorted, &expected);
            if strategy == "failover" {
                prop_assert_eq!(&chosen, &expected);
            }
        }
    }
}
