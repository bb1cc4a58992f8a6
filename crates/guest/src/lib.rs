//! What runs inside a guest: init, mounts, terminals, and the runner with its control stream.
#![forbid(unsafe_code)]
