//! What each request does.

mod attributes;
mod data;
mod directories;
mod locking;
mod names;
mod opening;
mod xattrs;
