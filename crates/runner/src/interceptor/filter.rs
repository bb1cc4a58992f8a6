//! Which system calls are handed over, and why.

use super::Publishing;
use kso_sys::notify::{Action, Condition, Rule};

/// `MSG_FASTOPEN` (tcp(7)): a send that connects.
const MSG_FASTOPEN: u32 = kso_sys::numbers::MSG_FASTOPEN;
/// The standard streams: descriptors up to this one are not looked at when they are duplicated.
const LAST_STANDARD_STREAM: u32 = 2;

/// The filter of a sandbox.
#[must_use]
pub fn rules(publishing: Publishing, io_uring: bool) -> Vec<Rule> {
    use kso_sys::numbers as number;
    let notify = |call, conditions| Rule { call, conditions, action: Action::Notify };
    let fail = |call, conditions, errno| Rule { call, conditions, action: Action::Fail(errno) };
    let beyond_standard = Condition::Above(0, LAST_STANDARD_STREAM);
    let mut rules = vec![
        // Where a stream leaves the client kernel.
        notify(number::CONNECT, vec![]),
        notify(number::LISTEN, vec![]),
        // A descriptor of the host's network must not be bound by the program; a port may be reserved.
        notify(number::BIND, vec![]),
        // A socket with two descriptors is swapped under both.
        notify(number::DUP3, vec![beyond_standard]),
        notify(number::DUP, vec![beyond_standard]),
        notify(number::FCNTL, vec![beyond_standard, Condition::Is(1, number::F_DUPFD)]),
        notify(number::FCNTL, vec![beyond_standard, Condition::Is(1, number::F_DUPFD_CLOEXEC)]),
        // Registrations made before a swap are carried over: which processes have any?
        notify(number::EPOLL_CREATE1, vec![]),
        // A send that connects would connect unseen; programs fall back to connect (tcp(7)).
        fail(number::SENDTO, vec![Condition::Has(3, MSG_FASTOPEN)], number::EOPNOTSUPP),
        fail(number::SENDMSG, vec![Condition::Has(2, MSG_FASTOPEN)], number::EOPNOTSUPP),
        fail(number::SENDMMSG, vec![Condition::Has(3, MSG_FASTOPEN)], number::EOPNOTSUPP),
    ];
    #[cfg(target_arch = "x86_64")]
    rules.extend([notify(number::DUP2, vec![beyond_standard]), notify(number::EPOLL_CREATE, vec![])]);
    // Options that are rarely set are read only off the sockets on which they were.
    rules.extend(kso_sys::options::rare().map(|(level, option)| {
        let conditions =
            vec![Condition::Is(1, level.cast_unsigned()), Condition::Is(2, option.cast_unsigned())];
        notify(number::SETSOCKOPT, conditions)
    }));
    if publishing != Publishing::Nothing {
        // A published listener has another address outside than the program gave it.
        rules.push(notify(number::GETSOCKNAME, vec![]));
    }
    if !io_uring {
        // Its operations pass no filter: programs fall back to system calls, which are faster here than the
        // way through the TUN.
        rules.push(fail(number::IO_URING_SETUP, vec![], number::ENOSYS));
    }
    rules
}
