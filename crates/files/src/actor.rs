//! As whom a thread touches files.
//!
//! The client has checked permissions (`default_permissions`), by groups that are not told here. What remains to be
//! right is to whom new files and blocks belong, and whether setuid bits are cleared: by the thread's fsuid and fsgid, and by
//! `CAP_FSETID`, as in the kernel itself. All of it is the thread's own, and changes only when the caller does.

use rustix::io::Errno;
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};

/// What a privileged worker keeps. Not among them: `CAP_SYS_RESOURCE`, which would let it write into reserved blocks and past
/// quotas, and `CAP_SYS_ADMIN`, which opens `trusted` attributes.
const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETFCAP);

/// The calling thread's identity.
#[derive(Debug)]
pub(crate) struct Actor {
    now: Option<Identity>,
    umask: u32,
    group: Option<u32>,
    capabilities: CapabilitySets,
    /// It may be any user, by these means.
    privileged: Option<Means>,
    /// A pretence of who its own user is.
    own: Option<((u32, u32), (u32, u32))>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    user: u32,
    group: u32,
    /// setuid and setgid bits survive what it does.
    keep_bits: bool,
}

/// How a thread becomes another user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Means {
    /// By fsuid and fsgid: nothing else about it changes.
    FileSystem,
    /// By its effective ids, where there are no others (gVisor).
    Effective,
}

impl Means {
    fn act(self, user: u32, group: u32) -> std::io::Result<()> {
        match self {
            Self::FileSystem => kso_sys::file::act_as(user, group),
            Self::Effective => kso_sys::file::act_effectively_as(user, group),
        }
    }

    /// What this kernel has.
    fn available() -> Self {
        let (user, group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let by_files = Self::FileSystem.act(user, group).is_ok();
        if by_files { Self::FileSystem } else { Self::Effective }
    }
}

/// Whether this thread may act as others. In a user namespace of one user there are none, whatever the capabilities: there
/// setgroups(2) is denied, too (user_namespaces(7)).
pub(crate) fn privileged() -> bool {
    let denied = std::fs::read_to_string("/proc/self/setgroups").is_ok_and(|text| text.trim() == "deny");
    !denied && rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(KEPT))
}

impl Actor {
    /// Makes the calling thread one that acts for others, for the rest of its life. `more`: capabilities that it keeps
    /// beside those that everyone does.
    pub fn new(owner: crate::Owner, more: CapabilitySet) -> std::io::Result<Self> {
        kso_sys::file::own_umask()?;
        rustix::process::umask(rustix::fs::Mode::empty());
        let privileged = (owner == crate::Owner::Caller && privileged()).then(Means::available);
        let mut capabilities = rustix::thread::capabilities(None)?;
        if let Some(means) = privileged {
            if means == Means::FileSystem {
                // Otherwise a change of fsuid would take capabilities away, or give them back.
                let bits =
                    rustix::thread::capabilities_secure_bits()? | CapabilitiesSecureBits::NO_SETUID_FIXUP;
                rustix::thread::set_capabilities_secure_bits(bits)?;
            }
            capabilities.effective &= KEPT | more;
            capabilities.permitted &= KEPT | more;
            capabilities.inheritable = CapabilitySet::empty();
            rustix::thread::set_capabilities(None, capabilities)?;
            rustix::thread::set_thread_groups(&[])?;
        }
        let own = match owner {
            crate::Owner::Own(Some(seen)) => {
                let user = rustix::process::geteuid().as_raw();
                Some(((user, rustix::process::getegid().as_raw()), seen))
            }
            _ => None,
        };
        Ok(Self { now: None, umask: 0, group: None, capabilities, privileged, own })
    }

    /// From here on the thread acts for this caller. `keep_bits`: what it writes to stays setuid.
    pub fn act(&mut self, user: u32, group: u32, keep_bits: bool) -> Result<(), Errno> {
        let wanted = Identity { user, group, keep_bits };
        let Some(means) = self.privileged.filter(|_| self.now != Some(wanted)) else { return Ok(()) };
        if self.now.is_none_or(|now| (now.user, now.group) != (user, group)) {
            self.now = None;
            means.act(user, group).map_err(|error| crate::inodes::errno(&error))?;
        }
        self.capabilities.effective.set(CapabilitySet::FSETID, keep_bits);
        rustix::thread::set_capabilities(None, self.capabilities)?;
        self.now = Some(wanted);
        Ok(())
    }

    /// The supplementary group of the caller that matters.
    pub fn with_group(&mut self, group: Option<u32>) -> Result<(), Errno> {
        if self.privileged.is_none() || self.group == group {
            return Ok(());
        }
        // The number comes from the client: -1 is no group.
        let wanted = group.filter(|group| *group != u32::MAX).map(rustix::process::Gid::from_raw);
        rustix::thread::set_thread_groups(wanted.as_slice())?;
        self.group = group;
        Ok(())
    }

    /// The umask of what is made next.
    pub fn with_umask(&mut self, umask: u32) {
        let umask = umask & 0o777;
        if self.umask != umask {
            rustix::process::umask(rustix::fs::Mode::from_raw_mode(umask));
            self.umask = umask;
        }
    }

    /// How an owner is seen by the client.
    pub fn seen(&self, user: u32, group: u32) -> (u32, u32) {
        match self.own {
            Some(((own_user, own_group), (seen_user, seen_group))) => (
                if user == own_user { seen_user } else { user },
                if group == own_group { seen_group } else { group },
            ),
            None => (user, group),
        }
    }

    /// What the client means by an owner.
    pub fn meant(&self, user: Option<u32>, group: Option<u32>) -> (Option<u32>, Option<u32>) {
        let Some(((own_user, own_group), (seen_user, seen_group))) = self.own else { return (user, group) };
        let translate = |id: Option<u32>, own, seen| id.map(|id: u32| if id == seen { own } else { id });
        (translate(user, own_user, seen_user), translate(group, own_group, seen_group))
    }
}
