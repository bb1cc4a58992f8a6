//! Random operations on a tree, and what is seen of it.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use proptest::prelude::*;
use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, Mode, OFlags, RenameFlags, SeekFrom, Timespec, Timestamps,
    XattrFlags,
};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

#[derive(Clone, Debug)]
pub enum Step {
    Create(usize, u32, bool),
    MakeDirectory(usize, u32),
    MakeNode(usize, u32),
    Unlink(usize),
    RemoveDirectory(usize),
    Rename(usize, usize, u32),
    Link(usize, usize),
    Symlink(usize, usize),
    Write(usize, u64, usize, u8),
    Append(usize, usize, u8),
    Read(usize, u64, usize),
    Truncate(usize, u64),
    OpenTruncate(usize),
    ChangeMode(usize, u32),
    ChangeOwner(usize, u32, u32),
    SetAttribute(usize, u8),
    RemoveAttribute(usize),
    Attribute(usize),
    Allocate(usize, u32, u64, u64),
    Copy(usize, usize, u64, u64, usize),
    Seek(usize, bool, u64),
    Times(usize, i64),
    List(usize),
    Temporary(usize, usize),
    Sync(usize),
}

/// Few names, so that they meet.
const NAMES: &[&str] = &["a", "b", "d", "d/a", "d/b", "d/e", "d/e/a", "e", "e/a", "l", "l/a", "none/a"];

pub fn steps() -> impl Strategy<Value = Vec<Step>> {
    let name = 0..NAMES.len();
    let offset = prop_oneof![Just(0_u64), 0..9000_u64, Just(4096), 100_000..200_000_u64];
    let length = prop_oneof![0..10_usize, Just(4096), 0..20_000_usize];
    let mode =
        prop_oneof![Just(0o644_u32), Just(0o755), Just(0o4755), Just(0o2711), Just(0o1777), 0..0o10000_u32];
    let step = prop_oneof![
        3 => (name.clone(), mode.clone(), any::<bool>()).prop_map(|(a, m, x)| Step::Create(a, m, x)),
        3 => (name.clone(), mode.clone()).prop_map(|(a, m)| Step::MakeDirectory(a, m)),
        1 => (name.clone(), 0..3_u32).prop_map(|(a, k)| Step::MakeNode(a, k)),
        1 => name.clone().prop_map(Step::Unlink),
        1 => name.clone().prop_map(Step::RemoveDirectory),
        2 => (name.clone(), name.clone(), 0..4_u32).prop_map(|(a, b, f)| Step::Rename(a, b, f)),
        1 => (name.clone(), name.clone()).prop_map(|(a, b)| Step::Link(a, b)),
        1 => (name.clone(), name.clone()).prop_map(|(a, b)| Step::Symlink(a, b)),
        3 => (name.clone(), offset.clone(), length.clone(), any::<u8>())
            .prop_map(|(a, o, l, b)| Step::Write(a, o, l, b)),
        2 => (name.clone(), length.clone(), any::<u8>()).prop_map(|(a, l, b)| Step::Append(a, l, b)),
        2 => (name.clone(), offset.clone(), length.clone()).prop_map(|(a, o, l)| Step::Read(a, o, l)),
        1 => (name.clone(), offset.clone()).prop_map(|(a, o)| Step::Truncate(a, o)),
        1 => name.clone().prop_map(Step::OpenTruncate),
        1 => (name.clone(), mode).prop_map(|(a, m)| Step::ChangeMode(a, m)),
        1 => (name.clone(), 0..3_u32, 0..3_u32).prop_map(|(a, u, g)| Step::ChangeOwner(a, u, g)),
        1 => (name.clone(), any::<u8>()).prop_map(|(a, v)| Step::SetAttribute(a, v)),
        1 => name.clone().prop_map(Step::RemoveAttribute),
        1 => name.clone().prop_map(Step::Attribute),
        1 => (name.clone(), 0..4_u32, offset.clone(), offset.clone())
            .prop_map(|(a, k, o, l)| Step::Allocate(a, k, o, l)),
        1 => (name.clone(), name.clone(), offset.clone(), offset.clone(), length)
            .prop_map(|(a, b, f, t, l)| Step::Copy(a, b, f, t, l)),
        1 => (name.clone(), any::<bool>(), offset).prop_map(|(a, d, o)| Step::Seek(a, d, o)),
        1 => (name.clone(), 0..2_000_000_000_i64).prop_map(|(a, t)| Step::Times(a, t)),
        2 => name.clone().prop_map(Step::List),
        1 => (name.clone(), name.clone()).prop_map(|(a, b)| Step::Temporary(a, b)),
        1 => name.prop_map(Step::Sync),
    ];
    prop::collection::vec(step, 1..60)
}

