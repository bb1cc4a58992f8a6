//! What programs see of files, natively and on a directory that the file service performs.

mod agent;
mod random;
mod suite;

pub use agent::{Agent, locks_are_shared};
pub use random::{RandomRun, tree};
pub use suite::{Pjdfstest, Results, parse};
