//! The conformance suite on the embedded log.

use std::sync::OnceLock;
use std::time::Duration;

use barnabas::log::Log;
use barnabas::log::embedded::EmbeddedSettings;
use tempfile::TempDir;

/// A log of its own for each case, whose cleaner is always busy.
async fn log() -> Log {
    static FOLDERS: OnceLock<TempDir> = OnceLock::new();
    let folders = FOLDERS.get_or_init(|| TempDir::new().expect("a folder"));
    let folder = folders.path().join(barnabas_tests::conformance::unique("log"));
    let settings = EmbeddedSettings {
        cleanup_interval: Duration::from_millis(20),
        ..EmbeddedSettings::new(folder)
    };
    Log::open_embedded(settings).await.expect("a log")
}

/// It compacts as soon as it looks.
async fn hurry_compaction(_: &str) {}

barnabas_tests::conformance!(log(), hurry_compaction);
