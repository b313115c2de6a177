//! The consumer runtime on both logs: what is handled, in which order, how often, and what is committed.
//!
//! What the group has committed, and what stands on retry and dead-letter topics, is read back from the log by itself.

mod dead_letters;
mod failures;
mod operators;
mod order;
mod processor;
mod rebalance;
mod support;
