//! Requests, from bytes that nobody vouches for.

use crate::abi::{self, InHeader, Opcode};
use rustix::io::Errno;
use std::ffi::CStr;
use zerocopy::FromBytes;

/// The longest value of an extended attribute (`XATTR_SIZE_MAX`, include/uapi/linux/limits.h).
pub const MAX_XATTR: usize = 65_536;
/// The longest request but for the data of a `WRITE`: an extended attribute with its name, or a batch of forgets.
pub const MAX_REQUEST: usize = 128 * 1024;
/// The longest path of a symbolic link, with its end (`PATH_MAX`).
const MAX_PATH: usize = 4096;

/// A name in a directory: neither empty nor `.` nor `..`, and without `/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name<'a>(&'a CStr);

impl<'a> Name<'a> {
    /// Checks it.
    ///
    /// # Errors
    /// `EINVAL`: it is none. `ENAMETOOLONG`.
    pub fn new(text: &'a CStr) -> Result<Self, Errno> {
        match text.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            bytes if bytes.len() >= MAX_PATH => Err(Errno::NAMETOOLONG),
            _ => Ok(Self(text)),
        }
    }

    /// As C has it.
    #[must_use]
    pub fn as_c_str(self) -> &'a CStr {
        self.0
    }

    /// Its bytes, without an end.
    #[must_use]
    pub fn bytes(self) -> &'a [u8] {
        self.0.to_bytes()
    }
}

