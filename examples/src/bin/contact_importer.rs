//! The importer of contacts alone, for Kafka: any number of them share the work.

use std::process::ExitCode;

use barnabas_examples::command_line::{self, Failure, Settings};
use barnabas_examples::contacts::importer;
use tokio_util::sync::CancellationToken;

fn main() -> ExitCode {
    command_line::start("contact-importer", "imports contacts from Kafka into a database", run)
}

async fn run(settings: Settings, stopping: CancellationToken) -> Result<(), Failure> {
    if settings.config.kafka.brokers.is_none() {
        return Err("KAFKA_BROKERS is not set; on the embedded log the importer runs in `contacts-import`".into());
    }
    let log = settings.config.open_log().await?;
    let ended = importer::run(log.clone(), settings.database, settings.importer, stopping).await;
    log.close().await;
    Ok(ended?)
}
