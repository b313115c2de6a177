//! The bounded pool that calls the handler.
//!
//! Each worker takes a run that waits, handles it, and puts what became of it beside the others for the runner. While there is
//! work neither side waits for the other, so a quick handler costs a lock for each run and no switch of tasks.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::task::coop::consume_budget;

use super::handler::{AnyHandler, Failure, FailureKind, Handled, Turn};
use super::partition::{Ended, Run};
use crate::log::{Producer, TopicPartition};

/// A run ends after it when more of its records wait: so that partitions take turns, and what is done can be committed.
const TURN: Duration = Duration::from_millis(20);

/// Workers and the work between them and the runner. Dropped, it stops all workers where they are.
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: JoinSet<()>,
}

struct Shared {
    handler: Box<dyn AnyHandler>,
    /// For what handlers send; `None`: it is given back with the run.
    producer: Option<Producer>,
    work: Mutex<Work>,
    /// A run waits. Wakes one worker.
    started: Notify,
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
            started: Notify::new(),
            ended: Notify::new(),
        });
        let mut workers = JoinSet::new();
        for _ in 0..size {
            workers.spawn(work(shared.clone()));
        }
        Self { shared, workers }
    }

    /// Runs that wait for a worker.
    pub(super) fn waiting(&self) -> usize {
        self.shared.work().waiting.len()
    }

    pub(super) fn start(&self, runs: Vec<Run>) {
        let woken = runs.len().min(self.workers.len());
        self.shared.work().waiting.extend(runs);
        for _ in 0..woken {
            self.shared.started.notify_one();
        }
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

    /// Gives the runner a run that has ended, and takes the next.
    fn end(&self, ended: Ended) -> Option<Run> {
        let mut work = self.work();
        work.ended.push(ended);
        if work.ended.len() == 1 {
            self.ended.notify_one();
        }
        work.waiting.pop_front()
    }

    async fn wait_for_run(&self) -> Run {
        loop {
            let mut started = pin!(self.started.notified());
            // Before the look, or a run that is handed over in between would wait for another worker.
            started.as_mut().enable();
            if let Some(run) = self.work().waiting.pop_front() {
                return run;
            }
            started.await;
        }
    }
}

async fn work(shared: Arc<Shared>) {
    let mut next = None;
    loop {
        let run = match next.take() {
            Some(run) => run,
            None => shared.wait_for_run().await,
        };
        next = shared.end(handle(&shared, run).await);
        // A handler that never waits would keep its thread from everybody else.
        consume_budget().await;
    }
}

async fn handle(shared: &Shared, run: Run) -> Ended {
    let turn = Turn {
        is_wanted: &|| run.may_go_on(),
        until: Instant::now() + TURN,
    };
    let handled = shared
        .handler
        .handle(run.partition.clone(), &run.records, run.attempts, turn);
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
    let mut refused = Ok(());
    for (index, record) in sent {
        match producer.send(record).await {
            Ok(delivery) => deliveries.push((index, delivery)),
            Err(error) => {
                refused = Err(failed(index, error));
                break;
            }
        }
    }
    // Those before what was refused are done only when theirs is written.
    for (index, delivery) in deliveries {
        delivery.await.map_err(|error| failed(index, error))?;
    }
    refused
}

#[cfg(test)]
mod tests {
    use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};

    use super::*;
    use crate::log::ProducerRecord;
    use crate::log::kafka::tests::producer_on_mock_broker;

    #[tokio::test(flavor = "multi_thread")]
    async fn what_comes_before_a_record_that_is_refused_is_waited_for() {
        let (cluster, producer) = producer_on_mock_broker().await;
        let to = |topic: &str| ProducerRecord::to(topic).value("v");
        let sent = || vec![(0, to("t")), (1, to("t")), (2, to("elsewhere"))];
        let (failed, _) = produce(&producer, sent()).await.expect_err("the third is refused");
        assert_eq!(failed, 2);
        let refusal = RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED;
        cluster.request_errors(RDKafkaApiKey::Produce, &[refusal]);
        let (failed, _) = produce(&producer, sent()).await.expect_err("nothing was written");
        assert_eq!(failed, 0);
    }
}
