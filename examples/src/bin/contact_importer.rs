//! The importer of contacts alone, for Kafka: any number of them share the work.

use std::process::ExitCode;

use barnabas::server::{ConfigError, Program};
use barnabas_examples::contacts::importer;
use barnabas_examples::contacts::settings::{self, ImporterSettings};

fn main() -> ExitCode {
    let program = Program {
        name: "contact-importer",
        purpose: "imports contacts from Kafka into a database",
        more_help: settings::HELP,
    };
    program.run(|config, stopping| async move {
        let (importer, database) = (ImporterSettings::load(&config)?, settings::database(&config)?);
        if config.kafka.brokers.is_none() {
            let reason = "not set; on the embedded log the importer runs in `contacts-import`".to_owned();
            let setting = "KAFKA_BROKERS".to_owned();
            return Err(ConfigError { setting, reason }.into());
        }
        let log = config.open_log().await?;
        let ended = importer::run(log.clone(), database, importer, stopping).await;
        log.close().await;
        Ok(ended?)
    })
}
