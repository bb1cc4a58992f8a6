//! A file system in an image, read by Rust code in this process: no kernel's file system code touches its bytes.
//!
//! ```text
//!   stream -- a request --> Tree: nodes by path, open files --> Disk: ext4-view, behind a guard --> the image
//!          <-- its reply --
//! ```
//!
//! Images are hostile: what is read from them has bounds, and a panic of the reader is an `EIO`; after a few the image is given up.
//! Nothing is written. What ext4-view does not tell, numbers of inodes among it, is made up: see `docs/files.md`.

mod disk;
mod tree;

use crate::abi;
use crate::frames::{Frames, Link, MAX_FRAME, PING};
use crate::hello::{self, Boot};
use crate::worker::bare_reply;
use disk::Disk;
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tree::Tree;

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file.
    #[error("cannot open it: {0}")]
    Open(#[from] io::Error),
    /// What is in it.
    #[error("it is no ext4 file system that can be read: {0}")]
    Unreadable(String),
}

/// An image that can be served.
#[derive(Clone, Debug)]
pub struct Image {
    file: Arc<File>,
    size: u64,
}

impl Image {
    /// Opens an image of ext4 (or ext2).
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        let image = Self { file: Arc::new(file), size };
        Disk::open(&image.file)?;
        Ok(image)
    }

    /// A directory of it: for [`Volume::serve`], in the same thread.
    ///
    /// # Errors
    /// `ENOENT`, `ENOTDIR`; `EIO` if it cannot be read any more.
    pub fn volume(&self, directory: &Path, validity: Duration) -> Result<Volume, Errno> {
        let disk = Disk::open(&self.file).map_err(|error| {
            tracing::warn!(%error, "an image cannot be read any more");
            Errno::IO
        })?;
        Ok(Volume(Tree::new(disk, directory, self.size, validity)?))
    }
}

/// A directory of an image. It stays in its thread.
#[derive(Debug)]
pub struct Volume(Tree);

impl Volume {
    /// Performs what is asked on `stream`, a connected stream socket, until it ends: see [`crate::stream::serve`].
    ///
    /// # Errors
    /// What came was no request, or the stream failed. An end is none.
    pub fn serve(mut self, stream: OwnedFd) -> io::Result<()> {
        let link = Link::new(stream)?;
        let mut frames = Frames::new(link.reader()?, abi::IN_HEADER);
        if link.send(&hello::encode(Boot::own()), None).is_err() {
            return Ok(());
        }
        let mut request = Vec::new();
        let mut reply = Vec::with_capacity(MAX_FRAME);
        while frames.next(&mut request).map_err(io::Error::other)? {
            let ping = crate::request::header(&request).filter(|header| header.opcode == PING);
            if let Some(header) = ping {
                reply.clear();
                reply.extend_from_slice(&bare_reply(header.unique, 0));
            } else if !self.0.serve(&request, &mut reply) {
                continue;
            }
            // If nobody reads it, reading will tell.
            let _ = link.send(&reply, None);
        }
        link.end();
        Ok(())
    }
}
