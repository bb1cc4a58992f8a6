//! Reading a few options.

use super::{Defaults, TABLE, read_one};
use kso_wire::{OptionName, SocketOptions};
use std::os::fd::BorrowedFd;

/// Those of `names` that `socket` has otherwise than `defaults`, in the order in which to apply them.
#[must_use]
pub fn read_these(socket: BorrowedFd<'_>, defaults: &Defaults, names: &[OptionName]) -> SocketOptions {
    let mut options = SocketOptions::default();
    for (entry, default) in TABLE.iter().zip(&defaults.values) {
        if names.contains(&entry.name)
            && let Ok(value) = read_one(socket, entry)
            && Some(value) != *default
        {
            options.push(entry.name, value);
        }
    }
    options
}
