//! The directories that the guest sees: each is a device of its own, served by threads of this process, as this user, or passed
//! on by them to another kernel.

use super::VmArgs;
use super::served::Served;
use super::start::Directory;
use anyhow::{Context, Result};
use kso_devices::fs::{FsMount, REQUEST_QUEUES, Source};
use kso_files::{Cache, Share};
use kso_vm::{DeviceSocket, FileSystem};
use kso_wire::provide::Caching;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Serves them: what is returned first is to be kept, and the rest is the machine's.
pub fn serve(
    args: &VmArgs,
    served: &mut Served,
    directories: &[Directory],
) -> Result<(Vec<FsMount>, Vec<FileSystem>)> {
    let mut mounts = Vec::new();
    let mut systems = Vec::new();
    for Directory { tag, volume } in directories {
        let what = || format!("cannot share {} with the guest", volume.source.display());
        let (ours, theirs) = UnixStream::pair().with_context(what)?;
        let source = Source::Stream(ours);
        let mount = if volume.is_elsewhere() {
            FsMount::relay(source, tag, served.files(volume)?)
        } else {
            let is_system = args.root.is_none() && volume.target == Path::new("/");
            let mut share = if is_system { Share::system(&[]) } else { Share::new(&volume.source) };
            if volume.read_only {
                share = share.read_only();
            }
            share.cache = match volume.caching {
                Some(Caching::None) => Cache::None,
                Some(Caching::Always) => Cache::Always,
                Some(Caching::Auto) | None => Cache::Auto,
            };
            FsMount::serve(source, tag, share)
        };
        mounts.push(mount.with_context(what)?);
        systems.push(FileSystem {
            tag: tag.clone(),
            socket: DeviceSocket::Connected(theirs.into()),
            queues: REQUEST_QUEUES.try_into().unwrap_or(1),
        });
    }
    Ok((mounts, systems))
}
