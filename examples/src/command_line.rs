//! What the programs of the importer have in common: settings, logging, signals, exit codes.
//!
//! They exit as the gateway does: 0 after a graceful stop, 64 for a bad setting, 69 when they cannot start or go on. A second
//! signal ends at once.

use std::future::Future;
use std::io::IsTerminal as _;
use std::process::ExitCode;

use barnabas::server::Config;
use barnabas::server::config::LoggingFormat;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::contacts::database::Database;
use crate::contacts::settings::{self, ImporterSettings};

const EXIT_USAGE: u8 = 64;
const EXIT_UNAVAILABLE: u8 = 69;
/// As shells say it of a process that SIGINT has ended.
const EXIT_INTERRUPTED: i32 = 130;

/// Everything that is set.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The gateway's, of which the importer needs the log and the topics.
    pub config: Config,
    /// The importer's.
    pub importer: ImporterSettings,
    /// Where contacts go.
    pub database: Database,
}

/// What a program ends with when it cannot go on.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Reads the settings, starts logging, and runs the program until it ends or is told to by a signal.
pub fn start<F>(name: &str, purpose: &str, program: impl FnOnce(Settings, CancellationToken) -> F) -> ExitCode
where
    F: Future<Output = Result<(), Failure>>,
{
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--help") {
        println!(
            "{name}: {purpose}\n\n{}  DATABASE_URL\n        sqlite: or postgres: [contacts.sqlite in the data folder]\n  \
             CONTACTS_REGION\n        country of phone numbers without a country code [US]",
            Config::help()
        );
        return ExitCode::SUCCESS;
    }
    if arguments.iter().any(|argument| argument == "--version") {
        println!("{name} {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    let usage = |error: &dyn std::fmt::Display| {
        eprintln!("{name}: {error}");
        ExitCode::from(EXIT_USAGE)
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("{name}: {error}");
            return ExitCode::from(EXIT_UNAVAILABLE);
        }
    };
    // Pools of connections are made within the runtime.
    let _entered = runtime.enter();
    let loaded = Config::load(arguments).and_then(|config| {
        let importer = ImporterSettings::load(&config)?;
        let database = settings::database(&config)?;
        Ok(Settings {
            config,
            importer,
            database,
        })
    });
    let settings = match loaded {
        Ok(settings) => settings,
        Err(error) => return usage(&error),
    };
    if let Err(error) = start_logging(&settings.config) {
        return usage(&format!("BARNABAS_LOGGING_FILTER: {error}"));
    }
    let ended = runtime.block_on(async {
        let stopping = CancellationToken::new();
        stop_on_signals(stopping.clone())?;
        program(settings, stopping).await
    });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "cannot go on: {error}");
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

fn stop_on_signals(stopping: CancellationToken) -> std::io::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if stopping.is_cancelled() {
                std::process::exit(EXIT_INTERRUPTED);
            }
            tracing::info!("stopping");
            stopping.cancel();
        }
    });
    Ok(())
}
