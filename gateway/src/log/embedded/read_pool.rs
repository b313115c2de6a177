//! Connections that read, shared by all readers. Reads run on tokio's blocking threads, a bounded number at a time.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use rusqlite::Connection;
use tokio::sync::Semaphore;

use super::schema;
use crate::log::{Error, Result};

/// Reads that run at a time; more wait for their turn.
const READS_AT_A_TIME: usize = 8;

/// A pool of connections. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct ReadPool {
    file: PathBuf,
    idle: Arc<Mutex<Vec<Connection>>>,
    permits: Arc<Semaphore>,
}

impl ReadPool {
    pub(super) fn new(file: PathBuf) -> Self {
        Self {
            file,
            idle: Arc::default(),
            permits: Arc::new(Semaphore::new(READS_AT_A_TIME)),
        }
    }

    /// Runs a read off the async threads.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let permit = self.permits.clone().acquire_owned().await.map_err(|_| Error::Closed)?;
        let pool = self.clone();
        let run = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let idle = pool.idle().pop();
            let connection = match idle {
                Some(connection) => connection,
                None => schema::open_reader(&pool.file)?,
            };
            let result = read(&connection);
            pool.idle().push(connection);
            result
        });
        run.await
            .map_err(|error| Error::Storage(format!("a read ended early: {error}")))?
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Connection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
