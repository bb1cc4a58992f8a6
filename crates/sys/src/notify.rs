//! Seccomp user notification: the filter, and the supervisor's end of it.
//!
//! Sources: seccomp(2), seccomp_unotify(2), `kernel/seccomp.c`.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `_IOW('!', 4, u64)`: Linux 6.6.
const SECCOMP_IOCTL_NOTIF_SET_FLAGS: libc::Ioctl = ioctl_number(1, 4, size_of::<u64>());
const SECCOMP_IOCTL_NOTIF_RECV: libc::Ioctl = ioctl_number(3, 0, size_of::<libc::seccomp_notif>());
const SECCOMP_IOCTL_NOTIF_SEND: libc::Ioctl = ioctl_number(3, 1, size_of::<libc::seccomp_notif_resp>());
const SECCOMP_IOCTL_NOTIF_ID_VALID: libc::Ioctl = ioctl_number(1, 2, size_of::<u64>());
const SECCOMP_IOCTL_NOTIF_ADDFD: libc::Ioctl = ioctl_number(1, 3, size_of::<libc::seccomp_notif_addfd>());
const SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP: u64 = 1;

/// `SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV`: Linux 5.19.
const WAIT_KILLABLE_RECV: libc::c_ulong = 1 << 5;

/// `_IOC` of `include/uapi/asm-generic/ioctl.h`, with the type `'!'`.
const fn ioctl_number(direction: u32, number: u32, size: usize) -> libc::Ioctl {
    ((direction << 30) | ((size as u32) << 16) | ((b'!' as u32) << 8) | number) as libc::Ioctl
}

/// One system call that waits for our answer.
#[derive(Clone, Copy, Debug)]
pub struct Notification {
    /// Its name; unique for the life of the filter.
    pub id: u64,
    /// The calling thread, as our pid namespace numbers it.
    pub tid: u32,
    /// Which call (`__NR_*` of the native ABI).
    pub call: i64,
    /// Its arguments.
    pub args: [u64; 6],
}

/// What the caller gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Response {
    /// The kernel performs the call after all. The kernel reads the arguments again: nothing that was
    /// checked in the caller's memory still holds.
    Continue,
    /// The call returns this.
    Value(i64),
    /// The call fails with this number of `errno.h`.
    Error(i32),
    /// A signal came: its handler runs, and the call is made again or fails with `EINTR`, as the handler was set up.
    /// Only for a caller that has a signal to take: another would see the kernel's own number of this.
    Restart,
}

/// `ERESTARTSYS` (include/linux/errno.h).
const ERESTARTSYS: i32 = 512;

/// The supervisor's end of a filter.
#[derive(Debug)]
pub struct Listener(OwnedFd);

impl Listener {
    /// Takes the descriptor that [`install`] returned.
    #[must_use]
    pub fn new(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }

    /// Asks for wake-ups on the caller's own core, which saves most of a round trip. False before Linux 6.6.
    pub fn synchronous_wake_up(&self) -> bool {
        // SAFETY: the argument is a value, no memory is touched.
        let result = unsafe {
            libc::ioctl(self.0.as_raw_fd(), SECCOMP_IOCTL_NOTIF_SET_FLAGS, SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP)
        };
        result == 0
    }

    /// The next call. `None`: the one that was announced is gone (its caller was interrupted or killed).
    /// Call it when the descriptor is readable: it waits otherwise.
    ///
    /// # Errors
    /// `EINTR`, `ENOMEM`.
    pub fn receive(&self) -> io::Result<Option<Notification>> {
        // The kernel refuses a buffer that is not zeroed.
        let mut raw = MaybeUninit::<libc::seccomp_notif>::zeroed();
        // SAFETY: the kernel writes one `seccomp_notif`; it is plain data and was zeroed.
        let raw = unsafe {
            if libc::ioctl(self.0.as_raw_fd(), SECCOMP_IOCTL_NOTIF_RECV, raw.as_mut_ptr()) < 0 {
                let error = io::Error::last_os_error();
                return if error.raw_os_error() == Some(libc::ENOENT) { Ok(None) } else { Err(error) };
            }
            raw.assume_init()
        };
        Ok(Some(Notification { id: raw.id, tid: raw.pid, call: i64::from(raw.data.nr), args: raw.data.args }))
    }

