//! Owns partitions of a store of requests as its argument says, a [`StoreWorkerSettings`] in JSON, and submits what it is told, until
//! it is killed.

use std::process::ExitCode;

use barnabas::log::Log;
use barnabas::log::embedded::EmbeddedSettings;
use barnabas::log::kafka::KafkaSettings;
use barnabas::patterns::atomic_store::AtomicStore;
use barnabas_tests::store::{Requests, StoreWorkerSettings, owner_settings, submit_all};
use barnabas_tests::worker;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> ExitCode {
    worker::log_to_stdout("info");
    let settings = std::env::args().nth(1).map(|json| serde_json::from_str(&json));
    let Some(Ok(settings)) = settings else {
        eprintln!("usage: store-worker SETTINGS (as JSON): {settings:?}");
        return ExitCode::from(64);
    };
    worker::ended("store-worker", run(settings).await)
}

async fn run(settings: StoreWorkerSettings) -> Result<(), Box<dyn std::error::Error>> {
    let log = match &settings.brokers {
        Some(brokers) => Log::connect_kafka(KafkaSettings::new(brokers)).await?,
        None => Log::open_embedded(EmbeddedSettings::new(&settings.data_dir)).await?,
    };
    let stopping = CancellationToken::new();
    let mut owners = JoinSet::new();
    for _ in 0..settings.owners {
        let requests = Requests::new(&settings.completions);
        let owner = owner_settings(&settings.store, settings.window_commands);
        owners.spawn(AtomicStore::run(log.clone(), owner, requests, stopping.clone()));
    }
    if let Some(load) = settings.submit {
        submit_all(&log, &settings.store, load).await;
        println!("submitted");
    }
    while let Some(ended) = owners.join_next().await {
        ended??;
    }
    Ok(())
}
