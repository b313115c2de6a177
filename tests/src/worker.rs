//! What the worker programs of the tests begin and end with.

use std::fmt::Display;
use std::process::ExitCode;

/// Writes what the libraries log to the standard output. `filter` says which of it, as `RUST_LOG` would.
///
/// # Panics
/// If it is called twice.
pub fn log_to_stdout(filter: &str) {
    tracing_subscriber::fmt()
        .with_ansi(false)
        .with_env_filter(filter)
        .init();
}

/// The exit status of a worker that has ended, which says why on the standard error.
pub fn ended(name: &str, result: Result<(), impl Display>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name} ended: {error}");
            ExitCode::FAILURE
        }
    }
}
