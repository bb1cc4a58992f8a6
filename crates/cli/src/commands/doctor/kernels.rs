//! Which makes of external kernel can be had here.

use super::{Check, Subject};
use kso_core::kernels::Make;

/// How they are asked for: a make can be called as something else that is looked at.
pub(super) fn names() -> impl Iterator<Item = String> {
    Make::ALL.into_iter().map(name)
}

fn name(make: Make) -> String {
    format!("kernel:{}", make.name())
}

/// Those that are wanted.
pub(super) fn look(wanted: impl Fn(&str) -> bool) -> Vec<Subject> {
    if !names().any(|name| wanted(&name)) {
        return Vec::new();
    }
    let stand_ins = stand_ins();
    let asked = kso_broker::what_is_missing().into_iter().filter(|(make, _)| wanted(&name(*make)));
    let subject = |(make, missing): (Make, Vec<String>)| {
        let mut checks: Vec<Check> = missing.iter().map(|text| of(text)).collect();
        // The host's own sockets need none, nor do files.
        if !matches!(make.name(), "host" | "image") {
            checks.push(stand_ins.clone());
        }
        Subject::new(&name(make), format!("--kernel {}", make.name()), checks)
    };
    asked.map(subject).collect()
}

/// `WHAT: what to do`.
fn of(text: &str) -> Check {
    match text.split_once(": ") {
        Some((what, advice)) => Check::missing(what, "", advice),
        None => Check::missing(text, "", ""),
    }
}

/// Sockets of another kernel have stand-ins in a network namespace of their own.
fn stand_ins() -> Check {
    let name = "stand-ins";
    match kso_sys::standin::new_network(|| Ok(())) {
        Ok(_) => Check::ok(name, "a network namespace for the sockets that programs hold"),
        Err(error) => Check::missing(name, format!("no network namespace: {error}"), "run kso as root"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_has_a_name_and_an_advice() {
        let check = of("runsc: apt-get install runsc, or https://gvisor.dev");
        assert_eq!(
            (check.name.as_str(), check.advice.as_deref()),
            ("runsc", Some("apt-get install runsc, or https://gvisor.dev"))
        );
        assert_eq!(of("root").name, "root");
    }
}
