//! `kso guest`: a program in a guest that something else started, with the host's sockets.

use super::program::resolv_conf;
use crate::output;
use anyhow::{Context, Result, bail};
use clap::Args;
use kso_guest::resident::{self, ResidentConfig};
use kso_wire::TunAddresses;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

const EXAMPLES: &str = "\
Examples (inside the guest):
  kso guest -- curl https://example.org
  kso guest --user www-data -- nginx -g 'daemon off;'
  kso guest -- sh -c 'redis-server & exec ./app'

The guest is any Linux with a vsock device that kso broker serves: a vhost-user device (QEMU, Cloud Hypervisor, crosvm) or
Firecracker's sockets; which of them is found out. On the host:
  kso broker --config kso.toml      [guest.NAME] has its name, rules and published ports: there is no -p here
docs/vmm.md has the command lines of each VMM, and a systemd unit.

It needs root in its guest. One kso guest can run there at a time. While it runs, datagrams, ping and names of the whole guest go
by its TUN; CMD alone sees its resolv.conf, and CMD and what it starts alone have their TCP performed by the host.
CMD runs on the terminal, with the standard streams and in the process group of kso guest; what it leaves behind is ended with it.

Exit status: the program's own; 128+N if signal N ended it; 125 if kso failed,
  126 if the program cannot be executed, 127 if it was not found.";

/// Options of `kso guest`.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct GuestArgs {
    /// Run CMD as this user: a name, or numbers
    #[arg(long, value_name = "USER|UID[:GID]")]
    user: Option<String>,

    /// No TUN: CMD has TCP alone, and names as the guest resolves them itself
    #[arg(long)]
    no_tun: bool,

    /// Let CMD use io_uring; its connections then go by the TUN, which is slower
    #[arg(long, conflicts_with = "no_tun")]
    io_uring: bool,

    /// More of what happens, on standard error (repeatable)
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,

    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// Runs it.
///
/// # Errors
/// There is no such user.
pub fn run(args: GuestArgs) -> Result<ExitCode> {
    output::init_logs(args.verbose);
    let mut environment: Vec<(OsString, OsString)> = std::env::vars_os().collect();
    let identity = match &args.user {
        None => None,
        Some(text) => {
            let user = user(text).with_context(|| format!("--user {text}"))?;
            if let Some((name, home)) = user.named {
                for (variable, value) in [("USER", &name), ("LOGNAME", &name), ("HOME", &home)] {
                    environment.retain(|(other, _)| other != variable);
                    environment.push((variable.into(), value.into()));
                }
            }
            Some((user.user, user.group, user.groups))
        }
    };
    let config = ResidentConfig {
        command: args.command,
        environment,
        directory: std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/")),
        identity,
        io_uring: args.io_uring,
        tun: (!args.no_tun).then(|| resolv_conf(&TunAddresses::standard())),
    };
    let status = resident::run(&config).unwrap_or_else(|not_started| {
        output::error(&anyhow::Error::msg(not_started.reason));
        i32::from(not_started.status)
    });
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)))
}

#[derive(Debug, PartialEq, Eq)]
struct User {
    user: u32,
    group: u32,
    groups: Vec<u32>,
    /// Name and home, unless it was given by number.
    named: Option<(String, String)>,
}

fn user(text: &str) -> Result<User> {
    let (name, group) = text.split_once(':').map_or((text, None), |(name, group)| (name, Some(group)));
    if let Ok(user) = name.parse() {
        let group = group.map_or(Ok(user), str::parse).context("a group here is a number")?;
        return Ok(User { user, group, groups: Vec::new(), named: None });
    }
    if group.is_some() {
        bail!("a group is given with a user's number only (1000:1000): a user's name has its own groups");
    }
    let read = |path: &str| std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"));
    // The image's own files: a static program has no other name services.
    named(name, &read("/etc/passwd")?, &read("/etc/group").unwrap_or_default())
}

/// A user of passwd(5), with the groups that group(5) has it in.
fn named(name: &str, passwd: &str, group: &str) -> Result<User> {
    let line = passwd.lines().find(|line| line.split(':').next() == Some(name));
    let fields: Vec<&str> = line.context("there is no such user in /etc/passwd")?.split(':').collect();
    let [_, _, user, own, _, home, ..] = fields.as_slice() else {
        bail!("its line in /etc/passwd is broken")
    };
    let number = |text: &str| text.parse::<u32>().context("its line in /etc/passwd is broken");
    let mut groups = vec![number(own)?];
    for line in group.lines() {
        let fields: Vec<&str> = line.split(':').collect();
        if let [_, _, id, members] = fields.as_slice()
            && members.split(',').any(|member| member == name)
            && let Ok(id) = id.parse()
            && !groups.contains(&id)
        {
            groups.push(id);
        }
    }
    Ok(User { user: number(user)?, group: number(own)?, groups, named: Some((name.into(), (*home).into())) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_has_the_groups_of_the_image() -> Result<()> {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nwww:x:33:33:www:/var/www:/bin/false\n";
        let group = "root:x:0:\nwww:x:33:\ntls:x:44:other,www\nstaff:x:50:wwwx\n";
        let www = named("www", passwd, group)?;
        let expected = User {
            user: 33,
            group: 33,
            groups: vec![33, 44],
            named: Some(("www".into(), "/var/www".into())),
        };
        assert_eq!(www, expected);
        assert!(named("ww", passwd, group).is_err());
        assert!(named("bad", "bad:x:1", "").is_err());
        let numbers = |text| user(text).map(|user| (user.user, user.group)).ok();
        assert_eq!(numbers("1000"), Some((1000, 1000)));
        assert_eq!(numbers("1000:100"), Some((1000, 100)));
        assert_eq!((numbers("1000:x"), numbers("root:0")), (None, None));
        Ok(())
    }
}
