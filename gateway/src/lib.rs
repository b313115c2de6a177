//! Barnabas carries events between Kafka and the browser.
//!
//! ```text
//! browser ── POST job ──▶ server ══ one transaction: chunks + registration ══▶ job topic ──▶ workers
//!    ▲                                                                                       │
//!    │                                     ┌── commands, keyed by job id ◀───────────────────┘
//!    │                                     ▼
//!    │                          atomic store (one owner per partition)
//!    │                                     │ one transaction: state + status event
//!    └── WebSocket, SSE, long-poll ◀── feed ◀══ notifications, key = channel id
//! ```
//!
//! - [`log`] is the event log with its two engines: embedded (SQLite, one process) and Apache Kafka.
//! - [`patterns`] are the pieces from which services on the log are built. They know nothing of HTTP or browsers.
//! - [`server`] is the gateway: it accepts jobs and events and pushes to browsers. It stands behind the default feature
//!   `server`.
//!
//! Invariants that everything else leans on:
//! 1. `patterns` and `server` speak to `log` only; nothing outside `log` names rdkafka or the embedded log's SQLite tables.
//! 2. An event's place in the log is its identity: the resume token is taken from the log, there is no second history.
//! 3. The job store is the only writer of a job's events, so their order is the log's order.
//! 4. Every queue is bounded, and what happens when it is full is written beside it.

pub mod log;
pub mod patterns;
#[cfg(feature = "server")]
pub mod server;
