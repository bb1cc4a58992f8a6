//! The directories that the guest sees: each is a device of its own, served by threads of this process, as this user.

use super::VmArgs;
use super::start::Directory;
use anyhow::{Context, Result};
use kso_devices::fs::{FsMount, REQUEST_QUEUES, Source};
use kso_files::Share;
use kso_vm::{DeviceSocket, FileSystem};
use std::os::unix::net::UnixStream;

/// Serves them: what is returned first is to be kept, and the rest is the machine's.
pub fn serve(args: &VmArgs, directories: &[Directory]) -> Result<(Vec<FsMount>, Vec<FileSystem>)> {
    let mut mounts = Vec::new();
    let mut systems = Vec::new();
    for one in directories {
        let what = || format!("cannot share {} with the guest", one.host.display());
        let is_system = args.root.is_none() && one.target == std::path::Path::new("/");
        let share = if is_system { Share::system(&[]) } else { Share::new(&one.host) };
        let share = if one.read_only { share.read_only() } else { share };
        let (ours, theirs) = UnixStream::pair().with_context(what)?;
        mounts.push(FsMount::serve(Source::Stream(ours), &one.tag, share).with_context(what)?);
        systems.push(FileSystem {
            tag: one.tag.clone(),
            socket: DeviceSocket::Connected(theirs.into()),
            queues: REQUEST_QUEUES.try_into().unwrap_or(1),
        });
    }
    Ok((mounts, systems))
}
