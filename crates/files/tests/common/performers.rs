//! Performers of a relay, in the same process, that die when a test wants it.

use kso_files::relay::Dial;
use kso_files::{Service, Share, stream};
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// When a stream is cut: once, at a request of this opcode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// In the middle of it.
    Within(u32),
    /// It has come whole, and nobody performs it.
    Unperformed(u32),
    /// It was performed, and nobody hears of it.
    Unanswered(u32),
}

type Script = Box<dyn FnOnce(UnixStream) + Send>;

#[derive(Default)]
struct Plan {
    /// So many dials fail.
    refused: usize,
    /// These perform before the true ones do.
    scripts: VecDeque<Script>,
    cut: Option<Cut>,
    /// Each stream carries a random number of bytes up to this power of two.
    random: Option<(u64, u32)>,
    streams: Vec<UnixStream>,
}

/// All of them: each dial finds another.
pub struct Performers {
    share: Share,
    plan: Mutex<Plan>,
    /// Which kernel it says it is: this one in its so manieth life.
    pub boot: AtomicU64,
    pub dials: AtomicU64,
    /// Every opcode that was performed.
    pub seen: Mutex<Vec<u32>>,
}

impl std::fmt::Debug for Performers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Performers").finish_non_exhaustive()
    }
}

impl Performers {
    pub fn new(share: Share) -> Arc<Self> {
        Arc::new(Self {
            share,
            plan: Mutex::default(),
            boot: AtomicU64::new(0),
            dials: AtomicU64::new(0),
            seen: Mutex::default(),
        })
    }

    fn plan(&self) -> std::sync::MutexGuard<'_, Plan> {
        self.plan.lock().unwrap()
    }

    /// The one that performs now dies.
    pub fn kill(&self) {
        for stream in self.plan().streams.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// So many dials find nobody.
    pub fn refuse(&self, dials: usize) {
        self.plan().refused = dials;
    }

    pub fn cut(&self, cut: Cut) {
        self.plan().cut = Some(cut);
    }

    /// Whether the cut that was planned has come.
    pub fn was_cut(&self) -> bool {
        self.plan().cut.is_none()
    }

    /// From now on all die at random, by this seed, after at most 2^most bytes.
    pub fn die_at_random(&self, seed: u64, most: u32) {
        self.plan().random = Some((seed | 1, most));
        self.kill();
    }

    pub fn live(&self) {
        self.plan().random = None;
        self.kill();
    }

    /// Who is dialled next does this.
    pub fn next(&self, script: impl FnOnce(UnixStream) + Send + 'static) {
        self.plan().scripts.push_back(Box::new(script));
    }

    pub fn count(&self, opcode: u32) -> usize {
        self.seen.lock().unwrap().iter().filter(|seen| **seen == opcode).count()
    }
}

/// A number that follows another (xorshift).
fn random(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

/// What `Performers` dial: a handle that a relay can own.
#[derive(Debug)]
pub struct Dialler(pub Arc<Performers>);

impl Dial for Dialler {
    fn dial(&self) -> io::Result<OwnedFd> {
        let performers = self.0.clone();
        performers.dials.fetch_add(1, Ordering::SeqCst);
        let (ours, theirs) = UnixStream::pair()?;
        let mut plan = performers.plan();
        if plan.refused > 0 {
            plan.refused -= 1;
            return Err(io::Error::from(io::ErrorKind::ConnectionRefused));
        }
        if let Some(script) = plan.scripts.pop_front() {
            drop(plan);
            std::thread::spawn(move || script(theirs));
            return Ok(ours.into());
        }
        let budget = plan.random.as_mut().map_or(i64::MAX, |(seed, most)| {
            let power = 9 + random(seed) % u64::from(*most - 8);
            (random(seed) % (1 << power)) as i64
        });
        plan.streams.push(theirs.try_clone()?);
        drop(plan);
        let (near, far) = UnixStream::pair()?;
        let service = Service::detached(performers.share.clone()).map_err(io::Error::other)?;
        std::thread::spawn(move || {
            let _ = stream::serve(service, far.into());
        });
        let between = Arc::new(Between {
            performers,
            client: theirs,
            performer: near,
            budget: AtomicI64::new(budget),
            unanswered: AtomicU64::new(u64::MAX),
        });
        for down in [false, true] {
            let between = between.clone();
            std::thread::spawn(move || {
                let _ = if down { between.down() } else { between.up() };
                between.end();
            });
        }
        Ok(ours.into())
    }
}

/// What stands between a relay and its performer.
struct Between {
    performers: Arc<Performers>,
    client: UnixStream,
    performer: UnixStream,
    budget: AtomicI64,
    unanswered: AtomicU64,
}

impl Between {
    fn end(&self) {
        let _ = self.client.shutdown(Shutdown::Both);
        let _ = self.performer.shutdown(Shutdown::Both);
    }

    /// Passes on what the budget allows.
    fn pass(&self, mut to: &UnixStream, bytes: &[u8]) -> io::Result<()> {
        let before = self.budget.fetch_sub(bytes.len() as i64, Ordering::SeqCst);
        let allowed = before.clamp(0, bytes.len() as i64) as usize;
        to.write_all(&bytes[..allowed])?;
        if allowed < bytes.len() { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
    }

    fn up(&self) -> io::Result<()> {
        loop {
            let mut head = [0; 40];
            (&self.client).read_exact(&mut head)?;
            let opcode = u32::from_ne_bytes(head[4..8].try_into().unwrap());
            let unique = u64::from_ne_bytes(head[8..16].try_into().unwrap());
            {
                let mut plan = self.performers.plan();
                if plan.cut == Some(Cut::Within(opcode)) {
                    plan.cut = None;
                    return Ok(());
                }
            }
            let length = u32::from_ne_bytes(head[..4].try_into().unwrap()) as usize;
            let mut frame = head.to_vec();
            frame.resize(length, 0);
            (&self.client).read_exact(&mut frame[40..])?;
            {
                let mut plan = self.performers.plan();
                match plan.cut {
                    Some(Cut::Unperformed(cut)) if cut == opcode => {
                        plan.cut = None;
                        return Ok(());
                    }
                    Some(Cut::Unanswered(cut)) if cut == opcode => {
                        plan.cut = None;
                        self.unanswered.store(unique, Ordering::SeqCst);
                    }
                    _ => {}
                }
            }
            self.performers.seen.lock().unwrap().push(opcode);
            self.pass(&self.performer, &frame)?;
        }
    }

    fn down(&self) -> io::Result<()> {
        let mut hello = [0; 32];
        (&self.performer).read_exact(&mut hello)?;
        hello[16] = hello[16].wrapping_add(self.performers.boot.load(Ordering::SeqCst) as u8);
        self.pass(&self.client, &hello)?;
        loop {
            let mut head = [0; 16];
            (&self.performer).read_exact(&mut head)?;
            let unique = u64::from_ne_bytes(head[8..16].try_into().unwrap());
            let length = u32::from_ne_bytes(head[..4].try_into().unwrap()) as usize;
            let mut frame = head.to_vec();
            frame.resize(length, 0);
            (&self.performer).read_exact(&mut frame[16..])?;
            if self.unanswered.load(Ordering::SeqCst) == unique {
                return Ok(());
            }
            self.pass(&self.client, &frame)?;
        }
    }
}
