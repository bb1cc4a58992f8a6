//! `getsockopt`, `setsockopt` and the queues of `ioctl`, as TCP would answer.
//!
//! What AF_VSOCK knows of SOL_SOCKET it keeps itself; TCP's and IP's options are those of the real socket outside.

use super::accept::write_value;
use super::answers::Purpose;
use super::filter::{LEVELS, SOL_SOCKET, socket_option as so};
use super::names::key;
use super::ports::Port;
use super::{GuestRunner, Kind, Outcome};
use crate::descriptors::Target;
use crate::interceptor::CLOSED;
use kso_sys::notify::{Notification, Response};
use kso_sys::vsock::{self, State};
use kso_sys::{errno, numbers, options, remote};
use kso_wire::guest::{GuestRequest, StreamCall};
use kso_wire::{Errno, Family, OptionName, OptionValue};
use rustix::net::{RecvFlags, recv};
use std::io;
use std::os::fd::AsFd;

/// `IPPROTO_TCP` and those of its options that are answered here (tcp(7)).
const TCP: u32 = 6;
const TCP_INFO: u32 = 11;
const TCP_QUICKACK: u32 = 12;
const TCP_FASTOPEN: u32 = 23;
const TCP_FASTOPEN_CONNECT: u32 = 30;
/// `IPPROTO_IP` and those of its options that are answered here (ip(7)).
const IP: u32 = 0;
const IP_OPTIONS: u32 = 4;
const IP_BIND_ADDRESS_NO_PORT: u32 = 24;
/// Longest value of an option that is read, and longest TCP_INFO that is asked for, bytes.
const MAX_VALUE: usize = 64;
const MAX_INFO: usize = 1024;
/// `TCP_LISTEN` and `TCP_SYN_SENT` begin the TCP_INFO of sockets without a connection.
const LISTEN_STATE: u8 = 10;
/// Most bytes that FIONREAD counts.
const MAX_PEEK: usize = 256 * 1024;

impl GuestRunner {
    pub(super) fn getsockopt(&mut self, notification: Notification) -> io::Result<Outcome> {
        let (target, kind) = self.target(notification)?;
        let Kind::Vsock(port) = kind else { return Ok(Outcome::CONTINUE) };
        let [_, level, option, ..] = notification.args.map(|argument| argument as u32);
        let family = Port::of(port).family;
        let int = |value: i32| Ok(write_option(notification, &value.to_ne_bytes()));
        match (level, option) {
            (SOL_SOCKET, so::ERROR) => {
                self.receive_control();
                if !self.failures.has(port) && !self.recent.get(port).is_some_and(|begun| begun.failed) {
                    return Ok(Outcome::CONTINUE);
                }
                return int(self.take_error(&target, port));
            }
            (SOL_SOCKET, so::DOMAIN) if family == Family::V4 => return int(numbers::AF_INET),
            (SOL_SOCKET, so::DOMAIN) => return int(numbers::AF_INET6),
            (SOL_SOCKET, so::PROTOCOL) => return int(TCP.cast_signed()),
            (TCP, TCP_QUICKACK) => return int(1),
            (TCP, TCP_FASTOPEN | TCP_FASTOPEN_CONNECT) | (IP, IP_BIND_ADDRESS_NO_PORT) => return int(0),
            (IP, IP_OPTIONS) => return Ok(write_option(notification, &[])),
            _ => {}
        }
        let peer = self.other_end(&target, port);
        if (level, option) == (TCP, TCP_INFO) {
            let Some(peer) = peer else {
                let mut info = [0; MAX_INFO / 4];
                let listening = vsock::state(target.socket.as_fd())? == State::Listening;
                if let Some(state) = info.first_mut() {
                    *state = if listening { LISTEN_STATE } else { CLOSED };
                }
                return Ok(write_option(notification, &info));
            };
            let request = GuestRequest::Stream(key(port, peer), StreamCall::TcpInfo(MAX_INFO as u16));
            return self.ask(target, Purpose::TcpInfo, request);
        }
        let Some(name) = options::name_of(level.cast_signed(), option.cast_signed(), family) else {
            return Ok(unknown(level));
        };
        // Inside, and without a connection, there is nothing outside to ask.
        if let Some(peer) = peer
            && peer.cid != vsock::CID_LOCAL
        {
            let request = GuestRequest::Stream(key(port, peer), StreamCall::GetOption(name));
            return self.ask(target, Purpose::GetOption(name), request);
        }
        let value = self.kept_options(port).and_then(|kept| kept.get(name));
        let [v4, v6] = &self.config.defaults;
        let defaults = if family == Family::V4 { v4 } else { v6 };
        match value.or_else(|| defaults.get(name)) {
            Some(value) => Ok(write_option(notification, &options::to_bytes(name, value))),
            None => Ok(unknown(level)),
        }
    }

    fn kept_options(&self, port: u32) -> Option<&kso_wire::SocketOptions> {
        match self.listener(port) {
            Some(published) => Some(&published.options),
            None => self.recent.get(port).map(|begun| &begun.options),
        }
    }

    /// The error of a socket, once: what the broker said of its stream, or the kernel's own.
    fn take_error(&mut self, target: &Target, port: u32) -> i32 {
        let socket = target.socket.as_fd();
        let (state, own) = (vsock::state(socket), kso_sys::take_error(socket).unwrap_or(0));
        let peer = match state {
            Ok(State::Connected(peer)) => Some(peer),
            Ok(State::ShutDown) => self.other_end(target, port),
            _ => None,
        };
        match self.failures.take(port, peer) {
            Some(errno) => errno::to_raw(errno),
            // AF_VSOCK says ECONNRESET for whatever ended a connection attempt, whose true error was told already.
            None if matches!(state, Ok(State::Closed)) && errno::from_raw(own) == Errno::ECONNRESET => 0,
            None => own,
        }
    }

