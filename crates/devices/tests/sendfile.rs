//! Files that the hub sends for a guest: what goes when, and what is told of it.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use common::{Driver, Told, World, from_guest, key};
use kso_devices::vsock::packet::{Header, NO_RECEIVE, NO_SEND, Op};
use kso_devices::vsock::{GuestId, Hub, Limits};
use kso_files::{Completer, Files, Outcome, Pieces, Service, Share, Worker};
use kso_wire::Errno;
use kso_wire::guest::SendFile;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::VolatileSlice;

const LIMIT: Duration = Duration::from_secs(60);
/// Much more than the buffers of a socket.
const LENGTH: usize = 8 << 20;

#[derive(Debug)]
struct Nobody;

impl Completer for Nobody {
    fn reply(&self, _: u64, _: &[u8]) {}

    fn complete(&self, _: u64, _: i32) {}
}

/// Has a client look up names in the root of a share; their nodes.
fn nodes(service: &Arc<Service>, names: &'static [&str]) -> Vec<u64> {
    let service = service.clone();
    let ask = |worker: &mut Worker, opcode: u32, node: u64, body: &[u8]| {
        let mut request = Vec::new();
        for word in [40 + body.len() as u32, opcode] {
            request.extend(word.to_ne_bytes());
        }
        request.extend([1_u64, node].iter().flat_map(|word| word.to_ne_bytes()));
        request.extend([0; 16]);
        request.extend(body);
        let mut reply = vec![0; 4096];
        let readable = [VolatileSlice::from(request.as_mut_slice())];
        let outcome = {
            let writable = [VolatileSlice::from(reply.as_mut_slice())];
            worker.serve(Pieces::new(&readable), Pieces::new(&writable))
        };
        assert!(matches!(outcome, Outcome::Reply(24..)), "{outcome:?}");
        u64::from_ne_bytes(reply[16..24].try_into().unwrap())
    };
    // A worker takes its thread over.
    let client = move || {
        let mut worker = Worker::new(service).unwrap();
        let mut init = [0; 64];
        init[..8].copy_from_slice(&[7, 0, 0, 0, 38, 0, 0, 0]);
        ask(&mut worker, 26, 0, &init);
        names.iter().map(|name| ask(&mut worker, 1, 1, &[name.as_bytes(), &[0]].concat())).collect()
    };
    std::thread::spawn(client).join().unwrap()
}

struct Fixture {
    hub: Hub,
    world: World,
    driver: Driver,
    guest: GuestId,
    content: Vec<u8>,
    file: u64,
    directory: u64,
    _files: tempfile::TempDir,
}

impl Fixture {
    fn new(read_only: bool) -> Self {
        let files = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..LENGTH as u32).map(|n| (n ^ n >> 9) as u8).collect();
        std::fs::write(files.path().join("file"), &content).unwrap();
        std::fs::create_dir(files.path().join("directory")).unwrap();
        let share = Share::new(files.path());
        let share = if read_only { share.read_only() } else { share };
        let service = Service::new(share, Arc::new(Nobody)).unwrap();
        let found = nodes(&service, &["file", "directory"]);
        let mut hub = Hub::new(Limits::default()).unwrap();
        let (driver, guest) = Driver::new(&mut hub, true);
        hub.offer_files(guest, "share", Files::of(service));
        let world = World::default();
        Fixture { hub, world, driver, guest, content, file: found[0], directory: found[1], _files: files }
    }

    /// Serves until something is so.
    #[track_caller]
    fn until<T>(&mut self, what: &str, mut is: impl FnMut(&mut Self) -> Option<T>) -> T {
        let begun = Instant::now();
        loop {
            self.hub.run_ready(&mut self.world);
            self.driver.receive();
            if let Some(found) = is(self) {
                return found;
            }
            assert!(begun.elapsed() < LIMIT, "waited in vain: {what}");
            if self.hub.next_deadline().is_none_or(|at| at > Instant::now()) {
                let fd = self.hub.poll_fd();
                let mut polled = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
                let _ = poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 5_000_000 }));
            }
        }
    }

    fn connect(&mut self, port: u32) -> UnixStream {
        let far = self.world.offer();
        far.set_read_timeout(Some(LIMIT)).unwrap();
        self.driver.packet(key(port), Op::Request, &[]);
        self.until("a response", |f| f.driver.came.pop_front());
        self.world.told.clear();
        far
    }

    fn ask(&mut self, port: u32, ticket: u64, offset: u64, count: u64, waits: bool) {
        let what =
            SendFile { stream: key(port), share: "share".into(), node: self.file, offset, count, waits };
        self.hub.send_file(self.guest, ticket, &what, &mut self.world);
    }

    /// What was told of a ticket.
    #[track_caller]
    fn answer(&mut self, ticket: u64) -> Result<Option<u64>, Errno> {
        self.until("an answer", |f| {
            let at =
                f.world.told.iter().position(|told| matches!(told, Told::Sent(_, of, _) if *of == ticket));
            at.map(|at| match f.world.told.remove(at) {
                Told::Sent(_, _, result) => result,
                other => panic!("{other:?}"),
            })
        })
    }

    /// Serves while another thread reads so many bytes.
    #[track_caller]
    fn read(&mut self, far: &UnixStream, bytes: usize) -> Vec<u8> {
        let mut far = far.try_clone().unwrap();
        let reader = std::thread::spawn(move || {
            let mut got = vec![0; bytes];
            far.read_exact(&mut got).map(|()| got)
        });
        self.until("bytes", |_| reader.is_finished().then_some(()));
        reader.join().unwrap().unwrap()
    }
}

