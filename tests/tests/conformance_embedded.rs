//! The conformance suite on the embedded log.

use std::sync::OnceLock;

use barnabas::log::Log;
use barnabas::log::embedded::EmbeddedSettings;
use tempfile::TempDir;

/// A log of its own for each case.
async fn log() -> Log {
    static FOLDERS: OnceLock<TempDir> = OnceLock::new();
    let folders = FOLDERS.get_or_init(|| TempDir::new().expect("a folder"));
    let folder = folders.path().join(barnabas_tests::conformance::unique("log"));
    Log::open_embedded(EmbeddedSettings::new(folder)).await.expect("a log")
}

barnabas_tests::conformance!(log());
