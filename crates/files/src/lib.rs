//! The file service: FUSE requests performed on directories of the kernel it runs on.
#![forbid(unsafe_code)]