#[test]
fn a_file_goes_behind_what_was_sent_before_and_before_what_is_sent_later() {
    for read_only in [false, true] {
        let mut f = Fixture::new(read_only);
        let far = f.connect(1);
        f.driver.packet(key(1), Op::Data, b"before ");
        f.until("the packet", |f| f.driver.can_send().then_some(()));
        f.ask(1, 7, 100, u64::MAX >> 1, true);
        // While the file is under way: nobody reads yet.
        f.driver.packet(key(1), Op::Data, b" after");
        f.driver.send(&Header { flags: NO_SEND, ..from_guest(key(1), Op::Shutdown) }, &[]);
        let all = [b"before ", &f.content[100..], b" after"].concat();
        let got = f.read(&far, all.len());
        assert!(got == all, "the bytes differ");
        assert_eq!(f.answer(7), Ok(Some(LENGTH as u64 - 100)));
        assert_eq!((&far).read(&mut [0; 1]).unwrap(), 0, "the half is closed");
    }
}

#[test]
fn held_bytes_go_first() {
    let mut f = Fixture::new(false);
    let far = f.connect(1);
    // More than the socket takes, within the window.
    let chunk = vec![b'x'; 48 << 10];
    for _ in 0..5 {
        f.driver.packet(key(1), Op::Data, &chunk);
        f.until("the packet", |f| f.driver.can_send().then_some(()));
    }
    f.ask(1, 1, 0, 1000, false);
    assert_eq!(f.answer(1), Ok(None), "who does not wait does not jump the queue");
    f.ask(1, 2, 0, LENGTH as u64, true);
    let got = f.read(&far, 5 * chunk.len() + LENGTH);
    assert!(got[..5 * chunk.len()].iter().all(|&byte| byte == b'x'));
    assert!(got[5 * chunk.len()..] == f.content);
    assert_eq!(f.answer(2), Ok(Some(LENGTH as u64)));
}

#[test]
fn who_does_not_wait_is_told_of_room() {
    let mut f = Fixture::new(false);
    let far = f.connect(1);
    f.ask(1, 1, 0, LENGTH as u64, false);
    let Ok(Some(first)) = f.answer(1) else { panic!("nothing was sent") };
    assert!(first > 0 && first < LENGTH as u64);
    f.ask(1, 2, first, LENGTH as u64, false);
    assert_eq!(f.answer(2), Ok(None), "no room");
    assert!(f.driver.came.is_empty(), "{:?}", f.driver.came);
    let mut got = f.read(&far, first as usize);
    let header = f.until("credit", |f| f.driver.came.pop_front()).0;
    assert_eq!(header.operation(), Some(Op::CreditUpdate));
    // The rest, a piece at a time.
    let mut sent = first;
    for ticket in 3.. {
        f.ask(1, ticket, sent, LENGTH as u64, false);
        match f.answer(ticket) {
            Ok(Some(0)) => break,
            Ok(Some(more)) => {
                sent += more;
                got.extend(f.read(&far, more as usize));
            }
            other => assert_eq!(other, Ok(None)),
        }
    }
    assert!(got == f.content);
}

#[test]
fn what_cannot_be_sent() {
    let mut f = Fixture::new(false);
    let _far = f.connect(1);
    f.ask(1, 1, LENGTH as u64, 10, true);
    assert_eq!(f.answer(1), Ok(Some(0)), "the end of the file");
    f.ask(2, 2, 0, 10, true);
    assert_eq!(f.answer(2), Ok(None), "no such stream");
    let good =
        SendFile { stream: key(1), share: "share".into(), node: f.file, offset: 0, count: 10, waits: true };
    for (ticket, what) in [
        (3, SendFile { share: "other".into(), ..good.clone() }),
        (4, SendFile { node: f.directory, ..good.clone() }),
        (5, SendFile { node: u64::MAX, ..good.clone() }),
        (6, SendFile { node: 1, ..good.clone() }),
        (7, SendFile { count: 0, ..good.clone() }),
        (8, SendFile { offset: u64::MAX, ..good.clone() }),
    ] {
        f.hub.send_file(f.guest, ticket, &what, &mut f.world);
        assert_eq!(f.answer(ticket), Ok(None), "{what:?}");
    }
    f.hub.send_file(f.guest, 9, &good, &mut f.world);
    assert_eq!(f.answer(9), Ok(Some(10)), "it still works");
    // Files are a guest's own.
    let (_driver, other) = Driver::new(&mut f.hub, true);
    f.hub.send_file(other, 10, &good, &mut f.world);
    assert_eq!(f.answer(10), Err(Errno::EOPNOTSUPP));
    f.driver.send(&Header { flags: NO_SEND, ..from_guest(key(1), Op::Shutdown) }, &[]);
    f.until("the packet", |f| f.driver.can_send().then_some(()));
    f.hub.run_ready(&mut f.world);
    f.hub.send_file(f.guest, 11, &good, &mut f.world);
    assert_eq!(f.answer(11), Ok(None), "its half is shut");
}

