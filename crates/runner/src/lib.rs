//! The supervisor on the client kernel.
//!
//! It starts a process tree under a seccomp filter ([`sandbox`]), answers the few system calls that the
//! filter hands over ([`interceptor`]) and asks a broker, in this process or behind a socket
//! ([`remote_link`]), for what the client kernel shall not do itself. It takes no decision of policy.
#![forbid(unsafe_code)]

mod descriptors;
pub mod guest;
pub mod interceptor;
mod looks;
pub mod program;
pub mod remote_link;
pub mod sandbox;

pub use guest::{GuestConfig, GuestRunner, GuestStreams};
pub use interceptor::{Interceptor, InterceptorConfig, Publishing};
pub use remote_link::RemoteLink;
pub use sandbox::{Sandbox, SandboxConfig, SandboxError, Volume};
