//! The gateway: accepts jobs and events over HTTP, and pushes what happens to browsers by channel.

pub mod event;
