//! What the end to end tests share.

pub mod kafka;
pub mod process;
pub mod proxy;
