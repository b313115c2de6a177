//! The store: which jobs of each import are in, and who is told when all are.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use barnabas::log::ProducerRecord;
use barnabas::patterns::Error;
use barnabas::patterns::atomic_store::{Aggregate, AtomicStore, AtomicStoreSettings, Derived};
use barnabas::server::program::Failure;
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::Names;
use crate::scene::{Process, Scene};

/// An import as the store knows it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Import {
    /// How many jobs it has.
    pub total: u32,
    /// Those that are in.
    pub done: BTreeSet<u32>,
    /// The rows of those.
    pub rows: u64,
    /// Whether it was told complete.
    pub is_told: bool,
}

/// What a worker says of a job.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Done {
    pub(super) index: u32,
    pub(super) total: u32,
    pub(super) rows: u64,
}

/// Imports as an aggregate of what workers say.
struct Imports {
    completions: Arc<str>,
}

impl Aggregate for Imports {
    type State = Import;
    type Command = Done;

    fn apply(&self, _: &str, state: &mut Option<Import>, done: Done) {
        let import = state.get_or_insert_default();
        import.total = done.total;
        if done.index < done.total && import.done.insert(done.index) {
            import.rows += done.rows;
        }
    }

    fn derive(&self, import: &str, state: &mut Import, _: i64) -> Derived {
        let mut derived = Derived::default();
        if !state.is_told && state.done.len() == state.total as usize {
            state.is_told = true;
            let completion = ProducerRecord::to(self.completions.clone())
                .key(import.to_owned())
                .value(format!("{} rows", state.rows));
            derived.events.push(completion);
        }
        derived
    }

    fn is_ended(&self, state: &Import) -> bool {
        state.is_told
    }
}

/// An owner of the store in a process of its own. Dropped, it is killed.
pub(super) struct Owner {
    store: JoinHandle<Result<(), Error>>,
    stopping: CancellationToken,
    _process: Process,
}

impl Owner {
    pub(super) fn start(scene: &Scene, names: &Names) -> Result<Self, Failure> {
        let process = Process::start()?;
        let stopping = CancellationToken::new();
        let settings = AtomicStoreSettings {
            session_timeout: Duration::from_secs(6),
            ..AtomicStoreSettings::new(&names.store)
        };
        let imports = Imports {
            completions: names.completions.as_str().into(),
        };
        let store = AtomicStore::run(scene.log.clone(), settings, imports, stopping.clone());
        Ok(Self {
            store: process.spawn(store),
            stopping,
            _process: process,
        })
    }

    /// Lets it finish what is in hand.
    pub(super) async fn stop(self) -> Result<(), Failure> {
        self.stopping.cancel();
        Ok(self.store.await??)
    }
}
