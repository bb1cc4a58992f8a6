#![allow(clippy::unwrap_used, clippy::panic)]

use super::*;
use proptest::prelude::*;

/// `+rule` allows, `-rule` denies.
fn policy(rules: &[&str]) -> Policy {
    with(rules, false, LoopbackMode::Private)
}

fn with(rules: &[&str], no_net: bool, loopback: LoopbackMode) -> Policy {
    let rules: Vec<(bool, String)> =
        rules.iter().map(|text| (text.starts_with('+'), text.get(1..).unwrap().to_owned())).collect();
    Policy::new(&rules, no_net, loopback).unwrap()
}

fn tcp<'a>(address: &str, port: u16, names: &'a [&'a str]) -> Target<'a> {
    Target { address: address.parse().unwrap(), port, protocol: Protocol::Tcp, names, host: false }
}

fn allows(policy: &Policy, address: &str, port: u16, names: &[&str]) -> bool {
    policy.decide(&tcp(address, port, names)).is_allow()
}

const PUBLIC: &str = "93.184.216.34";

#[test]
fn without_rules_the_outside_is_allowed_and_protected_addresses_are_not() {
    let policy = policy(&[]);
    for address in [
        PUBLIC,
        "10.0.0.1",
        "192.168.1.1",
        "2606:2800:220:1::1",
        "fd00::1",
        "::ffff:10.0.0.1",
        "2a00::5efe:10.0.0.1",
    ] {
        assert!(allows(&policy, address, 80, &[]), "{address}");
    }
    for (address, what) in [
        ("127.0.0.1", Protected::HostLoopback),
        ("127.255.255.254", Protected::HostLoopback),
        ("0.0.0.0", Protected::HostLoopback),
        ("::1", Protected::HostLoopback),
        ("::", Protected::HostLoopback),
        ("::ffff:127.0.0.1", Protected::HostLoopback),
        ("::ffff:0.0.0.0", Protected::HostLoopback),
        ("169.254.0.1", Protected::LinkLocal),
        ("fe80::1", Protected::LinkLocal),
        ("febf::1", Protected::LinkLocal),
        ("169.254.169.254", Protected::Metadata),
        ("::ffff:169.254.169.254", Protected::Metadata),
        ("fd00:ec2::254", Protected::Metadata),
        ("100.100.100.200", Protected::Metadata),
        ("224.0.0.251", Protected::Multicast),
        ("ff02::1", Protected::Multicast),
        ("255.255.255.255", Protected::Broadcast),
        ("0.1.2.3", Protected::ThisNetwork),
        // Carried inside other addresses.
        ("::127.0.0.1", Protected::HostLoopback),
        ("::ffff:0:127.0.0.1", Protected::HostLoopback),
        ("64:ff9b::127.0.0.1", Protected::HostLoopback),
        ("64:ff9b::169.254.169.254", Protected::Metadata),
        ("64:ff9b:1::169.254.169.254", Protected::Metadata),
        ("64:ff9b:1:a9fe:a9:fe00::", Protected::Metadata),
        ("2002:7f00:1::1", Protected::HostLoopback),
        ("2002:a9fe:a9fe::1", Protected::Metadata),
        ("2001:0:102:304:0:ffff:80ff:fffe", Protected::HostLoopback),
        ("2a00::5efe:127.0.0.1", Protected::HostLoopback),
    ] {
        let decision = policy.decide(&tcp(address, 80, &[]));
        let Decision::Deny(Reason::Protected(found, _)) = decision else { panic!("{address}: {decision:?}") };
        assert_eq!(found, what, "{address}");
    }
}

#[test]
fn addresses_hidden_in_others_do_not_get_round_deny_rules() {
    let policy = policy(&["-10.0.0.0/8"]);
    for address in [
        "10.1.2.3",
        "::ffff:10.1.2.3",
        "::10.1.2.3",
        "64:ff9b::10.1.2.3",
        "64:ff9b:1::10.1.2.3",
        "2002:a01:203::1",
        "2001:0:102:304:0:ffff:f5fe:fdfc",
        "2a00::5efe:10.1.2.3",
    ] {
        assert!(!allows(&policy, address, 80, &[]), "{address}");
    }
    assert!(allows(&policy, "64:ff9b::11.1.2.3", 80, &[]));
    assert!(allows(&policy, "2a00::a01:203", 80, &[]));
}

#[test]
fn an_allowed_address_does_not_allow_what_carries_it() {
    let policy = policy(&["+10.0.0.0/8", "+host"]);
    assert!(allows(&policy, "::ffff:10.1.2.3", 80, &[]));
    assert!(!allows(&policy, "64:ff9b::10.1.2.3", 80, &[]));
    assert!(!allows(&policy, "64:ff9b::127.0.0.1", 80, &[]));
}

#[test]
fn wildcards_match_below_at_any_depth() {
    let policy = policy(&["+*.debian.org"]);
    for (name, expected) in [
        ("deb.debian.org", true),
        ("a.b.debian.org", true),
        ("DEB.Debian.ORG", true),
        ("deb.debian.org.", true),
        ("debian.org", false),
        (".debian.org", false),
        ("notdebian.org", false),
        ("debian.org.evil.example", false),
        ("deb.debian.org..", false),
        ("x\\.debian.org", false),
        ("x\u{0}.debian.org", false),
        ("deb.debıan.org", false),
        ("", false),
    ] {
        assert_eq!(allows(&policy, PUBLIC, 443, &[name]), expected, "{name:?}");
    }
}

#[test]
fn names_are_compared_without_case_and_final_dot() {
    let policy = policy(&["+Example.ORG."]);
    assert!(allows(&policy, PUBLIC, 443, &["example.org"]));
    assert!(allows(&policy, PUBLIC, 443, &["other.example", "EXAMPLE.org."]));
    assert!(!allows(&policy, PUBLIC, 443, &["www.example.org"]));
    assert_eq!(policy.exact_names().collect::<Vec<_>>(), ["example.org"]);
}

#[test]
fn a_rule_by_name_allows_an_address_only_under_that_name() {
    let policy = policy(&["+example.org:443"]);
    assert!(allows(&policy, PUBLIC, 443, &["example.org"]));
    assert!(!allows(&policy, PUBLIC, 80, &["example.org"]));
    assert!(!allows(&policy, PUBLIC, 443, &[]), "reached by number, never resolved");
    assert!(!allows(&policy, PUBLIC, 443, &["other.example"]));
    // Two names of one address: what one allows is allowed, the connection does not say by which it came.
    assert!(allows(&policy, PUBLIC, 443, &["other.example", "example.org"]));
}

#[test]
fn a_rule_by_address_holds_whatever_the_name() {
    let allowing = policy(&["+93.184.216.0/24:443"]);
    assert!(allows(&allowing, PUBLIC, 443, &["example.org"]));
    assert!(allows(&allowing, PUBLIC, 443, &[]));
    assert!(!allows(&allowing, "93.184.217.1", 443, &["example.org"]));
    let denying = policy(&["+example.org", "-93.184.216.34"]);
    assert!(!allows(&denying, PUBLIC, 443, &["example.org"]));
}

#[test]
fn deny_wins_in_any_order() {
    for rules in [["+*", "-*:25"], ["-*:25", "+*"]] {
        let policy = policy(&rules);
        assert!(allows(&policy, PUBLIC, 80, &[]));
        assert_eq!(policy.decide(&tcp(PUBLIC, 25, &[])), Decision::Deny(Reason::Rule("*:25".into())));
    }
    let shared = policy(&["-ads.example"]);
    assert!(!allows(&shared, PUBLIC, 80, &["good.example", "ads.example"]));
    assert!(allows(&shared, PUBLIC, 80, &["good.example"]));
}

#[test]
fn ports_and_protocols() {
    let policy = policy(&["+10.0.0.0/8:53/udp", "+10.0.0.2:8000-8010", "+10.0.0.3/icmp", "+[fd00::]/8:443"]);
    let decide = |address: &str, port, protocol| {
        policy.decide(&Target { protocol, ..tcp(address, port, &[]) }).is_allow()
    };
    assert!(decide("10.9.9.9", 53, Protocol::Udp));
    assert!(!decide("10.9.9.9", 53, Protocol::Tcp));
    assert!(!decide("10.9.9.9", 54, Protocol::Udp));
    for (port, expected) in [(7999, false), (8000, true), (8010, true), (8011, false)] {
        assert_eq!(decide("10.0.0.2", port, Protocol::Tcp), expected);
        assert_eq!(decide("10.0.0.2", port, Protocol::Udp), expected);
    }
    assert!(!decide("10.0.0.2", 0, Protocol::Icmp), "a rule with ports is not about ICMP");
    assert!(decide("10.0.0.3", 0, Protocol::Icmp));
    assert!(!decide("10.0.0.3", 80, Protocol::Tcp));
    assert!(decide("fd12::1", 443, Protocol::Tcp));
}

#[test]
fn only_rules_by_address_or_host_lift_a_protection() {
    let rebinding = policy(&["+evil.example", "+*.evil.example", "+*"]);
    for address in ["127.0.0.1", "::1", "0.0.0.0", "169.254.169.254", "fe80::1", "::ffff:127.0.0.1"] {
        assert!(!allows(&rebinding, address, 80, &["evil.example", "a.evil.example"]), "{address}");
    }
    let wide = policy(&["+0.0.0.0/0", "+[::]/0", "+126.0.0.0/7", "+[fd00::]/8", "+100.64.0.0/10"]);
    for address in ["127.0.0.1", "::1", "169.254.1.1", "fd00:ec2::254", "100.100.100.200", "224.0.0.1"] {
        assert!(!allows(&wide, address, 80, &[]), "{address}");
    }
    assert!(allows(&policy(&["+169.254.0.0/16"]), "169.254.169.254", 80, &[]));
    assert!(allows(&policy(&["+169.254.169.254:80"]), "169.254.169.254", 80, &[]));
    assert!(!allows(&policy(&["+169.254.169.254:80"]), "169.254.169.254", 81, &[]));
    assert!(!allows(&policy(&["+169.254.169.254:80"]), "169.254.1.1", 80, &[]));
    assert!(allows(&policy(&["+[fe80::1]"]), "fe80::1", 80, &[]));
    assert!(allows(&policy(&["+127.0.0.0/8"]), "127.0.0.53", 53, &[]));
    assert!(allows(&policy(&["+0.0.0.0"]), "127.0.0.1", 53, &[]), "the same address to the kernel");
}

#[test]
fn host_is_the_loopback_of_the_host() {
    let policy = policy(&["+host:8000", "+10.0.0.1"]);
    let host = |address: &str, port| Target { host: true, ..tcp(address, port, &[names::HOST_NAME]) };
    // The gateway's addresses, which stand for the loopback of their family.
    for address in ["198.18.0.1", "fd6b:736f::1", "127.0.0.1", "::1"] {
        assert!(policy.decide(&host(address, 8000)).is_allow(), "{address}");
        let Decision::Deny(reason) = policy.decide(&host(address, 8001)) else { panic!("{address}") };
        assert_eq!(reason.to_string(), "the host's loopback is protected: allow it with --allow host:8001");
    }
    assert!(!policy.decide(&tcp("198.18.0.1", 8000, &[])).is_allow());
    assert!(
        with(&["+host.kso.internal:8000"], false, LoopbackMode::Private)
            .decide(&host("198.18.0.1", 8000))
            .is_allow()
    );
    let denying = with(&["+host", "-host:22"], false, LoopbackMode::Private);
    assert!(denying.decide(&host("198.18.0.1", 23)).is_allow());
    assert!(!denying.decide(&host("198.18.0.1", 22)).is_allow());
    // The broker may try either loopback: denying one of them denies the gateway.
    let denying = with(&["+host", "-127.0.0.1:22"], false, LoopbackMode::Private);
    assert!(!denying.decide(&host("fd6b:736f::1", 22)).is_allow());
    let by_number = with(&["+127.0.0.1:80"], false, LoopbackMode::Private);
    assert!(by_number.decide(&host("198.18.0.1", 80)).is_allow());
    assert!(!by_number.decide(&host("fd6b:736f::1", 80)).is_allow());
}

#[test]
fn the_hosts_own_addresses_are_the_host() {
    let own = |port| Target { host: true, ..tcp("192.0.2.9", port, &["nas.example"]) };
    let Decision::Deny(reason) = policy(&[]).decide(&own(22)) else { panic!() };
    assert_eq!(reason.to_string(), "an address of the host is protected: allow it with --allow host:22");
    for (rules, expected) in [
        (&["+host:22"][..], true),
        (&["+192.0.2.9:22"], true),
        (&["+192.0.2.0/24:22"], false),
        (&["+127.0.0.1:22"], false),
        (&["+nas.example"], false),
        (&["+*"], false),
        (&["+host", "-192.0.2.0/24"], false),
        (&["+192.0.2.9", "-host:22"], false),
    ] {
        assert_eq!(policy(rules).decide(&own(22)).is_allow(), expected, "{rules:?}");
    }
    assert!(!with(&[], false, LoopbackMode::External).decide(&own(22)).is_allow());
}

#[test]
fn no_net_denies_everything() {
    let policy = with(&["+*", "+host"], true, LoopbackMode::External);
    for address in [PUBLIC, "127.0.0.1", "::1", "10.0.0.1"] {
        assert_eq!(policy.decide(&tcp(address, 80, &["example.org"])), Decision::Deny(Reason::NoNet));
    }
    assert_eq!(policy.decide_name("example.org"), Decision::Deny(Reason::NoNet));
}

#[test]
fn external_loopback_permits_loopback_and_nothing_more() {
    for rules in [&[][..], &["+example.org"]] {
        let policy = with(rules, false, LoopbackMode::External);
        for address in ["127.0.0.1", "127.3.2.1", "::1", "0.0.0.0", "::", "::ffff:127.0.0.1"] {
            assert!(allows(&policy, address, 80, &[]), "{address}");
        }
        for address in ["169.254.169.254", "fe80::1", "64:ff9b::127.0.0.1", "2002:7f00:1::1"] {
            assert!(!allows(&policy, address, 80, &[]), "{address}");
        }
    }
    let policy = with(&["-127.0.0.1:22"], false, LoopbackMode::External);
    assert!(!allows(&policy, "127.0.0.1", 22, &[]));
    assert!(!allows(&policy, "::ffff:127.0.0.1", 22, &[]));
    assert!(allows(&policy, "127.0.0.1", 23, &[]));
}

#[test]
fn the_brokers_rules_only_take_away() {
    let session = policy(&["+host:8000", "+example.org"]);
    let target = Target { host: true, ..tcp("127.0.0.1", 8000, &[]) };
    assert!(Policy::both(&policy(&[]), &session, &target).is_allow());
    assert!(Policy::both(&policy(&["+host"]), &session, &target).is_allow());
    assert!(
        !Policy::both(&policy(&["+*"]), &session, &target).is_allow(),
        "`*` is not about protected addresses"
    );
    assert!(!Policy::both(&policy(&["-host"]), &session, &target).is_allow());
    let public = tcp(PUBLIC, 443, &["example.org"]);
    assert!(Policy::both(&policy(&["+*:443"]), &session, &public).is_allow());
    assert!(!Policy::both(&policy(&["+*:443"]), &policy(&["+other.example"]), &public).is_allow());
    let Decision::Deny(reason) = Policy::both(&policy(&["-*:443"]), &session, &public) else { panic!() };
    assert_eq!(reason.to_string(), "by the broker's configuration: denied by rule `*:443`");
}

#[test]
fn names_that_no_rule_could_allow_are_not_looked_up() {
    let open = policy(&["-*.ads.example", "-mail.example:25"]);
    assert!(open.decide_name("example.org").is_allow());
    assert!(open.decide_name("mail.example").is_allow(), "only one port is denied");
    assert!(!open.decide_name("x.ADS.example.").is_allow());
    let listed = policy(&["+*.debian.org:443", "+host:80"]);
    assert!(listed.decide_name("deb.debian.org").is_allow());
    assert!(listed.decide_name(names::HOST_NAME).is_allow());
    assert!(!listed.decide_name("secret.evil.example").is_allow());
    assert!(!listed.decide_name("b\\.debian.org").is_allow());
    let by_address = policy(&["+10.0.0.0/8", "+deb.debian.org"]);
    assert!(by_address.decide_name("inside.example").is_allow(), "its address may be in 10.0.0.0/8");
    assert!(policy(&["+*:443"]).decide_name("example.org").is_allow());
    assert!(!Policy::both_names(&listed, &open, "example.org").is_allow());
    assert!(Policy::both_names(&listed, &open, "deb.debian.org").is_allow());
}

#[test]
fn an_error_shows_the_place() {
    for (text, column, why) in [
        ("", 0, "missing"),
        (":443", 0, "missing"),
        ("/tcp", 0, "missing"),
        ("exa mple.org", 3, "no blanks"),
        (" example.org", 0, "no blanks"),
        ("example.org:", 12, "from 1 to 65535"),
        ("example.org:0", 12, "from 1 to 65535"),
        ("example.org:http", 12, "from 1 to 65535"),
        ("example.org:+80", 12, "from 1 to 65535"),
        ("example.org:80-", 15, "from 1 to 65535"),
        ("example.org:1-70000", 14, "from 1 to 65535"),
        ("example.org:90-80", 12, "80-90"),
        ("example.org/sctp", 12, "tcp, udp or icmp"),
        ("example.org/TCP", 12, "tcp, udp or icmp"),
        ("example.org:80/", 15, "tcp, udp or icmp"),
        ("example.org:80/tcp/x", 18, "ends before"),
        ("example.org:80:90", 14, "ends before"),
        ("example.org/8", 11, "only an address"),
        ("*/8", 1, "only an address"),
        ("example.org:80/icmp", 12, "no ports"),
        ("10.0.0.0/33", 9, "from 0 to 32"),
        ("10.0.0.0/999", 9, "from 0 to 32"),
        ("10.1.2.3/8", 0, "10.0.0.0/8"),
        ("[fd00::1]/8", 0, "[fd00::]/8"),
        ("[fd00::]/129", 9, "from 0 to 128"),
        ("10.0.0", 0, "four numbers"),
        ("10.0.0.256", 0, "four numbers"),
        ("010.0.0.1", 0, "four numbers"),
        ("[::1", 0, "not closed"),
        ("[]:80", 1, "not an IPv6"),
        ("[10.0.0.1]", 1, "not an IPv6"),
        ("[fe80::1%eth0]", 1, "not an IPv6"),
        ("[::1]x", 5, "after `]`"),
        ("::1", 0, "in brackets"),
        ("fd00::/8", 0, "in brackets"),
        ("*.", 2, "not a name"),
        ("*debian.org", 0, "at the beginning"),
        ("deb.*.org", 4, "at the beginning"),
        ("**", 0, "at the beginning"),
        ("a..b", 0, "not a name"),
        ("bücher.example", 1, "ASCII"),
        ("http://example.org", 4, "no URL"),
        ("user@example.org", 4, "letters, digits"),
        ("localhost:80", 0, "write `host`"),
    ] {
        let error = check(text).unwrap_err();
        let RuleError::Text(placed) = &error else { panic!("{error}") };
        assert_eq!(placed.column(), column, "{error}");
        assert!(placed.why().contains(why), "{error}");
    }
    assert_eq!(
        check("10.0.0.0/33:80").unwrap_err().to_string(),
        "cannot read the rule `10.0.0.0/33:80`\n  10.0.0.0/33:80\n           ^^ a prefix length here is a number from 0 to 32"
    );
    assert!(!check("\u{1b}[2Jx").unwrap_err().to_string().contains('\u{1b}'));
    assert!(check(&"a".repeat(600)).unwrap_err().to_string().contains("at most 512"));
    let many = vec![(true, "*".to_owned()); MAX_RULES + 1];
    assert_eq!(
        Policy::new(&many, false, LoopbackMode::Private).unwrap_err(),
        RuleError::TooMany(MAX_RULES + 1)
    );
}

#[test]
fn the_whole_syntax_is_read() {
    for text in [
        "example.org",
        "example.org.",
        "_srv.example_x.org",
        "nas",
        "xn--bcher-kva.example:80",
        "*.org",
        "*",
        "*:443",
        "*/udp",
        "host",
        "host:8000/tcp",
        "10.0.0.1",
        "10.0.0.0/8",
        "10.0.0.0/8:53/udp",
        "10.0.0.0/8/udp",
        "0.0.0.0/0",
        "[::1]",
        "[fd00::]/8:443",
        "[fd00::]/8:1-65535/tcp",
        "[::]/0",
        "10.0.0.1/icmp",
        "[::ffff:10.0.0.0]/104",
    ] {
        check(text).unwrap_or_else(|error| panic!("{error}"));
    }
    assert!(allows(&policy(&["+[::ffff:10.0.0.0]/104"]), "10.2.3.4", 80, &[]));
    assert!(allows(&policy(&["+10.0.0.0/8"]), "::ffff:10.2.3.4", 80, &[]));
}

fn rule_text() -> impl Strategy<Value = String> {
    let subject = prop_oneof![
        Just("*".to_owned()),
        Just("host".to_owned()),
        "[a-c]{1,2}(\\.[a-c]{1,2}){0,2}",
        "\\*\\.[a-c]{1,2}(\\.[a-c]{1,2}){0,1}",
        (any::<IpAddr>(), 0..=128_u8).prop_map(|(address, prefix)| {
            let prefix = if address.is_ipv4() { prefix.min(32) } else { prefix };
            let net = ipnet::IpNet::new(address, prefix).unwrap().trunc();
            if address.is_ipv4() { net.to_string() } else { format!("[{}]/{prefix}", net.addr()) }
        }),
        Just("127.0.0.0/8".to_owned()),
        Just("169.254.169.254".to_owned()),
    ];
    let ports = prop_oneof![
        Just(String::new()),
        (1..100_u16, 0..100_u16).prop_map(|(low, more)| format!(":{low}-{}", low + more))
    ];
    let protocol = prop_oneof![Just(""), Just("/tcp"), Just("/udp")];
    (subject, ports, protocol).prop_map(|(subject, ports, protocol)| format!("{subject}{ports}{protocol}"))
}

fn rules() -> impl Strategy<Value = Vec<(bool, String)>> {
    proptest::collection::vec((any::<bool>(), rule_text()), 0..6)
}

fn place() -> impl Strategy<Value = (IpAddr, u16, Protocol, Vec<String>, bool)> {
    let address = prop_oneof![
        any::<IpAddr>(),
        any::<[u8; 3]>().prop_map(|[a, b, c]| IpAddr::from([127, a, b, c])),
        any::<[u8; 2]>().prop_map(|[a, b]| IpAddr::from([169, 254, a, b])),
        any::<Ipv4Addr>().prop_map(|address| address.to_ipv6_mapped().into()),
        any::<Ipv4Addr>().prop_map(|address| address.to_ipv6_compatible().into()),
    ];
    let protocol = prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp), Just(Protocol::Icmp)];
    let names = proptest::collection::vec("[a-cA-C]{1,2}(\\.[a-c]{1,2}){0,2}\\.?", 0..3);
    (address, 0..200_u16, protocol, names, any::<bool>())
}

