//! Standard streams, moved between descriptors of any kind by a loop that never waits: at the user's end of a guest's
//! job and at its program's. It knows nothing of guests or terminals.
#![forbid(unsafe_code)]

mod pump;
mod stream;

pub use pump::Pump;
pub use stream::{Direction, Stream};
