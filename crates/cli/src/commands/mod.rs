//! One file per command.

pub mod broker;
mod control;
pub mod doctor;
pub mod guest;
pub mod kernels;
pub mod program;
pub mod provide;
pub mod ps;
pub mod run;
pub mod trace;
pub mod vm;
pub mod volumes;