    /// Whether the caller still waits.
    #[must_use]
    pub fn is_valid(&self, id: u64) -> bool {
        // SAFETY: the kernel reads eight bytes of a live reference.
        unsafe { libc::ioctl(self.0.as_raw_fd(), SECCOMP_IOCTL_NOTIF_ID_VALID, &raw const id) == 0 }
    }

    /// Answers.
    ///
    /// # Errors
    /// `ENOENT`: the caller no longer waits (a signal came, or it died).
    pub fn respond(&self, id: u64, response: Response) -> io::Result<()> {
        let (val, error, flags) = match response {
            Response::Continue => (0, 0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32),
            Response::Value(value) => (value, 0, 0),
            Response::Error(number) => (0, -number, 0),
            Response::Restart => (0, -ERESTARTSYS, 0),
        };
        let mut raw = libc::seccomp_notif_resp { id, val, error, flags };
        // SAFETY: the kernel reads one `seccomp_notif_resp`.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), SECCOMP_IOCTL_NOTIF_SEND, &raw mut raw) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Puts `descriptor` in place of the caller's descriptor `target` (`SECCOMP_ADDFD_FLAG_SETFD`).
    ///
    /// # Errors
    /// `ENOENT`: the caller no longer waits.
    pub fn replace(
        &self,
        id: u64,
        descriptor: BorrowedFd<'_>,
        target: u32,
        close_on_exec: bool,
    ) -> io::Result<()> {
        let raw = libc::seccomp_notif_addfd {
            id,
            flags: libc::SECCOMP_ADDFD_FLAG_SETFD as u32,
            srcfd: descriptor.as_raw_fd().unsigned_abs(),
            newfd: target,
            newfd_flags: if close_on_exec { libc::O_CLOEXEC as u32 } else { 0 },
        };
        // SAFETY: the kernel reads one `seccomp_notif_addfd`.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), SECCOMP_IOCTL_NOTIF_ADDFD, &raw const raw) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl Listener {
    /// Gives the caller `descriptor` under a number of its own, which is what its call returns.
    ///
    /// # Errors
    /// `ENOENT`: the caller no longer waits; `EMFILE`: it has too many.
    pub fn hand_over(&self, id: u64, descriptor: BorrowedFd<'_>, close_on_exec: bool) -> io::Result<()> {
        let mut raw = libc::seccomp_notif_addfd {
            id,
            flags: libc::SECCOMP_ADDFD_FLAG_SEND as u32,
            srcfd: descriptor.as_raw_fd().unsigned_abs(),
            newfd: 0,
            newfd_flags: if close_on_exec { libc::O_CLOEXEC as u32 } else { 0 },
        };
        let attempt = |raw: &libc::seccomp_notif_addfd| {
            // SAFETY: the kernel reads one `seccomp_notif_addfd`.
            let result = unsafe {
                libc::ioctl(self.0.as_raw_fd(), SECCOMP_IOCTL_NOTIF_ADDFD, std::ptr::from_ref(raw))
            };
            if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
        };
        match attempt(&raw) {
            // Before Linux 5.14 it takes two steps: who is interrupted in between has a descriptor it does not know.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                raw.flags = 0;
                let number = attempt(&raw)?;
                self.respond(id, Response::Value(number.into()))
            }
            done => done.map(drop),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A condition on an argument: on its low 32 bits, unless it says otherwise.
#[derive(Clone, Copy, Debug)]
pub enum Condition {
    /// Equal.
    Is(u8, u32),
    /// Any of these bits.
    Has(u8, u32),
    /// Greater (unsigned).
    Above(u8, u32),
    /// The *high* 32 bits are not zero.
    Wide(u8),
}

/// What the filter does with a call.
#[derive(Clone, Copy, Debug)]
pub enum Action {
    /// Ask the supervisor.
    Notify,
    /// Fail with this number.
    Fail(u16),
}

/// A line of a filter: this call, under all these conditions.
#[derive(Clone, Debug)]
pub struct Rule {
    /// `SYS_*`.
    pub call: i64,
    /// All must hold.
    pub conditions: Vec<Condition>,
    /// Then do this.
    pub action: Action,
}

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const GREATER: u16 = (libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K) as u16;
const GREATER_OR_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const BIT: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

#[cfg(target_arch = "x86_64")]
const NATIVE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const NATIVE: u32 = 0xc000_00b7;
/// Calls from here on belong to the x32 ABI (`__X32_SYSCALL_BIT`).
#[cfg(target_arch = "x86_64")]
const X32: u32 = 0x4000_0000;

/// i386 calls that could use a socket behind the supervisor's back: sendmmsg, socketcall, socket to listen,
/// sendto, sendmsg, io_uring_setup (`arch/x86/entry/syscalls/syscall_32.tbl`).
#[cfg(target_arch = "x86_64")]
const FOREIGN_SOCKET_CALLS: &[u32] = &[102, 345, 359, 361, 362, 363, 369, 370, 425];
/// The same of 32-bit ARM (`arch/arm/tools/syscall.tbl`).
#[cfg(target_arch = "aarch64")]
const FOREIGN_SOCKET_CALLS: &[u32] = &[281, 282, 283, 284, 290, 296, 374, 425];

fn step(code: u16, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

fn compile(rules: &[Rule]) -> Vec<libc::sock_filter> {
    let mut program = vec![step(LOAD, 0, 0, ARCHITECTURE)];
    // Calls of another ABI have other numbers and could not be supervised: their socket calls do not exist.
    let foreign = FOREIGN_SOCKET_CALLS.len() as u8;
    program.push(step(EQUAL, foreign + 3, 0, NATIVE));
    program.push(step(LOAD, 0, 0, NUMBER));
    for (index, &call) in FOREIGN_SOCKET_CALLS.iter().enumerate() {
        program.push(step(EQUAL, foreign - index as u8, 0, call));
    }
    program.push(step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW));
    program.push(step(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32));
    // The jump of native calls lands here.
    program.push(step(LOAD, 0, 0, NUMBER));
    #[cfg(target_arch = "x86_64")]
    {
        program.push(step(GREATER_OR_EQUAL, 0, 1, X32));
        program.push(step(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = GREATER_OR_EQUAL;
    for rule in rules {
        // call? then each condition (load, test), then return; a failed test goes to the reload behind it.
        let length = 2 * rule.conditions.len() as u8 + 1;
        let reload = u8::from(!rule.conditions.is_empty());
        program.push(step(EQUAL, 0, length + reload, rule.call as u32));
        let mut left = length;
        for condition in &rule.conditions {
            let (code, argument, half, value) = match *condition {
                Condition::Is(argument, value) => (EQUAL, argument, 0, value),
                Condition::Has(argument, bits) => (BIT, argument, 0, bits),
                Condition::Above(argument, value) => (GREATER, argument, 0, value),
                Condition::Wide(argument) => (GREATER, argument, 4, 0),
            };
            // Little endian: the low half comes first.
            program.push(step(LOAD, 0, 0, ARGUMENTS + 8 * u32::from(argument) + half));
            left -= 2;
            program.push(step(code, 0, left, value));
        }
        let action = match rule.action {
            Action::Notify => libc::SECCOMP_RET_USER_NOTIF,
            Action::Fail(number) => libc::SECCOMP_RET_ERRNO | u32::from(number),
        };
        program.push(step(RETURN, 0, 0, action));
        if reload == 1 {
            program.push(step(LOAD, 0, 0, NUMBER));
        }
    }
    program.push(step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW));
    program
}

/// Puts the calling thread and what it will start under a filter, for good; the rest passes untouched.
/// Socket calls of other ABIs (i386, x32) fail with `ENOSYS`.
///
/// # Errors
/// `EACCES` without `CAP_SYS_ADMIN` in the user namespace or no-new-privs; `EBUSY` if there is a supervisor
/// already; `EINVAL` on a kernel without user notification.
pub fn install(rules: &[Rule]) -> io::Result<OwnedFd> {
    let program = compile(rules);
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    let set = |flags: libc::c_ulong| {
        // SAFETY: the kernel reads the program, which lives until the call is over, and returns a descriptor.
        unsafe {
            let result =
                libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const filter);
            if result < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(result as i32)) }
        }
    };
    // A call that the supervisor has taken is answered within microseconds, and must not be interrupted
    // half done: signals wait that long. Older kernels do without.
    set(libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | WAIT_KILLABLE_RECV)
        .or_else(|_| set(libc::SECCOMP_FILTER_FLAG_NEW_LISTENER))
}

/// Whether signals wait while a call is supervised (Linux 5.19). Flags are judged before the filter is read, and none
/// is given (seccomp(2)).
#[must_use]
pub fn waits_killable() -> bool {
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | WAIT_KILLABLE_RECV;
    let none = std::ptr::null::<libc::sock_fprog>();
    // SAFETY: the kernel finds no program at the null pointer, and nothing happens.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, none) };
    result < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EFAULT)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]
mod tests {
    use super::*;

    /// Runs a filter as the kernel would, on `struct seccomp_data`.
    fn run(program: &[libc::sock_filter], architecture: u32, call: u32, args: [u64; 6]) -> u32 {
        let mut data = [0_u32; 16];
        data[0] = call;
        data[1] = architecture;
        for (index, argument) in args.iter().enumerate() {
            data[4 + 2 * index] = *argument as u32;
            data[5 + 2 * index] = (*argument >> 32) as u32;
        }
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let line = program[at];
            at += 1;
            let jump = |test: bool| usize::from(if test { line.jt } else { line.jf });
            match line.code {
                LOAD => accumulator = data[line.k as usize / 4],
                EQUAL => at += jump(accumulator == line.k),
                GREATER => at += jump(accumulator > line.k),
                GREATER_OR_EQUAL => at += jump(accumulator >= line.k),
                BIT => at += jump(accumulator & line.k != 0),
                RETURN => return line.k,
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn the_filter_does_what_its_rules_say() {
        let fail = |errno: i32| libc::SECCOMP_RET_ERRNO | errno as u32;
        let program = compile(&[
            Rule { call: 42, conditions: vec![], action: Action::Notify },
            Rule { call: 33, conditions: vec![Condition::Above(0, 2)], action: Action::Notify },
            Rule {
                call: 72,
                conditions: vec![Condition::Above(0, 2), Condition::Is(1, 1030)],
                action: Action::Notify,
            },
            Rule { call: 44, conditions: vec![Condition::Has(3, 0x2000_0000)], action: Action::Fail(95) },
            Rule { call: 43, conditions: vec![Condition::Above(1, 0)], action: Action::Notify },
            Rule { call: 43, conditions: vec![Condition::Wide(1)], action: Action::Notify },
        ]);
        let native = |call, args| run(&program, NATIVE, call, args);
        assert_eq!(native(42, [0; 6]), libc::SECCOMP_RET_USER_NOTIF);
        assert_eq!(native(33, [2, 0, 0, 0, 0, 0]), libc::SECCOMP_RET_ALLOW);
        assert_eq!(native(33, [3, 0, 0, 0, 0, 0]), libc::SECCOMP_RET_USER_NOTIF);
        assert_eq!(native(72, [3, 1030, 0, 0, 0, 0]), libc::SECCOMP_RET_USER_NOTIF);
        assert_eq!(native(72, [3, 1031, 0, 0, 0, 0]), libc::SECCOMP_RET_ALLOW);
        assert_eq!(native(72, [1, 1030, 0, 0, 0, 0]), libc::SECCOMP_RET_ALLOW);
        assert_eq!(native(44, [0, 0, 0, 0x2000_4000, 0, 0]), fail(95));
        assert_eq!(native(44, [0, 0, 0, 0x4000, 0, 0]), libc::SECCOMP_RET_ALLOW);
        assert_eq!(native(0, [9; 6]), libc::SECCOMP_RET_ALLOW);
        assert_eq!(native(43, [3, 0, 9, 0, 0, 0]), libc::SECCOMP_RET_ALLOW);
        assert_eq!(native(43, [3, 8, 9, 0, 0, 0]), libc::SECCOMP_RET_USER_NOTIF);
        assert_eq!(native(43, [3, 7 << 32, 9, 0, 0, 0]), libc::SECCOMP_RET_USER_NOTIF);
        for &call in FOREIGN_SOCKET_CALLS {
            assert_eq!(run(&program, 0x4000_0003, call, [0; 6]), fail(libc::ENOSYS), "call {call}");
        }
        assert_eq!(run(&program, 0x4000_0003, 1, [0; 6]), libc::SECCOMP_RET_ALLOW);
        #[cfg(target_arch = "x86_64")]
        assert_eq!(native(X32 | 42, [0; 6]), fail(libc::ENOSYS));
    }
}
