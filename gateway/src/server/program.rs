//! What every program with a gateway's settings does the same: command line, logging, signals, exit codes. Nothing else reads
//! signals or exits the process.

use std::error::Error as StdError;
use std::ffi::OsString;
use std::future::Future;
use std::io::IsTerminal as _;
use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use super::config::{LoggingConfig, LoggingFormat};
use super::{Config, ConfigError};

const EXIT_USAGE: u8 = 64;
const EXIT_UNAVAILABLE: u8 = 69;
/// As shells say it of a process that SIGINT has ended.
const EXIT_INTERRUPTED: i32 = 130;

/// What a program ends with when it cannot start or go on.
pub type Failure = Box<dyn StdError + Send + Sync>;

/// A program: what it says of itself.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// As it is called.
    pub name: &'static str,
    /// What it is for, in half a sentence.
    pub purpose: &'static str,
    /// Help on the settings that it has beside the gateway's, with its line feeds.
    pub more_help: &'static str,
}

impl Program {
    /// Answers `--help` and `--version`, or reads the settings, starts logging, and runs `main` until it ends. The first SIGINT or
    /// SIGTERM cancels its token, the second ends the process at once.
    ///
    /// Returns 0 when `main` ends well, 64 for a bad setting ([`ConfigError`], also from `main`), 69 for any other failure.
    pub fn run<F>(self, main: impl FnOnce(Config, CancellationToken) -> F) -> ExitCode
    where
        F: Future<Output = Result<(), Failure>>,
    {
        let arguments: Vec<_> = std::env::args_os().skip(1).collect();
        self.start(Config::load, arguments, main)
    }

    /// Like [`Program::run`], for an example, which says on standard output what happens: unless a filter is set it logs errors
    /// only. `main` also gets those of its own `switches`, flags without a value such as `--serve`, that were given.
    pub fn run_example<F>(
        self,
        switches: &[&'static str],
        main: impl FnOnce(Config, Vec<&'static str>, CancellationToken) -> F,
    ) -> ExitCode
    where
        F: Future<Output = Result<(), Failure>>,
    {
        let (own, arguments): (Vec<_>, Vec<_>) = std::env::args_os()
            .skip(1)
            .partition(|argument| switches.iter().any(|switch| argument == switch));
        let is_given = |switch: &&str| own.iter().any(|argument| argument == *switch);
        let given = switches.iter().copied().filter(is_given).collect();
        self.start(load_quietly, arguments, |config, stopping| {
            main(config, given, stopping)
        })
    }

    /// Like [`Program::run`], for an example as [`Program::run_example`] has it, with one `command` that takes a value, such as
    /// `at TIME`, wherever it stands: `main` gets the value.
    pub fn run_example_command<F>(
        self,
        command: &'static str,
        main: impl FnOnce(Config, Option<String>, CancellationToken) -> F,
    ) -> ExitCode
    where
        F: Future<Output = Result<(), Failure>>,
    {
        let mut arguments: Vec<_> = std::env::args_os().skip(1).collect();
        let place = arguments.iter().position(|argument| argument == command);
        let own: Option<Vec<_>> = place.map(|place| arguments.drain(place..arguments.len().min(place + 2)).collect());
        let value = own.map(|own| match own.get(1) {
            Some(value) => Ok(value.to_string_lossy().into_owned()),
            None => Err(ConfigError {
                setting: command.to_owned(),
                reason: "a value is missing behind it".to_owned(),
            }),
        });
        self.start(load_quietly, arguments, |config, stopping| async move {
            main(config, value.transpose()?, stopping).await
        })
    }

    fn start<F>(
        self,
        load: impl FnOnce(Vec<OsString>) -> Result<Config, ConfigError>,
        arguments: Vec<OsString>,
        main: impl FnOnce(Config, CancellationToken) -> F,
    ) -> ExitCode
    where
        F: Future<Output = Result<(), Failure>>,
    {
        if arguments.iter().any(|argument| argument == "--help") {
            println!(
                "{}: {}\n\n{}{}",
                self.name,
                self.purpose,
                Config::help(),
                self.more_help
            );
            return ExitCode::SUCCESS;
        }
        if arguments.iter().any(|argument| argument == "--version") {
            println!("{} {}", self.name, env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        let config = load(arguments).and_then(|config| start_logging(&config).map(|()| config));
        let ended = config.map_err(Failure::from).and_then(|config| {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
            runtime.block_on(async {
                let stopping = CancellationToken::new();
                stop_on_signals(stopping.clone())?;
                main(config, stopping).await
            })
        });
        match ended {
            Ok(()) => ExitCode::SUCCESS,
            // To the one who has just started it, whatever the logging.
            Err(error) if error.is::<ConfigError>() => {
                eprintln!("{}: {error}", self.name);
                ExitCode::from(EXIT_USAGE)
            }
            Err(error) => {
                tracing::error!(%error, "cannot go on: {error}");
                ExitCode::from(EXIT_UNAVAILABLE)
            }
        }
    }
}

/// The settings of an example: unless a filter is set it logs errors only.
fn load_quietly(arguments: Vec<OsString>) -> Result<Config, ConfigError> {
    let mut config = Config::load(arguments)?;
    if config.logging.filter == LoggingConfig::default().filter {
        config.logging.filter = "error".to_owned();
    }
    Ok(config)
}

fn start_logging(config: &Config) -> Result<(), ConfigError> {
    let filter = EnvFilter::builder()
        .parse(&config.logging.filter)
        .map_err(|error| ConfigError {
            setting: "logging.filter".to_owned(),
            reason: error.to_string(),
        })?;
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
