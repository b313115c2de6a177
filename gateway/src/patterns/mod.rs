//! The patterns that make event-driven services right, on either engine of [`crate::log`].
//!
//! | pattern | promise | order | cost |
//! | --- | --- | --- | --- |
//! | [`atomic_store`] | each command counts once; state, derived events and consumed offsets are one transaction | per key, that of the commands | the open keys in memory, one transaction per window |

pub mod atomic_store;
mod error;

pub use error::Error;
