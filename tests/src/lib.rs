//! What the end to end tests share.

pub mod conformance;
pub mod http;
pub mod kafka;
pub mod process;
pub mod proxy;
pub mod subscriber;
