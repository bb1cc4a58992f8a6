//! A guest's runner without a launcher: supervises one program in the network namespace it is started in. The control
//! and packets streams are vsock streams to the host, or, with `--alone`, go to a broker in a thread that publishes
//! everything and connects nothing.
//!
//! `guest_rig [--alone] PROGRAM ARGUMENTS`, as root, on a kernel with vsock and tun, as the first thread of its process.

use kso_runner::{GuestConfig, GuestRunner, GuestStreams};
use kso_sys::options::Defaults;
use kso_sys::{notify, process, remote, tun, vsock};
use kso_wire::frame::{Frames, append};
use kso_wire::guest::{GuestReply, GuestRequest, StreamCall, ToGuest, ToHost, ports};
use kso_wire::{Errno, Failure, Family, LoopbackMode, Protocol, Publication, TunAddresses, VERSION, Welcome};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;

fn main() -> io::Result<()> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let alone = arguments.first().is_some_and(|first| first == "--alone");
    if alone {
        arguments.remove(0);
    }
    let publish = vec![Publication { address: None, outer_port: 0, inner_port: 0, protocol: Protocol::Tcp }];
    let rules = kso_runner::guest::rules(GuestConfig::publishing(&publish, LoopbackMode::Private), false);
    let fresh = |family| socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    let (v4, v6): (OwnedFd, OwnedFd) = (fresh(AddressFamily::INET)?, fresh(AddressFamily::INET6)?);
    let device = tun::create("kso0")?;
    let addresses = TunAddresses::standard();
    tun::configure("kso0", &addresses, 65_535)?;

    let (mut near, mut far) = UnixStream::pair()?;
    let child = process::fork(0, || {
        let Ok(notifier) = notify::install(&rules) else { return 125 };
        if far.write_all(&notifier.as_raw_fd().to_le_bytes()).is_err() || far.read_exact(&mut [0]).is_err() {
            return 125;
        }
        drop(notifier);
        process::default_sigpipe();
        let Some((program, rest)) = arguments.split_first() else { return 125 };
        let error = Command::new(program).args(rest).exec();
        eprintln!("{program}: {error}");
        127
    })?;
    let mut number = [0; 4];
    near.read_exact(&mut number)?;
    let notifier = remote::take_descriptor(child.pidfd.as_fd(), i32::from_le_bytes(number))?;

    let (control, packets) = if alone {
        let (near, far) = UnixStream::pair()?;
        std::thread::spawn(move || broker(far));
        let (packets, other) = UnixStream::pair()?;
        std::mem::forget(other);
        (near.into(), packets.into())
    } else {
        (host(ports::CONTROL)?, host(ports::PACKETS)?)
    };
    let config = GuestConfig {
        tun: addresses,
        loopback: LoopbackMode::Private,
        publish,
        inside: Vec::new(),
        defaults: [Defaults::of(v4.as_fd(), Family::V4), Defaults::of(v6.as_fd(), Family::V6)],
        hybrid: false,
    };
    let packets = Some((tun::Tun::from_fd(device)?, packets));
    let streams = GuestStreams { notifier, control, packets };
    let mut runner = GuestRunner::new(streams, config)?;
    near.write_all(&[0])?;
    runner.run(child.pidfd.as_fd())?;
    let status = process::wait(Some(child.pid))?.map_or(125, |(_, ended)| ended.shell_status());
    std::process::exit(status);
}

fn host(port: u32) -> io::Result<OwnedFd> {
    let socket = vsock::socket()?;
    vsock::connect(socket.as_fd(), vsock::Address { cid: vsock::CID_HOST, port })?;
    Ok(socket)
}

/// The broker of a guest that is alone.
fn broker(mut stream: UnixStream) {
    let mut frames = Frames::default();
    let mut buffer = [0; 65_536];
    while let Ok(read @ 1..) = stream.read(&mut buffer) {
        frames.push(buffer.get(..read).unwrap_or_default());
        let mut bytes = Vec::new();
        while let Ok(Some(message)) = frames.next_message::<ToHost>() {
            if let Some(answer) = answer(message) {
                let _ = append(&answer, &mut bytes);
            }
        }
        if stream.write_all(&bytes).is_err() {
            return;
        }
    }
}

fn answer(message: ToHost) -> Option<ToGuest> {
    let answered = |id, result| Some(ToGuest::Answered { id, result });
    match message {
        ToHost::Hello { .. } => Some(ToGuest::Welcome(Welcome { version: VERSION, session: 1 })),
        ToHost::Prepare(prepare) => {
            let failure = Failure::kernel(Errno::EHOSTUNREACH);
            Some(ToGuest::Failed { local_port: prepare.local_port, failure })
        }
        ToHost::Abandon { .. } => None,
        ToHost::Ask { id, request, .. } => answered(
            id,
            match request {
                GuestRequest::Listen { listen, .. } => Ok(GuestReply::Listening(listen.local)),
                GuestRequest::Stream(_, StreamCall::GetOption(_) | StreamCall::OutQueue) => {
                    Ok(GuestReply::Value(0))
                }
                GuestRequest::Stream(..) => Err(Failure::kernel(Errno::ENOTCONN)),
                GuestRequest::Unlisten(_) | GuestRequest::Release(_) | GuestRequest::StopSending(..) => {
                    Ok(GuestReply::Done)
                }
                GuestRequest::SendFile(_) => Err(Failure::kernel(Errno::EOPNOTSUPP)),
            },
        ),
    }
}