    pub(super) fn setsockopt(&mut self, notification: Notification) -> io::Result<Outcome> {
        let (target, kind) = self.target(notification)?;
        let port = match kind {
            Kind::Vsock(port) => port,
            Kind::Tcp(_, CLOSED) => {
                self.tuned(&target)?;
                return Ok(Outcome::CONTINUE);
            }
            _ => return Ok(Outcome::CONTINUE),
        };
        let [_, level, option, _, length, _] = notification.args.map(|argument| argument as u32);
        let family = Port::of(port).family;
        match (level, option) {
            // Hints that change nothing a program can see.
            (TCP, TCP_QUICKACK | TCP_FASTOPEN | TCP_FASTOPEN_CONNECT) | (IP, IP_BIND_ADDRESS_NO_PORT) => {
                return Ok(Outcome::DONE);
            }
            _ => {}
        }
        let Some(name) = options::name_of(level.cast_signed(), option.cast_signed(), family) else {
            return Ok(unknown(level));
        };
        let mut bytes = [0; MAX_VALUE];
        let length = usize::try_from(length.cast_signed()).unwrap_or(0).min(MAX_VALUE);
        let bytes = bytes.get_mut(..length).unwrap_or_default();
        if remote::read_memory(notification.tid, notification.args[3], bytes)? != length {
            return Ok(Outcome::error(Errno::EFAULT));
        }
        let Some(value) = options::from_bytes(name, bytes) else {
            let known = name != OptionName::CongestionControl;
            return Ok(Outcome::error(if known { Errno::EINVAL } else { Errno::ENOENT }));
        };
        self.keep_option(port, name, value);
        let own = level == SOL_SOCKET;
        if own {
            // The vsock socket tells it back, and lingers.
            let mut one = kso_wire::SocketOptions::default();
            one.push(name, value);
            options::apply(target.socket.as_fd(), &one)?;
        }
        let Some(peer) = self.other_end(&target, port).filter(|peer| peer.cid != vsock::CID_LOCAL) else {
            return Ok(Outcome::DONE);
        };
        let request = GuestRequest::Stream(key(port, peer), StreamCall::SetOption(name, value));
        if own || cannot_fail(name) {
            // In order all the same: what is written next comes after it.
            return Ok(match self.tell(request) {
                Ok(()) => Outcome::DONE,
                Err(errno) => Outcome::error(errno),
            });
        }
        self.ask(target, Purpose::SetOption, request)
    }

    fn keep_option(&mut self, port: u32, name: OptionName, value: OptionValue) {
        if let Some(begun) = self.recent.get_mut(port) {
            begun.options.set(name, value);
        } else if let Some(published) = self.listeners.values_mut().find(|published| published.port == port) {
            published.options.set(name, value);
        }
    }

    pub(super) fn ioctl(&mut self, notification: Notification) -> io::Result<Outcome> {
        let (target, kind) = self.target(notification)?;
        let Kind::Vsock(port) = kind else { return Ok(Outcome::CONTINUE) };
        let socket = target.socket.as_fd();
        if vsock::state(socket)? == State::Listening {
            return Ok(Outcome::error(Errno::EINVAL));
        }
        if notification.args[1] as u32 == vsock::FIONREAD {
            let peek = RecvFlags::PEEK | RecvFlags::DONTWAIT;
            self.peeked.resize(MAX_PEEK, 0);
            let count = recv(socket, &mut self.peeked, peek).map_or(0, |(count, _)| count);
            return Ok(value_answer(notification, count as i64));
        }
        match self.other_end(&target, port) {
            Some(peer) if peer.cid != vsock::CID_LOCAL => {
                let request = GuestRequest::Stream(key(port, peer), StreamCall::OutQueue);
                self.ask(target, Purpose::OutQueue, request)
            }
            _ => Ok(value_answer(notification, 0)),
        }
    }
}

/// Options that TCP takes with any value.
fn cannot_fail(name: OptionName) -> bool {
    matches!(
        name,
        OptionName::NoDelay | OptionName::Cork | OptionName::NotSentLowWater | OptionName::UserTimeout
    )
}

/// An option that is not carried.
fn unknown(level: u32) -> Outcome {
    if LEVELS.contains(&level) { Outcome::error(Errno::ENOPROTOOPT) } else { Outcome::CONTINUE }
}

/// Answers a `getsockopt`.
pub(super) fn write_option(notification: Notification, bytes: &[u8]) -> Outcome {
    let [_, _, _, target, length_at, _] = notification.args;
    match write_value(notification.tid, target, length_at, bytes, false) {
        Ok(()) => Outcome::DONE,
        Err(error) => Outcome::Respond(Response::Error(errno::to_raw(errno::of(&error)))),
    }
}

/// Answers an `ioctl` that asks for a number.
pub(super) fn value_answer(notification: Notification, value: i64) -> Outcome {
    let value = i32::try_from(value).unwrap_or(i32::MAX).to_ne_bytes();
    match remote::write_memory(notification.tid, notification.args[2], &value) {
        Ok(()) => Outcome::DONE,
        Err(error) => Outcome::error(errno::of(&error)),
    }
}
