//! A worker: does jobs, and says so.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use barnabas::log::ProducerSettings;
use barnabas::patterns::atomic_store::Submitter;
use barnabas::patterns::consumer::{ConsumerBuilder, ConsumerHandle, Context, EventHandler, HandlerError, Registry};
use barnabas::server::program::Failure;
use tokio::sync::{Notify, watch};

use super::imports::Done;
use super::{Job, Names};
use crate::scene::{Process, Scene};

/// So seldom that each kill leaves jobs that are done and not committed.
const COMMIT_INTERVAL: Duration = Duration::from_secs(2);

/// How long the work on a job takes.
const WORK: Duration = Duration::from_millis(2);

/// A running worker, in a process of its own. Dropped, it is killed.
pub(super) struct Worker {
    // Dropped before the consumer, whose own end would be a graceful one.
    _process: Process,
    consumer: ConsumerHandle,
}

impl Worker {
    pub(super) async fn start(scene: &Scene, names: &Names, said: &Arc<Said>) -> Result<Self, Failure> {
        let builder = ConsumerBuilder::new(&names.workers, [&names.jobs])
            .session_timeout(Duration::from_secs(6))
            .commit_interval(COMMIT_INTERVAL);
        scene.make(&builder.topics(&scene.log).await?).await?;
        let producer = scene.log.producer(ProducerSettings::default()).await?;
        let importer = Importer {
            submitter: Submitter::new(&names.store, producer),
            said: said.clone(),
        };
        let process = Process::start()?;
        let log = scene.log.clone();
        let registry = Registry::new().on::<Job>("job.split", importer);
        let started = process.spawn(async move { builder.start(&log, registry).await });
        Ok(Self {
            consumer: started.await??,
            _process: process,
        })
    }

    /// Lets it finish what is in hand.
    pub(super) async fn stop(self) -> Result<(), Failure> {
        Ok(self.consumer.shutdown().await?)
    }
}

/// How often a job was said to be done, by all workers, and whether they may work.
#[derive(Debug, Default)]
pub(super) struct Said {
    jobs: AtomicUsize,
    more: Notify,
    working: watch::Sender<bool>,
}

impl Said {
    /// Lets the workers begin, or has them wait before their next jobs: until all are there, so that a kill meets all of them at work.
    pub(super) fn set_working(&self, working: bool) {
        self.working.send_replace(working);
    }

    /// Waits until so many jobs were.
    pub(super) async fn wait_for(&self, jobs: usize) {
        while self.jobs.load(Ordering::Relaxed) < jobs {
            self.more.notified().await;
        }
    }
}

struct Importer {
    submitter: Submitter,
    said: Arc<Said>,
}

impl EventHandler<Job> for Importer {
    async fn handle(&self, _: &mut Context, job: Job) -> Result<(), HandlerError> {
        // The sender is in `said`, and is not dropped meanwhile.
        let _ = self.said.working.subscribe().wait_for(|working| *working).await;
        tokio::time::sleep(WORK).await;
        let done = Done {
            index: job.index,
            total: job.total,
            rows: job.rows,
        };
        self.submitter
            .submit(&job.import, &done)
            .await
            .map_err(HandlerError::retriable)?;
        self.said.jobs.fetch_add(1, Ordering::Relaxed);
        self.said.more.notify_one();
        Ok(())
    }
}
