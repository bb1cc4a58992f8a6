//! What `kso run` needs: each feature of the kernel is used once, in a child where that is for good.

use super::{Check, Subject, attempt, own};
use kso_runner::{Publishing, interceptor};
use kso_sys::{lock, notify, process, tun};
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

/// A sandbox starts in a tenth of a second.
const LIMIT: Duration = Duration::from_secs(60);
/// A child's statuses from here on are no errno, but a set of features.
const FEATURES: i32 = 200;
const SYNCHRONOUS: i32 = 1;

pub(super) fn look() -> Subject {
    let mut checks = vec![linux(), namespaces()];
    if checks.iter().all(|check| check.state == super::State::Ok) {
        checks.extend([supervision(), calls_wait(), device()]);
    }
    checks.push(locks());
    // Without these it has been said why.
    if checks.iter().all(|check| check.state != super::State::Missing) {
        checks.push(sandbox());
    }
    Subject::new("run", "kso run (programs in a sandbox on this host)", checks)
}

fn linux() -> Check {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let cookie =
        UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|socket| kso_sys::netns_cookie(socket.as_fd()));
    match cookie {
        Ok(_) => Check::ok("Linux", release),
        Err(error) => Check::missing(
            "Linux",
            format!("{release}: no SO_NETNS_COOKIE ({error})"),
            "Linux 5.14 or newer is needed",
        ),
    }
}

/// What a child of the sandbox's kind, in new namespaces, makes of `body`: its status.
fn inside(body: impl FnOnce() -> i32) -> io::Result<i32> {
    let child = process::fork(process::ALL_NAMESPACES, body)?;
    Ok(process::wait(Some(child.pid))?.map_or(FEATURES - 1, |(_, ended)| ended.shell_status()))
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(FEATURES - 1)
}

fn namespaces() -> Check {
    let name = "namespaces";
    match inside(|| 0) {
        Ok(_) => Check::ok(name, "user, network, mount, pid, ipc, uts"),
        Err(source) => {
            // The words of the sandbox itself: they say what to do.
            let error = kso_runner::SandboxError::Namespaces { source }.to_string();
            let (found, advice) = error.split_once('\n').unwrap_or((&error, ""));
            Check::missing(name, found, advice)
        }
    }
}

fn supervision() -> Check {
    let name = "supervision";
    let rules = interceptor::rules(Publishing::Ports, false);
    let status = inside(|| match notify::install(&rules) {
        Ok(notifier) => {
            let synchronous = notify::Listener::new(notifier).synchronous_wake_up();
            FEATURES + if synchronous { SYNCHRONOUS } else { 0 }
        }
        Err(error) => errno(&error),
    });
    match status {
        Ok(status) if status == FEATURES + SYNCHRONOUS => {
            Check::ok(name, "seccomp user notification, with wake-ups on the caller's core")
        }
        Ok(FEATURES) => Check::less(
            name,
            "seccomp user notification, without wake-ups on the caller's core",
            "each connect takes some 70 us more than with Linux 6.6 or newer",
        ),
        Ok(number) => {
            let error = io::Error::from_raw_os_error(number);
            Check::missing(
                name,
                format!("the seccomp filter was refused: {error}"),
                "Linux needs CONFIG_SECCOMP_FILTER, and a container must permit seccomp(2): --security-opt seccomp=unconfined",
            )
        }
        Err(error) => Check::missing(name, error.to_string(), "see namespaces"),
    }
}

fn calls_wait() -> Check {
    let name = "signals";
    if notify::waits_killable() {
        return Check::ok(name, "wait while a call is supervised");
    }
    Check::less(
        name,
        "can interrupt a call that is supervised (no SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV)",
        "rarely a connect returns EINTR that would not: Linux 5.19 or newer has none of it",
    )
}

fn device() -> Check {
    let name = "TUN";
    let status = inside(|| match tun::create("kso0") {
        Ok(_) => 0,
        Err(error) => errno(&error),
    });
    let error = match status {
        Ok(0) => return Check::ok(name, "/dev/net/tun: datagrams, ping and names"),
        Ok(number) => io::Error::from_raw_os_error(number),
        Err(error) => error,
    };
    let advice = match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "this user may not open /dev/net/tun: chmod 0666 /dev/net/tun, as most systems have it"
        }
        _ => "load the tun module: modprobe tun (in a container: --device /dev/net/tun)",
    };
    Check::missing(name, format!("/dev/net/tun: {error}"), advice)
}

fn locks() -> Check {
    let name = "socket filters";
    match lock::probe() {
        Ok(()) => Check::ok(name, "sockets are locked to the peer that was approved"),
        Err(error) => Check::missing(
            name,
            format!("SO_ATTACH_FILTER is refused to this user: {error}"),
            "run kso as root, or with --unlocked for programs that you trust not to race their supervisor",
        ),
    }
}

/// The proof.
fn sandbox() -> Check {
    let name = "a sandbox";
    let words = ["run", "--no-net", "--", "/bin/sh", "-c", "echo it runs"];
    match own(&words).and_then(|mut command| attempt(&mut command, LIMIT)) {
        Ok(text) if text.ends_with("it runs") => Check::ok(name, "runs"),
        Ok(text) | Err(text) => Check::missing(name, text, "see what kso run -vv -- true says"),
    }
}
