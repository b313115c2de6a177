//! Runs one projection as its argument says, a [`ProjectionWork`] in JSON, until SIGTERM.

use std::process::ExitCode;

use barnabas::patterns::projection::Projection;
use barnabas_tests::projection::ProjectionWork;
use barnabas_tests::worker;
use tokio::signal::unix::{SignalKind, signal};

#[tokio::main]
async fn main() -> ExitCode {
    worker::log_to_stdout("info,barnabas=debug");
    let work = std::env::args().nth(1).map(|json| serde_json::from_str(&json));
    let Some(Ok(work)) = work else {
        eprintln!("usage: projection-worker WORK (as JSON): {work:?}");
        return ExitCode::from(64);
    };
    worker::ended("projection-worker", run(work).await)
}

async fn run(work: ProjectionWork) -> Result<(), Box<dyn std::error::Error>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let log = work.open_log().await?;
    let projection = Projection::start(&log, work.open_database(), work.settings(), work.projector()).await?;
    terminate.recv().await;
    projection.shutdown().await?;
    log.close().await;
    Ok(())
}
