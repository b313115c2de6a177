//! The contacts import in one process: gateway, log and importer. With `KAFKA_BROKERS` the log is Kafka's.

use std::process::ExitCode;

use barnabas::server::Server;
use barnabas_examples::command_line::{self, Failure, Settings};
use barnabas_examples::contacts::importer;
use tokio_util::sync::CancellationToken;

fn main() -> ExitCode {
    command_line::start(
        "contacts-import",
        "gateway, log and importer of contacts in one process",
        run,
    )
}

async fn run(settings: Settings, stopping: CancellationToken) -> Result<(), Failure> {
    let log = settings.config.open_log().await?;
    let ended = serve_and_import(settings, &log, stopping).await;
    // Last, so that what both have said is written.
    log.close().await;
    ended
}

async fn serve_and_import(
    settings: Settings,
    log: &barnabas::log::Log,
    stopping: CancellationToken,
) -> Result<(), Failure> {
    let server = Server::start(settings.config, log.clone(), stopping.clone()).await?;
    println!("http://{}", server.address());
    let importer = async {
        let ended = importer::run(log.clone(), settings.database, settings.importer, stopping.clone()).await;
        // Without an importer no job would end: the gateway stops too.
        stopping.cancel();
        ended
    };
    let ((), imported) = tokio::join!(server.serve(), importer);
    Ok(imported?)
}