proptest! {
    #[test]
    fn rules_that_people_write_are_read(text in rule_text()) {
        prop_assert!(check(&text).is_ok());
    }

    #[test]
    fn no_text_panics(text in "\\PC{0,60}") {
        let _ = check(&text).map_err(|error| error.to_string());
    }

    #[test]
    fn no_text_like_a_rule_panics(text in "[0-9a-c:./\\[\\]*\\-é %]{0,40}") {
        let _ = check(&text).map_err(|error| error.to_string());
    }

    /// What holds for every policy and every destination.
    #[test]
    fn invariants(rules in rules(), (address, port, protocol, names, host) in place(), more in rule_text()) {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let target = Target { address, port, protocol, names: &names, host };
        let policy = Policy::new(&rules, false, LoopbackMode::Private).unwrap();
        let decision = policy.decide(&target);

        // The order of rules does not matter.
        let reversed: Vec<_> = rules.iter().rev().cloned().collect();
        let reversed = Policy::new(&reversed, false, LoopbackMode::Private).unwrap();
        prop_assert_eq!(reversed.decide(&target).is_allow(), decision.is_allow());

        // An IPv4 address and its mapped form are one.
        if let IpAddr::V4(v4) = address {
            let mapped = Target { address: v4.to_ipv6_mapped().into(), ..target };
            prop_assert_eq!(policy.decide(&mapped), decision.clone());
        }

        // One more deny rule never allows more; deny of everything denies everything.
        let with_deny = |text: &str| {
            let rules: Vec<_> = rules.iter().cloned().chain([(false, text.to_owned())]).collect();
            Policy::new(&rules, false, LoopbackMode::Private).unwrap()
        };
        if with_deny(&more).decide(&target).is_allow() {
            prop_assert!(decision.is_allow());
        }
        prop_assert!(!with_deny("*").decide(&target).is_allow());

        // No name opens a protected address.
        let by_address = rules.iter().any(|(allow, text)| *allow && text.starts_with(|c: char| c.is_ascii_digit() || c == '[' || c == 'h'));
        if !by_address && decision.is_allow() {
            prop_assert!(!host);
            prop_assert_eq!(protected::protection(canonical(address)), None);
        }

        // A broker's policy takes away.
        let other = Policy::new(&[(true, more.clone())], false, LoopbackMode::Private).unwrap();
        if Policy::both(&other, &policy, &target).is_allow() {
            prop_assert!(decision.is_allow());
        }
        prop_assert_eq!(Policy::both(&Policy::default(), &policy, &target), decision);
    }
}