/// What is asked for, with its arguments.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub enum Operation<'a> {
    Init {
        init: abi::InitIn,
        more: u32,
    },
    Destroy,
    Lookup(Name<'a>),
    Forget(u64),
    BatchForget(&'a [u8]),
    GetAttr(abi::GetAttrIn),
    StatX(abi::StatXIn),
    SetAttr(abi::SetAttrIn),
    ReadLink,
    SymLink {
        name: Name<'a>,
        target: &'a CStr,
    },
    MkNod(abi::MkNodIn, Name<'a>),
    MkDir(abi::MkDirIn, Name<'a>),
    Unlink(Name<'a>),
    RmDir(Name<'a>),
    Rename {
        parent: u64,
        flags: u32,
        old: Name<'a>,
        new: Name<'a>,
    },
    Link(u64, Name<'a>),
    Open(abi::OpenIn),
    Create(abi::CreateIn, Name<'a>),
    TmpFile(abi::CreateIn),
    Read(abi::ReadIn),
    Write(abi::WriteIn),
    StatFs,
    Release(abi::ReleaseIn),
    Flush(abi::FlushIn),
    Fsync(abi::FsyncIn),
    SetXattr {
        flags: u32,
        extra: u32,
        name: &'a CStr,
        value: &'a [u8],
    },
    GetXattr(u32, &'a CStr),
    ListXattr(u32),
    RemoveXattr(&'a CStr),
    OpenDir(abi::OpenIn),
    ReadDir(abi::ReadIn),
    ReadDirPlus(abi::ReadIn),
    ReleaseDir(abi::ReleaseIn),
    FsyncDir(abi::FsyncIn),
    GetLk(abi::LkIn),
    SetLk(abi::LkIn),
    SetLkW(abi::LkIn),
    Access(abi::AccessIn),
    Interrupt(u64),
    Ioctl(abi::IoctlIn, &'a [u8]),
    Fallocate(abi::FallocateIn),
    Lseek(abi::LseekIn),
    CopyFileRange(abi::CopyFileRangeIn, bool),
    SyncFs,
    /// One that is not served: `ENOSYS` tells the kernel not to ask again.
    Other,
}

/// A request.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Who asks, about which node.
    pub header: InHeader,
    /// For what.
    pub operation: Operation<'a>,
    /// A supplementary group of the caller that owns the directory in which something is created.
    pub group: Option<u32>,
}

/// Reads the header.
#[must_use]
pub fn header(bytes: &[u8]) -> Option<InHeader> {
    InHeader::read_from_prefix(bytes).ok().map(|(header, _)| header)
}

struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take<T: FromBytes>(&mut self) -> Result<T, Errno> {
        let (value, rest) = T::read_from_prefix(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = rest;
        Ok(value)
    }

    fn text(&mut self) -> Result<&'a CStr, Errno> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = self.0.get(text.to_bytes_with_nul().len()..).ok_or(Errno::INVAL)?;
        if text.to_bytes_with_nul().len() > MAX_PATH { Err(Errno::NAMETOOLONG) } else { Ok(text) }
    }

    fn name(&mut self) -> Result<Name<'a>, Errno> {
        Name::new(self.text()?)
    }
}

impl<'a> Request<'a> {
    /// Reads a request whose header is `header` and whose further bytes are `body`; of a `WRITE` without the data.
    /// `long_xattr`: `Features::SETXATTR_EXT` was agreed on.
    ///
    /// # Errors
    /// What it is to be answered with: `EINVAL`, `ENAMETOOLONG`.
    pub fn parse(header: InHeader, body: &'a [u8], long_xattr: bool) -> Result<Self, Errno> {
        let extension = usize::from(header.total_extlen) * 8;
        let split = body.len().checked_sub(extension).ok_or(Errno::INVAL)?;
        let (body, extensions) = body.split_at_checked(split).ok_or(Errno::INVAL)?;
        let operation = match Opcode::of(header.opcode) {
            Some(opcode) => operation(opcode, Fields(body), long_xattr)?,
            None => Operation::Other,
        };
        Ok(Self { header, operation, group: group(extensions)? })
    }
}

fn operation<'a>(opcode: Opcode, mut f: Fields<'a>, long_xattr: bool) -> Result<Operation<'a>, Errno> {
    Ok(match opcode {
        Opcode::Init => {
            let init = f.take()?;
            Operation::Init { init, more: f.take().unwrap_or(0) }
        }
        Opcode::Destroy => Operation::Destroy,
        Opcode::Lookup => Operation::Lookup(f.name()?),
        Opcode::Forget => Operation::Forget(f.take::<abi::ForgetIn>()?.nlookup),
        Opcode::BatchForget => {
            let count = f.take::<abi::BatchForgetIn>()?.count as usize;
            let size = count.checked_mul(size_of::<abi::ForgetOne>()).ok_or(Errno::INVAL)?;
            Operation::BatchForget(f.0.get(..size).ok_or(Errno::INVAL)?)
        }
        Opcode::GetAttr => Operation::GetAttr(f.take()?),
        Opcode::StatX => Operation::StatX(f.take()?),
        Opcode::SetAttr => Operation::SetAttr(f.take()?),
        Opcode::ReadLink => Operation::ReadLink,
        Opcode::SymLink => Operation::SymLink { name: f.name()?, target: f.text()? },
        Opcode::MkNod => Operation::MkNod(f.take()?, f.name()?),
        Opcode::MkDir => Operation::MkDir(f.take()?, f.name()?),
        Opcode::Unlink => Operation::Unlink(f.name()?),
        Opcode::RmDir => Operation::RmDir(f.name()?),
        Opcode::Rename => {
            let parent = f.take::<abi::RenameIn>()?.newdir;
            Operation::Rename { parent, flags: 0, old: f.name()?, new: f.name()? }
        }
        Opcode::Rename2 => {
            let rename = f.take::<abi::Rename2In>()?;
            Operation::Rename { parent: rename.newdir, flags: rename.flags, old: f.name()?, new: f.name()? }
        }
        Opcode::Link => Operation::Link(f.take::<abi::LinkIn>()?.oldnodeid, f.name()?),
        Opcode::Open => Operation::Open(f.take()?),
        Opcode::Create => Operation::Create(f.take()?, f.name()?),
        Opcode::TmpFile => Operation::TmpFile(f.take()?),
        Opcode::Read => Operation::Read(f.take()?),
        Opcode::Write => Operation::Write(f.take()?),
        Opcode::StatFs => Operation::StatFs,
        Opcode::Release => Operation::Release(f.take()?),
        Opcode::Flush => Operation::Flush(f.take()?),
        Opcode::Fsync => Operation::Fsync(f.take()?),
        Opcode::SetXattr => set_xattr(f, long_xattr)?,
        Opcode::GetXattr => Operation::GetXattr(f.take::<abi::GetXattrIn>()?.size, f.text()?),
        Opcode::ListXattr => Operation::ListXattr(f.take::<abi::GetXattrIn>()?.size),
        Opcode::RemoveXattr => Operation::RemoveXattr(f.text()?),
        Opcode::OpenDir => Operation::OpenDir(f.take()?),
        Opcode::ReadDir => Operation::ReadDir(f.take()?),
        Opcode::ReadDirPlus => Operation::ReadDirPlus(f.take()?),
        Opcode::ReleaseDir => Operation::ReleaseDir(f.take()?),
        Opcode::FsyncDir => Operation::FsyncDir(f.take()?),
        Opcode::GetLk => Operation::GetLk(f.take()?),
        Opcode::SetLk => Operation::SetLk(f.take()?),
        Opcode::SetLkW => Operation::SetLkW(f.take()?),
        Opcode::Access => Operation::Access(f.take()?),
        Opcode::Interrupt => Operation::Interrupt(f.take::<abi::InterruptIn>()?.unique),
        Opcode::Ioctl => {
            let ioctl = f.take::<abi::IoctlIn>()?;
            let data = f.0.get(..ioctl.in_size as usize).ok_or(Errno::INVAL)?;
            Operation::Ioctl(ioctl, data)
        }
        Opcode::Fallocate => Operation::Fallocate(f.take()?),
        Opcode::Lseek => Operation::Lseek(f.take()?),
        Opcode::CopyFileRange => Operation::CopyFileRange(f.take()?, false),
        Opcode::CopyFileRange64 => Operation::CopyFileRange(f.take()?, true),
        Opcode::SyncFs => Operation::SyncFs,
        Opcode::Bmap | Opcode::Poll | Opcode::NotifyReply | Opcode::SetupMapping | Opcode::RemoveMapping => {
            Operation::Other
        }
    })
}

fn set_xattr(mut f: Fields<'_>, long: bool) -> Result<Operation<'_>, Errno> {
    let (size, flags): (u32, u32) = (f.take()?, f.take()?);
    let extra = if long { f.take::<[u32; 2]>()? } else { [0; 2] };
    let name = f.text()?;
    if size as usize > MAX_XATTR {
        return Err(Errno::TOOBIG);
    }
    let value = f.0.get(..size as usize).ok_or(Errno::INVAL)?;
    let [extra, _] = extra;
    Ok(Operation::SetXattr { flags, extra, name, value })
}

/// The one group that the kernel sends (`FUSE_CREATE_SUPP_GROUP`).
fn group(mut extensions: &[u8]) -> Result<Option<u32>, Errno> {
    while !extensions.is_empty() {
        let (header, rest) = abi::ExtHeader::read_from_prefix(extensions).map_err(|_| Errno::INVAL)?;
        if header.kind == abi::EXT_GROUPS {
            let [count, group] = <[u32; 2]>::read_from_prefix(rest).map_err(|_| Errno::INVAL)?.0;
            return Ok((count > 0).then_some(group));
        }
        let size = header.size.max(size_of::<abi::ExtHeader>() as u32) as usize;
        extensions = extensions.get(size..).ok_or(Errno::INVAL)?;
    }
    Ok(None)
}
