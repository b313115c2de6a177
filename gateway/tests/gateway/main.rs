//! The gateway through its front door: real sockets on a free port, the embedded log in a temporary folder. What is on the log is
//! read back from it, not from the gateway's own counts.

mod admin;
mod cli;
mod events;
mod http;
mod idempotency;
mod jobs;
mod schedules;
mod support;
mod topic_events;
