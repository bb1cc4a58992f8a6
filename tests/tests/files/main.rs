//! The file service by /dev/fuse, without a guest: what programs see is what they see natively.
//!
//! What guests see of it is tested by the suite `vm`.
#![forbid(unsafe_code)]

mod full;
mod locks;
mod place;
mod same;

use std::time::Duration;

/// For what takes seconds.
const LIMIT: Duration = Duration::from_secs(300);
