//! What a performer answers: checked against what was asked, taken note of, and told in the client's numbers.
//!
//! A performer that answers what cannot be an answer lies, and is dropped. What a kernel would refuse by itself (a wrong
//! inode, say) is its own affair.

use super::Refused;
use super::asked::{Asked, From};
use super::files::File;
use super::tables::Tables;
use crate::abi::{self, AttrOut, EntryOut, OpenOut};
use crate::request::{MAX_XATTR, Name, Operation};
use rustix::fs::OFlags;
use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Longest name of an entry (`FUSE_NAME_MAX`, fs/fuse/fuse_i.h).
const NAME_MAX: usize = 1024;
/// The greatest error that a kernel takes (fs/fuse/dev.c: `-512 < error`).
const MAX_ERROR: i32 = 511;
/// Longest target of a symbolic link.
const PATH_MAX: usize = 4096;

const LENGTH: Refused = Refused::Lie("an answer of the wrong length");

fn take<T: FromBytes>(body: &[u8]) -> Result<T, Refused> {
    T::read_from_bytes(body).map_err(|_| LENGTH)
}

fn store<T: IntoBytes + Immutable>(body: &mut [u8], value: &T) {
    if let Some(room) = body.get_mut(..size_of::<T>()) {
        room.copy_from_slice(value.as_bytes());
    }
}

fn is(right: bool) -> Result<(), Refused> {
    if right { Ok(()) } else { Err(LENGTH) }
}

/// Judges a whole reply, and settles what it says: `None` is a success that is passed on.
///
/// # Errors
/// It is a lie.
pub(super) fn judge(
    tables: &mut Tables,
    asked: &Asked,
    error: i32,
    body: &mut [u8],
) -> Result<Option<Errno>, &'static str> {
    match error {
        0 if matches!(asked.from, From::Relay(_)) => Ok(None),
        0 => match settle(tables, asked, body) {
            Ok(()) => Ok(None),
            Err(Refused::Errno(error)) => Ok(Some(error)),
            Err(Refused::Lie(what)) => Err(what),
        },
        error if (-MAX_ERROR..0).contains(&error) && body.is_empty() => {
            Ok(Some(Errno::from_raw_os_error(-error)))
        }
        _ => Err("an error that is none"),
    }
}

/// Settles a success whose reply has this body.
fn settle(tables: &mut Tables, asked: &Asked, body: &mut [u8]) -> Result<(), Refused> {
    let From::Client { room, .. } = asked.from else { return Ok(()) };
    if body.len() + abi::OUT_HEADER > room {
        // A client that leaves no room; what it is told of all the same is held until it mounts anew.
        return Err(Refused::Errno(Errno::IO));
    }
    let request = asked.request().ok_or(Refused::Errno(Errno::IO))?;
    let (node, other) = (asked.places.node(), asked.places.other_node());
    let file = asked.places.file().unwrap_or(0);
    let user = (request.header.uid, request.header.gid);
    match request.operation {
        Operation::Lookup(name) => {
            let entry: EntryOut = take(body)?;
            if entry.nodeid == 0 {
                // There is none, and that may be remembered.
                tables.nodes.unnamed(node, name.bytes());
                return Ok(());
            }
            entered(tables, Some((node, name.bytes())), body).map(drop)
        }
        Operation::MkNod(_, name)
        | Operation::MkDir(_, name)
        | Operation::SymLink { name, .. }
        | Operation::Link(_, name) => {
            is(body.len() == size_of::<EntryOut>())?;
            entered(tables, Some((node, name.bytes())), body).map(drop)
        }
        Operation::Create(create, name) => created(tables, Some((node, name)), create.flags, user, body),
        Operation::TmpFile(create) => created(tables, None, create.flags, user, body),
        Operation::Open(open) => opened(tables, File::new(node, false, open.flags, user), body),
        Operation::OpenDir(open) => opened(tables, File::new(node, true, open.flags, user), body),
        Operation::Unlink(name) | Operation::RmDir(name) => {
            is(body.is_empty())?;
            tables.nodes.unnamed(node, name.bytes());
            Ok(())
        }
        Operation::Rename { flags, old, new, .. } => {
            is(body.is_empty())?;
            /// `RENAME_EXCHANGE` (rename(2)).
            const EXCHANGE: u32 = 2;
            tables.nodes.renamed((node, old.bytes()), (other, new.bytes()), flags & EXCHANGE != 0);
            Ok(())
        }
        Operation::GetAttr(_) | Operation::SetAttr(_) => {
            let out: AttrOut = take(body)?;
            match node == abi::ROOT || tables.nodes.plausible(node, &out.attr) {
                true => Ok(()),
                false => Err(Refused::Lie("a node that has become another")),
            }
        }
        Operation::StatX(_) => is(body.len() == size_of::<abi::StatXOut>()),
        Operation::ReadLink => is((1..PATH_MAX).contains(&body.len())),
        Operation::Read(read) => is(body.len() <= read.size as usize),
        Operation::Write(write) => is(take::<abi::WriteOut>(body)?.size <= write.size),
        Operation::CopyFileRange(copy, false) => is(u64::from(take::<abi::WriteOut>(body)?.size) <= copy.len),
        Operation::CopyFileRange(copy, true) => {
            is(take::<abi::CopyFileRangeOut>(body)?.bytes_copied <= copy.len)
        }
        Operation::StatFs => is(body.len() == size_of::<abi::StatFsOut>()),
        Operation::GetXattr(size, _) | Operation::ListXattr(size) => is(match size {
            0 => body.len() == size_of::<abi::GetXattrOut>(),
            size => body.len() <= (size as usize).min(MAX_XATTR),
        }),
        Operation::ReadDir(read) => {
            is(body.len() <= read.size as usize)?;
            entries(None, node, body)
        }
        Operation::ReadDirPlus(read) => {
            is(body.len() <= read.size as usize)?;
            entries(Some(tables), node, body)
        }
        Operation::GetLk(_) => is(body.len() == size_of::<abi::LkOut>()),
        Operation::Lseek(_) => is(body.len() == size_of::<abi::LseekOut>()),
        Operation::Ioctl(ioctl, _) => {
            let head = size_of::<abi::IoctlOut>();
            is(body.len() >= head && body.len() - head <= ioctl.out_size as usize)
        }
        Operation::SetLk(lock) | Operation::SetLkW(lock) => {
            is(body.is_empty())?;
            tables.files.locked(file, node, &lock);
            Ok(())
        }
        Operation::Flush(flush) => {
            is(body.is_empty())?;
            tables.files.flushed(node, flush.lock_owner);
            Ok(())
        }
        Operation::Fsync(_) | Operation::FsyncDir(_) => {
            is(body.is_empty())?;
            tables.nodes.synced(node, asked.written);
            Ok(())
        }
        _ => is(body.is_empty()),
    }
}

