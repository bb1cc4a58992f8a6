//! Rules and a destination. A destination of 21 bytes (flags, protocol, port, address), then lines: `+RULE`
//! allows, `-RULE` denies, anything else is a name of the destination.
#![no_main]

use kso_core::names;
use kso_core::policy::{Policy, Target, canonical, check};
use kso_wire::{LoopbackMode, Protocol};
use libfuzzer_sys::fuzz_target;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

fn compile(rules: &[(bool, String)], no_net: bool, loopback: LoopbackMode) -> Policy {
    Policy::new(rules, no_net, loopback).expect("each of them was read")
}

fn always_protected(address: IpAddr) -> bool {
    match canonical(address) {
        IpAddr::V4(v4) => {
            v4.is_loopback()
                || v4.is_link_local()
                || v4.is_multicast()
                || v4.is_broadcast()
                || v4.octets()[0] == 0
        }
        IpAddr::V6(v6) => {
            let embedded = match v6.segments() {
                [0, 0, 0, 0, 0, 0, high, low]
                | [0x64, 0xff9b, 0, 0, 0, 0, high, low]
                | [0x2002, high, low, ..] => Some(Ipv4Addr::from(u32::from(high) << 16 | u32::from(low))),
                _ => None,
            };
            v6.is_loopback()
                || v6.is_multicast()
                || v6.is_unicast_link_local()
                || embedded.is_some_and(|v4| v4 != Ipv4Addr::new(0, 0, 0, 1) && always_protected(v4.into()))
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&[flags, protocol, high, low], rest)) = bytes.split_first_chunk::<4>() else { return };
    let Some((address, text)) = rest.split_first_chunk::<16>() else { return };
    let text = String::from_utf8_lossy(text);
    let address: IpAddr = if flags & 1 == 0 {
        Ipv6Addr::from(*address).into()
    } else {
        let [a, b, c, d, ..] = *address;
        Ipv4Addr::new(a, b, c, d).into()
    };
    let protocol = match protocol % 3 {
        0 => Protocol::Tcp,
        1 => Protocol::Udp,
        _ => Protocol::Icmp,
    };
    let mut rules = Vec::new();
    let mut words: Vec<&str> = Vec::new();
    for line in text.split('\n').take(40) {
        match line.split_at_checked(1) {
            Some((sign @ ("+" | "-"), rule)) => match check(rule) {
                Ok(()) => rules.push((sign == "+", rule.to_owned())),
                Err(error) => {
                    let error = error.to_string();
                    assert!(!error.chars().any(|c| c.is_control() && c != '\n'), "{error:?}");
                }
            },
            _ => words.push(line),
        }
    }
    let host = flags & 2 != 0;
    let target = Target { address, port: u16::from_be_bytes([high, low]), protocol, names: &words, host };
    let policy = compile(&rules, false, LoopbackMode::Private);
    let decision = policy.decide(&target);
    let _ = format!("{decision:?}");

    // The order of rules does not matter.
    let reversed: Vec<_> = rules.iter().rev().cloned().collect();
    assert_eq!(
        compile(&reversed, false, LoopbackMode::Private).decide(&target).is_allow(),
        decision.is_allow()
    );
    // An IPv4 address and its mapped form are one.
    if let IpAddr::V4(v4) = address {
        assert_eq!(policy.decide(&Target { address: v4.to_ipv6_mapped().into(), ..target }), decision);
    }
    // Nothing passes --no-net or a rule that denies everything.
    assert!(!compile(&rules, true, LoopbackMode::External).decide(&target).is_allow());
    let mut closed = rules.clone();
    closed.push((false, "*".into()));
    assert!(!compile(&closed, false, LoopbackMode::External).decide(&target).is_allow());
    // Only rules by address or `host` open what is protected.
    let subject = |rule: &str| rule.split([':', '/']).next().unwrap_or_default().to_owned();
    let by_name = |rule: &str| !rule.starts_with('[') && subject(rule).parse::<Ipv4Addr>().is_err();
    let names_only: Vec<_> = rules
        .iter()
        .filter(|(_, rule)| by_name(rule) && !rule.to_ascii_lowercase().starts_with("host"))
        .cloned()
        .collect();
    if host || always_protected(address) {
        assert!(!compile(&names_only, false, LoopbackMode::Private).decide(&target).is_allow());
    }
    // Without a rule by name, names change nothing, except that the gateway is known by its name.
    let no_names: Vec<_> = rules.iter().filter(|(_, rule)| !by_name(rule)).cloned().collect();
    if !host {
        let policy = compile(&no_names, false, LoopbackMode::Private);
        assert_eq!(policy.decide(&target), policy.decide(&Target { names: &[], ..target }));
    }
    // A broker's rules take away.
    let (broker, session) = rules.split_at(rules.len() / 2);
    let (broker, session) =
        (compile(broker, false, LoopbackMode::Private), compile(session, false, LoopbackMode::Private));
    if Policy::both(&broker, &session, &target).is_allow() {
        assert!(session.decide(&target).is_allow());
    }
    // A name that may not be looked up is allowed under no name.
    for name in &words {
        if let Some(normal) = names::normal(name) {
            assert_eq!(names::normal(&normal).as_deref(), Some(normal.as_str()));
            assert_eq!(policy.decide_name(name).is_allow(), policy.decide_name(&normal).is_allow());
        }
    }
});
