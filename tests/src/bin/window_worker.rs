//! Owns partitions of a store of windows until it is killed: `window-worker BROKERS STORE RESULTS`.

use std::process::ExitCode;
use std::time::Duration;

use barnabas::log::Log;
use barnabas::log::kafka::KafkaSettings;
use barnabas::patterns::atomic_store::AtomicStore;
use barnabas_tests::store::owner_settings;
use barnabas_tests::windows::{counts, hopping};
use barnabas_tests::worker;
use tokio_util::sync::CancellationToken;

/// Commands of one window of the store's.
const WINDOW_COMMANDS: usize = 20;

#[tokio::main]
async fn main() -> ExitCode {
    worker::log_to_stdout("info");
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [brokers, store, results] = arguments.as_slice() else {
        eprintln!("usage: window-worker BROKERS STORE RESULTS");
        return ExitCode::from(64);
    };
    worker::ended("window-worker", run(brokers, store, results).await)
}

async fn run(brokers: &str, store: &str, results: &str) -> Result<(), Box<dyn std::error::Error>> {
    let log = Log::connect_kafka(KafkaSettings::new(brokers)).await?;
    // Nothing is closed because nothing comes: the oracle knows no clock.
    let counts = counts(hopping(), Duration::from_secs(24 * 60 * 60), results);
    let settings = owner_settings(store, WINDOW_COMMANDS);
    AtomicStore::run(log, settings, counts, CancellationToken::new()).await?;
    Ok(())
}