/// Performs a step below `root` and tells what a program would see of it.
pub fn perform(root: &Path, step: &Step) -> String {
    let path = |name: usize| root.join(NAMES[name]);
    let open = |name: usize, flags| {
        rustix::fs::open(path(name), flags | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::RUSR | Mode::WUSR)
    };
    let result: Result<String, Errno> = (|| match *step {
        Step::Create(name, mode, exclusive) => {
            let mut flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
            flags.set(OFlags::EXCL, exclusive);
            rustix::fs::open(path(name), flags, Mode::from_raw_mode(mode)).map(|_| String::new())
        }
        Step::MakeDirectory(name, mode) => {
            rustix::fs::mkdir(path(name), Mode::from_raw_mode(mode)).map(|()| String::new())
        }
        Step::MakeNode(name, kind) => {
            let kind = [FileType::Fifo, FileType::Socket, FileType::CharacterDevice][kind as usize];
            let device = rustix::fs::makedev(1, 3);
            rustix::fs::mknodat(CWD, path(name), kind, Mode::RUSR, device).map(|()| String::new())
        }
        Step::Unlink(name) => rustix::fs::unlink(path(name)).map(|()| String::new()),
        Step::RemoveDirectory(name) => rustix::fs::rmdir(path(name)).map(|()| String::new()),
        Step::Rename(from, to, flags) => {
            let flags =
                [RenameFlags::empty(), RenameFlags::NOREPLACE, RenameFlags::EXCHANGE, RenameFlags::empty()]
                    [flags as usize];
            rustix::fs::renameat_with(CWD, path(from), CWD, path(to), flags).map(|()| String::new())
        }
        Step::Link(from, to) => rustix::fs::link(path(from), path(to)).map(|()| String::new()),
        Step::Symlink(from, to) => rustix::fs::symlink(NAMES[from], path(to)).map(|()| String::new()),
        Step::Write(name, offset, length, byte) => {
            let file = fs::File::from(open(name, OFlags::WRONLY)?);
            Ok(format!(
                "{:?}",
                file.write_at(&vec![byte; length], offset).map_err(|error| error.raw_os_error())
            ))
        }
        Step::Append(name, length, byte) => {
            let file = open(name, OFlags::WRONLY | OFlags::APPEND)?;
            Ok(format!("{:?}", rustix::io::write(file, &vec![byte; length])))
        }
        Step::Read(name, offset, length) => {
            let file = fs::File::from(open(name, OFlags::RDONLY)?);
            let mut bytes = vec![0; length];
            let got = file.read_at(&mut bytes, offset).map_err(|error| error.raw_os_error());
            Ok(format!("{got:?} {:x}", sum(&bytes)))
        }
        Step::Truncate(name, length) => {
            let file = open(name, OFlags::WRONLY)?;
            rustix::fs::ftruncate(file, length).map(|()| String::new())
        }
        Step::OpenTruncate(name) => open(name, OFlags::WRONLY | OFlags::TRUNC).map(|_| String::new()),
        Step::ChangeMode(name, mode) => {
            rustix::fs::chmod(path(name), Mode::from_raw_mode(mode)).map(|()| String::new())
        }
        Step::ChangeOwner(name, user, group) => {
            let (user, group) = (rustix::fs::Uid::from_raw(user), rustix::fs::Gid::from_raw(group));
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            rustix::fs::chownat(CWD, path(name), Some(user), Some(group), flags).map(|()| String::new())
        }
        Step::SetAttribute(name, value) => {
            rustix::fs::setxattr(path(name), "user.kso", &[value; 10], XattrFlags::empty())
                .map(|()| String::new())
        }
        Step::RemoveAttribute(name) => {
            rustix::fs::removexattr(path(name), "user.kso").map(|()| String::new())
        }
        Step::Attribute(name) => {
            let mut value = [0; 64];
            let got = rustix::fs::getxattr(path(name), "user.kso", value.as_mut_slice())?;
            let mut list = [0; 256];
            let listed = rustix::fs::listxattr(path(name), list.as_mut_slice())?;
            Ok(format!("{:?} {:?}", &value[..got], &list[..listed]))
        }
        Step::Allocate(name, kind, offset, length) => {
            let mode = [
                FallocateFlags::empty(),
                FallocateFlags::KEEP_SIZE,
                FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                FallocateFlags::ZERO_RANGE,
            ][kind as usize];
            let file = open(name, OFlags::RDWR)?;
            rustix::fs::fallocate(file, mode, offset, length).map(|()| String::new())
        }
        Step::Copy(from, to, mut read, mut write, length) => {
            let from = open(from, OFlags::RDONLY)?;
            let to = open(to, OFlags::WRONLY)?;
            let got = rustix::fs::copy_file_range(from, Some(&mut read), to, Some(&mut write), length)?;
            Ok(format!("{got}"))
        }
        // Of a directory the client's kernel answers, with numbers of its own.
        Step::Seek(name, ..) if path(name).is_dir() => Ok(String::new()),
        Step::Seek(name, data, offset) => {
            let file = open(name, OFlags::RDONLY)?;
            let from = if data { SeekFrom::Data(offset) } else { SeekFrom::Hole(offset) };
            rustix::fs::seek(file, from).map(|offset| format!("{offset}"))
        }
        Step::Times(name, seconds) => {
            let time = Timespec { tv_sec: seconds, tv_nsec: 5000 };
            let times = Timestamps { last_access: time, last_modification: time };
            rustix::fs::utimensat(CWD, path(name), &times, AtFlags::SYMLINK_NOFOLLOW).map(|()| String::new())
        }
        Step::List(name) => {
            let names = fs::read_dir(path(name)).and_then(|entries| {
                let named =
                    |entry: fs::DirEntry| Ok(format!("{:?} {:?}", entry.file_name(), entry.file_type()?));
                entries.map(|entry| entry.and_then(named)).collect::<std::io::Result<Vec<_>>>()
            });
            let mut names = names.map_err(|error| Errno::from_io_error(&error).unwrap())?;
            names.sort();
            Ok(names.join(" "))
        }
        Step::Temporary(directory, name) => {
            let file = open(directory, OFlags::TMPFILE | OFlags::RDWR)?;
            rustix::io::write(&file, b"temporary")?;
            let own = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
            rustix::fs::linkat(CWD, own, CWD, path(name), AtFlags::SYMLINK_FOLLOW).map(|()| String::new())
        }
        Step::Sync(name) => rustix::fs::fsync(open(name, OFlags::RDONLY)?).map(|()| String::new()),
    })();
    match result {
        Ok(text) => text,
        Err(error) => format!("{error:?}"),
    }
}

fn sum(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// All that is to be seen of a tree.
pub fn tree(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut all = BTreeMap::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(directory) = waiting.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let mut text = format!(
                "{:o} {}:{} links {} rdev {:x}",
                meta.mode(),
                meta.uid(),
                meta.gid(),
                if meta.is_dir() { 0 } else { meta.nlink() },
                meta.rdev()
            );
            if meta.is_file() {
                text += &format!(" {} bytes, {:x}", meta.len(), sum(&fs::read(&path).unwrap()));
                let mut value = [0; 64];
                if let Ok(got) = rustix::fs::lgetxattr(&path, "user.kso", value.as_mut_slice()) {
                    text += &format!(" xattr {:?}", &value[..got]);
                }
            }
            if meta.is_symlink() {
                text += &format!(" -> {:?}", fs::read_link(&path).unwrap().as_os_str().as_bytes());
            }
            if meta.is_dir() {
                waiting.push(path.clone());
            }
            all.insert(path.strip_prefix(root).unwrap().to_owned(), text);
        }
    }
    all
}