#[test]
fn it_can_be_stopped() {
    let mut f = Fixture::new(false);
    let far = f.connect(1);
    f.ask(1, 1, 0, LENGTH as u64, true);
    f.ask(1, 2, 0, 10, true);
    assert_eq!(f.answer(2), Ok(None), "one at a time");
    let mut first = [0; 1000];
    (&far).read_exact(&mut first).unwrap();
    f.hub.stop_sending(f.guest, key(1), 3, &mut f.world);
    f.hub.stop_sending(f.guest, key(1), 1, &mut f.world);
    let Ok(Some(sent)) = f.answer(1) else { panic!("nothing was sent") };
    assert!(sent < LENGTH as u64);
    f.driver.packet(key(1), Op::Data, b"after");
    let got = f.read(&far, sent as usize - 1000 + 5);
    assert!([&first, &got[..got.len() - 5]].concat() == f.content[..sent as usize]);
    assert!(got.ends_with(b"after"));
}

#[test]
fn an_outside_that_breaks_is_told_of() {
    let mut f = Fixture::new(false);
    let far = f.connect(1);
    f.ask(1, 1, 0, LENGTH as u64, true);
    (&far).read_exact(&mut [0; 1000]).unwrap();
    drop(far);
    assert!(matches!(f.answer(1), Ok(Some(1000..)) | Err(Errno::EPIPE | Errno::ECONNRESET)));
    let ended = f.until("an end", |f| f.world.told.pop());
    assert!(matches!(&ended, Told::Ended(_, _, end) if end.errno.is_some()), "{ended:?}");
    let header = f.until("a reset", |f| f.driver.came.pop_front()).0;
    assert_eq!(header.operation(), Some(Op::Reset));
}

#[test]
fn a_guest_that_closes_gets_rid_of_it() {
    let mut f = Fixture::new(false);
    let far = f.connect(1);
    f.ask(1, 1, 0, LENGTH as u64, true);
    f.until("some bytes", |_| {
        let mut polled = [PollFd::new(&far, PollFlags::IN)];
        let _ = poll(&mut polled, Some(&Timespec::default()));
        (!polled[0].revents().is_empty()).then_some(())
    });
    f.driver.send(&Header { flags: NO_SEND | NO_RECEIVE, ..from_guest(key(1), Op::Shutdown) }, &[]);
    assert!(f.answer(1).is_ok_and(|sent| sent.is_none_or(|sent| sent < LENGTH as u64)));
    // What went before it noticed is whole, and then comes the end.
    let mut reading = far.try_clone().unwrap();
    let reader = std::thread::spawn(move || {
        let mut got = Vec::new();
        reading.read_to_end(&mut got).map(|_| got)
    });
    f.until("the end", |_| reader.is_finished().then_some(()));
    let got = reader.join().unwrap().unwrap();
    assert!(got.len() < LENGTH && got == f.content[..got.len()]);
}

#[test]
fn a_guest_that_is_gone_takes_it_along() {
    let mut f = Fixture::new(false);
    let far = f.connect(1);
    f.ask(1, 1, 0, LENGTH as u64, true);
    f.hub.run_ready(&mut f.world);
    f.hub.remove_guest(f.guest);
    let mut reading = far.try_clone().unwrap();
    let reader = std::thread::spawn(move || std::io::copy(&mut reading, &mut std::io::sink()).unwrap());
    f.until("the end", |_| reader.is_finished().then_some(()));
    assert!(reader.join().unwrap() < LENGTH as u64);
    assert!(f.world.told.is_empty());
}

#[test]
fn many_at_once_take_turns() {
    let mut f = Fixture::new(true);
    let fars: Vec<_> = (1..=24).map(|port| f.connect(port)).collect();
    for port in 1..=24 {
        f.ask(port, port.into(), 0, LENGTH as u64, true);
    }
    let readers: Vec<_> = fars
        .into_iter()
        .map(|mut far| {
            std::thread::spawn(move || {
                let mut got = vec![0; LENGTH];
                far.read_exact(&mut got).map(|()| got)
            })
        })
        .collect();
    for ticket in 1..=24 {
        assert_eq!(f.answer(ticket), Ok(Some(LENGTH as u64)));
    }
    for reader in readers {
        assert!(reader.join().unwrap().unwrap() == f.content);
    }
}
