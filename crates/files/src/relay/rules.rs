//! What becomes of a request that was sent, and not answered, when its performer dies.
//!
//! Nobody knows whether it was performed. So it is asked again only if that makes no difference.

use crate::abi;
use crate::request::Operation;
use rustix::fs::{FallocateFlags, OFlags, XattrFlags};

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It is asked again: twice is the same as once.
    Again,
    /// It has succeeded: what it wanted has come about by the death.
    Done,
    /// Its caller gets `EIO`, and has to look.
    Failed,
}

/// The rule. `kept_back`: the client keeps writes back, and appends by itself.
pub(super) fn fate(operation: &Operation<'_>, kept_back: bool) -> Fate {
    let again = |again: bool| if again { Fate::Again } else { Fate::Failed };
    match operation {
        // Only looks.
        Operation::Lookup(_)
        | Operation::GetAttr(_)
        | Operation::StatX(_)
        | Operation::ReadLink
        | Operation::OpenDir(_)
        | Operation::Read(_)
        | Operation::ReadDir(_)
        | Operation::ReadDirPlus(_)
        | Operation::StatFs
        | Operation::GetXattr(..)
        | Operation::ListXattr(_)
        | Operation::GetLk(_)
        | Operation::Access(_)
        | Operation::Ioctl(..)
        | Operation::Lseek(_)
        // Makes something so, whatever it was before.
        | Operation::SetAttr(_)
        | Operation::Flush(_)
        | Operation::Fsync(_)
        | Operation::FsyncDir(_)
        | Operation::SyncFs
        // The same data to the same place.
        | Operation::CopyFileRange(..)
        // What the dead one gave is gone with it.
        | Operation::SetLk(_)
        | Operation::SetLkW(_)
        | Operation::TmpFile(_) => Fate::Again,
        // Another may have written between.
        Operation::Open(open) => again(!OFlags::from_bits_retain(open.flags).contains(OFlags::TRUNC)),
        // The second time it would be there already.
        Operation::Create(create, _) => {
            again(!OFlags::from_bits_retain(create.flags).intersects(OFlags::EXCL | OFlags::TRUNC))
        }
        Operation::Write(write) => again(
            kept_back
                || write.write_flags & abi::WRITE_CACHE != 0
                || !OFlags::from_bits_retain(write.flags).contains(OFlags::APPEND),
        ),
        Operation::SetXattr { flags, .. } => {
            again(!XattrFlags::from_bits_retain(*flags).contains(XattrFlags::CREATE))
        }
        Operation::Fallocate(allocate) => again(
            !FallocateFlags::from_bits_retain(allocate.mode)
                .intersects(FallocateFlags::COLLAPSE_RANGE | FallocateFlags::INSERT_RANGE),
        ),
        Operation::Release(_)
        | Operation::ReleaseDir(_)
        | Operation::Forget(_)
        | Operation::BatchForget(_)
        | Operation::Destroy
        | Operation::Interrupt(_) => Fate::Done,
        Operation::SymLink { .. }
        | Operation::MkNod(..)
        | Operation::MkDir(..)
        | Operation::Unlink(_)
        | Operation::RmDir(_)
        | Operation::Rename { .. }
        | Operation::Link(..)
        | Operation::RemoveXattr(_)
        // A client that mounts is answered by whoever is found.
        | Operation::Init { .. }
        | Operation::Other => Fate::Failed,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::abi::*;
    use crate::request::Name;

    #[test]
    fn what_differs_by_its_arguments() {
        let name = Name::new(c"name").unwrap();
        let write = |flags: OFlags, write_flags| {
            Operation::Write(WriteIn { flags: flags.bits(), write_flags, ..WriteIn::default() })
        };
        assert_eq!(fate(&write(OFlags::WRONLY, 0), false), Fate::Again);
        assert_eq!(fate(&write(OFlags::APPEND, 0), false), Fate::Failed);
        assert_eq!(fate(&write(OFlags::APPEND, WRITE_CACHE), false), Fate::Again);
        assert_eq!(fate(&write(OFlags::APPEND, 0), true), Fate::Again);
        let open = |flags: OFlags| Operation::Open(OpenIn { flags: flags.bits(), open_flags: 0 });
        assert_eq!(fate(&open(OFlags::RDWR), false), Fate::Again);
        assert_eq!(fate(&open(OFlags::TRUNC), false), Fate::Failed);
        let create =
            |flags: OFlags| Operation::Create(CreateIn { flags: flags.bits(), ..CreateIn::default() }, name);
        assert_eq!(fate(&create(OFlags::CREATE), false), Fate::Again);
        assert_eq!(fate(&create(OFlags::CREATE | OFlags::EXCL), false), Fate::Failed);
        assert_eq!(fate(&create(OFlags::CREATE | OFlags::TRUNC), false), Fate::Failed);
        let allocate = |mode: FallocateFlags| {
            Operation::Fallocate(FallocateIn { mode: mode.bits(), ..FallocateIn::default() })
        };
        assert_eq!(fate(&allocate(FallocateFlags::empty()), false), Fate::Again);
        assert_eq!(
            fate(&allocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE), false),
            Fate::Again
        );
        assert_eq!(fate(&allocate(FallocateFlags::COLLAPSE_RANGE), false), Fate::Failed);
        assert_eq!(fate(&allocate(FallocateFlags::INSERT_RANGE), false), Fate::Failed);
        let set = |flags: XattrFlags| Operation::SetXattr {
            flags: flags.bits(),
            extra: 0,
            name: c"user.x",
            value: b"",
        };
        assert_eq!(fate(&set(XattrFlags::REPLACE), false), Fate::Again);
        assert_eq!(fate(&set(XattrFlags::CREATE), false), Fate::Failed);
        for once in [
            Operation::MkDir(MkDirIn::default(), name),
            Operation::Unlink(name),
            Operation::Rename { parent: 1, flags: 0, old: name, new: name },
            Operation::Link(1, name),
        ] {
            assert_eq!(fate(&once, false), Fate::Failed);
        }
        assert_eq!(fate(&Operation::Release(ReleaseIn::default()), false), Fate::Done);
    }
}
