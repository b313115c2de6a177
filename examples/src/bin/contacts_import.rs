//! The contacts import in one process: gateway, log and importer. With `KAFKA_BROKERS` the log is Kafka's.

use std::process::ExitCode;

use barnabas::log::Log;
use barnabas::server::program::Failure;
use barnabas::server::{Config, Program, Server};
use barnabas_examples::contacts::database::Database;
use barnabas_examples::contacts::importer;
use barnabas_examples::contacts::settings::{self, ImporterSettings};
use tokio_util::sync::CancellationToken;

fn main() -> ExitCode {
    let program = Program {
        name: "contacts-import",
        purpose: "gateway, log and importer of contacts in one process",
        more_help: settings::HELP,
    };
    program.run(|config, stopping| async move {
        let (importer, database) = (ImporterSettings::load(&config)?, settings::database(&config)?);
        let log = config.open_log().await?;
        let ended = serve_and_import(config, &log, importer, database, stopping).await;
        // Last, so that what both have said is written.
        log.close().await;
        ended
    })
}

async fn serve_and_import(
    config: Config,
    log: &Log,
    settings: ImporterSettings,
    database: Database,
    stopping: CancellationToken,
) -> Result<(), Failure> {
    let server = Server::start(config, log.clone(), stopping.clone()).await?;
    println!("http://{}", server.address());
    let importer = async {
        let ended = importer::run(log.clone(), database, settings, stopping.clone()).await;
        // Without an importer no job would end: the gateway stops too.
        stopping.cancel();
        ended
    };
    let ((), imported) = tokio::join!(server.serve(), importer);
    Ok(imported?)
}
