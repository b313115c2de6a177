//! Settings of the embedded log.

use std::path::PathBuf;
use std::time::Duration;

/// When an append counts as durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// It is on disk before it is acknowledged (`synchronous=FULL`): it survives a power cut.
    #[default]
    Full,
    /// It is with the operating system (`synchronous=NORMAL`): it survives a crash of the process, not a power cut.
    Normal,
}

impl Durability {
    /// SQLite's value of `synchronous`.
    pub(super) fn synchronous(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Normal => "normal",
        }
    }
}

/// Where and how the embedded log is kept.
#[derive(Clone, Debug)]
pub struct EmbeddedSettings {
    /// The folder of `log.sqlite`; made if it is not there.
    pub data_dir: PathBuf,
    /// Default [`Durability::Full`].
    pub durability: Durability,
    /// How often retention and compaction look for work. Default 10 s.
    pub cleanup_interval: Duration,
}

impl EmbeddedSettings {
    /// A log in `data_dir`, everything else at its default.
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            durability: Durability::default(),
            cleanup_interval: Duration::from_secs(10),
        }
    }
}
