//! The bounded pool that calls the handler.
//!
//! Each worker takes a run that waits, handles it, and puts what became of it beside the others for the runner. While there is
//! work neither side waits for the other, so a quick handler costs a lock for each run and no switch of tasks.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;

use super::handler::{AnyHandler, Failure, FailureKind, Handled};
use super::partition::{Ended, Run};
use crate::log::{Producer, TopicPartition};

/// A run ends after it when more of its records wait: so that partitions take turns, and what is done can be committed.
const TURN: Duration = Duration::from_millis(20);

/// Workers and the work between them and the runner. Dropped, it stops all workers where they are.
pub(super) struct Pool {
    shared: Arc<Shared>,
    _workers: JoinSet<()>,
}

struct Shared {
    handler: Box<dyn AnyHandler>,
    /// For what handlers send; `None`: it is given back with the run.
    producer: Option<Producer>,
    work: Mutex<Work>,
    /// One permit for each run that was handed over. Some that were taken back leave theirs.
    waiting: Semaphore,
    /// A run has ended.
    ended: Notify,
}

/// Bounded by the runner, which looks at [`Pool::waiting`] before it hands over more.
#[derive(Default)]
struct Work {
    waiting: VecDeque<Run>,
    ended: Vec<Ended>,
}

impl Pool {
    pub(super) fn new(size: usize, handler: Box<dyn AnyHandler>, producer: Option<Producer>) -> Self {
        let shared = Arc::new(Shared {
            handler,
            producer,
            work: Mutex::default(),
            waiting: Semaphore::new(0),
            ended: Notify::new(),
        });
        let mut workers = JoinSet::new();
        for _ in 0..size {
            workers.spawn(work(shared.clone()));
        }
        Self {
            shared,
            _workers: workers,
        }
    }

    /// Runs that wait for a worker.
    pub(super) fn waiting(&self) -> usize {
        self.shared.work().waiting.len()
    }

    pub(super) fn start(&self, runs: Vec<Run>) {
        let count = runs.len();
        self.shared.work().waiting.extend(runs);
        self.shared.waiting.add_permits(count);
    }

    /// Waits until runs have ended, and returns them. Cancel safe.
    pub(super) async fn ended(&self) -> Vec<Ended> {
        loop {
            let ended = std::mem::take(&mut self.shared.work().ended);
            if !ended.is_empty() {
                return ended;
            }
            self.shared.ended.notified().await;
        }
    }

    /// Ends the runs of a partition that no worker has taken, with nothing done.
    pub(super) fn take_back(&self, partition: &TopicPartition) {
        let mut work = self.shared.work();
        let (back, waiting): (VecDeque<_>, _) = work.waiting.drain(..).partition(|run| run.partition == *partition);
        work.waiting = waiting;
        let handled = Handled::default;
        work.ended.extend(back.into_iter().map(|run| Ended {
            run,
            handled: handled(),
        }));
        drop(work);
        self.shared.ended.notify_one();
    }
}

impl Shared {
    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn work(shared: Arc<Shared>) {
    // Nobody closes the semaphore: workers end when the pool is dropped.
    while let Ok(permit) = shared.waiting.acquire().await {
        permit.forget();
        let Some(run) = shared.work().waiting.pop_front() else {
            continue;
        };
        let ended = handle(&shared, run).await;
        let mut work = shared.work();
        work.ended.push(ended);
        if work.ended.len() == 1 {
            shared.ended.notify_one();
        }
    }
}

async fn handle(shared: &Shared, run: Run) -> Ended {
    let until = Instant::now() + TURN;
    let go_on = || run.may_go_on() && Instant::now() < until;
    let handled = shared
        .handler
        .handle(run.partition.clone(), &run.records, run.attempts, &go_on);
    let mut handled = handled.await;
    if let (Some(producer), false) = (&shared.producer, handled.sent.is_empty()) {
        let sent = std::mem::take(&mut handled.sent);
        if let Err((index, failure)) = produce(producer, sent).await {
            handled.done = index;
            handled.failure = Some(failure);
        }
    }
    Ended { run, handled }
}

/// Produces what a handler has sent; the index of the first record whose was not written, and why.
async fn produce(producer: &Producer, sent: Vec<(usize, crate::log::ProducerRecord)>) -> Result<(), (usize, Failure)> {
    let failed = |index: usize, error: crate::log::Error| {
        let kind = match error.is_retriable() {
            true => FailureKind::Retriable,
            false => FailureKind::NonRetriable,
        };
        let message = format!("what the handler sent was not written: {error}");
        (index, Failure { kind, message })
    };
    let mut deliveries = Vec::with_capacity(sent.len());
    for (index, record) in sent {
        let delivery = producer.send(record).await.map_err(|error| failed(index, error))?;
        deliveries.push((index, delivery));
    }
    for (index, delivery) in deliveries {
        delivery.await.map_err(|error| failed(index, error))?;
    }
    Ok(())
}