/// Takes note of a node, and gives it the client's number.
fn entered(tables: &mut Tables, name: Option<(u64, &[u8])>, body: &mut [u8]) -> Result<u64, Refused> {
    let (mut entry, _) = EntryOut::read_from_prefix(body).map_err(|_| LENGTH)?;
    let own = tables.nodes.enter(name, &mut entry)?;
    store(body, &entry);
    Ok(own)
}

/// The same of an open file.
fn opened(tables: &mut Tables, file: File, body: &mut [u8]) -> Result<(), Refused> {
    let mut out: OpenOut = take(body)?;
    if out.open_flags & abi::OpenReply::PASSTHROUGH.bits() != 0 {
        return Err(Refused::Lie("a backing file, of another kernel"));
    }
    if OFlags::from_bits_retain(file.flags).contains(OFlags::TRUNC) {
        tables.nodes.wrote(file.node);
    }
    out.fh = tables.files.opened(file, out.fh).map_err(Refused::Errno)?;
    store(body, &out);
    Ok(())
}

fn created(
    tables: &mut Tables,
    name: Option<(u64, Name<'_>)>,
    flags: u32,
    user: (u32, u32),
    body: &mut [u8],
) -> Result<(), Refused> {
    is(body.len() == size_of::<EntryOut>() + size_of::<OpenOut>())?;
    let name = name.as_ref().map(|(parent, name)| (*parent, name.bytes()));
    let own = entered(tables, name, body)?;
    tables.nodes.wrote(own);
    let body = body.get_mut(size_of::<EntryOut>()..).unwrap_or_default();
    opened(tables, File::new(own, false, flags, user), body).inspect_err(|_| tables.nodes.forget(own, 1))
}

/// Entries of a directory: with `tables` each is one that the client is told all about.
fn entries(mut tables: Option<&mut Tables>, parent: u64, body: &mut [u8]) -> Result<(), Refused> {
    const WRONG: Refused = Refused::Lie("entries that make no sense");
    let mut rest = body;
    while !rest.is_empty() {
        let head = if tables.is_some() { size_of::<EntryOut>() } else { 0 };
        let (dirent, name) =
            abi::Dirent::read_from_prefix(rest.get(head..).ok_or(WRONG)?).map_err(|_| WRONG)?;
        let length = dirent.namelen as usize;
        let name =
            name.get(..length).filter(|name| !name.is_empty() && name.len() <= NAME_MAX).ok_or(WRONG)?;
        if name.contains(&b'/') || name.contains(&0) {
            return Err(WRONG);
        }
        let name = name.to_vec();
        let whole = (head + size_of::<abi::Dirent>() + length).next_multiple_of(8);
        let (one, others) = rest.split_at_mut_checked(whole).ok_or(WRONG)?;
        if let Some(tables) = tables.as_deref_mut() {
            let (mut entry, _) = EntryOut::read_from_prefix(one).map_err(|_| WRONG)?;
            if entry.nodeid != 0 {
                let dots = matches!(name.as_slice(), b"." | b"..");
                match tables.nodes.enter(Some((parent, name.as_slice())).filter(|_| !dots), &mut entry) {
                    // The client counts none for these, and looks up by itself what could not be told.
                    Ok(own) if dots => {
                        tables.nodes.forget(own, 1);
                        entry = EntryOut::default();
                    }
                    Ok(_) => {}
                    Err(Refused::Errno(_)) => entry = EntryOut::default(),
                    Err(lie) => return Err(lie),
                }
                store(one, &entry);
            }
        }
        rest = others;
    }
    Ok(())
}
