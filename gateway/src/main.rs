//! The command line of the gateway; nothing else reads signals or exits the process.
//!
//! Exits 0 after a graceful stop, 64 for a bad setting, 69 when the gateway cannot start. A second signal ends at once.

use std::io::IsTerminal as _;
use std::process::ExitCode;

use barnabas::server::config::LoggingFormat;
use barnabas::server::{self, Config};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

const EXIT_USAGE: u8 = 64;
const EXIT_UNAVAILABLE: u8 = 69;
/// As shells say it of a process that SIGINT has ended.
const EXIT_INTERRUPTED: i32 = 130;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--help") {
        println!(
            "barnabas: carries events between Kafka and the browser\n\n{}",
            Config::help()
        );
        return ExitCode::SUCCESS;
    }
    if arguments.iter().any(|argument| argument == "--version") {
        println!("barnabas {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    let config = match Config::load(arguments) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("barnabas: {error}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    if let Err(error) = start_logging(&config) {
        eprintln!("barnabas: BARNABAS_LOGGING_FILTER: {error}");
        return ExitCode::from(EXIT_USAGE);
    }
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "cannot start: {error}");
            ExitCode::from(EXIT_UNAVAILABLE)
        }
    }
}

fn start_logging(config: &Config) -> Result<(), tracing_subscriber::filter::ParseError> {
    let filter = EnvFilter::builder().parse(&config.logging.filter)?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match config.logging.format {
        LoggingFormat::Text => subscriber.init(),
        LoggingFormat::Json => subscriber.json().init(),
    }
    Ok(())
}

#[tokio::main]
async fn run(config: Config) -> Result<(), Box<dyn std::error::Error>> {
    let stopping = CancellationToken::new();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let on_signal = stopping.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if on_signal.is_cancelled() {
                std::process::exit(EXIT_INTERRUPTED);
            }
            tracing::info!("stopping");
            on_signal.cancel();
        }
    });
    let log = config.open_log().await?;
    let served = server::run(config, log.clone(), stopping).await;
    log.close().await;
    Ok(served?)
}
