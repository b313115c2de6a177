//! Programs that show how services stand on Barnabas. Each has a folder of its own and is started by one command.
//!
//! | example | shows | command |
//! | --- | --- | --- |
//! | [`contacts`] | jobs from the browser, workers, progress live | `cargo run` |
//! | [`subscriptions`] | schedule and forget: retries until a payment provider is back | `cargo run --bin subscriptions` |
//! | [`checkout`] | exactly once in transactions, while the stage is killed | `cargo run --bin checkout` |
//! | [`orders`] | services in groups of their own, one in trouble, one that joins late | `cargo run --bin orders` |
//! | [`inventory`] | state as a fold of the log, now and at any time before | `cargo run --bin inventory` |
//! | [`split_import`] | who knows when all jobs of an import are in: an atomic store | `cargo run --bin split-import` |
//! | [`clicks`] | telemetry from a page, counted in windows of event time | `cargo run --bin clicks` |
//! | [`installed_apps`] | consume and project: another service's events in a database of one's own | `cargo run --bin installed-apps` |
//! | [`countries`] | tables made from tables, live on a page | `cargo run --bin countries` |
//!
//! On the embedded log each run of those from [`subscriptions`] on has a temporary folder, unless `--data-dir` names one; with
//! `KAFKA_BROKERS` it has topics of its own on Kafka, which it deletes at the end. [`inventory`] leaves what has happened on a log that
//! is named.

pub mod checkout;
pub mod clicks;
pub mod contacts;
pub mod countries;
pub mod installed_apps;
pub mod inventory;
pub mod orders;
pub mod scene;
pub mod split_import;
pub mod subscriptions;
