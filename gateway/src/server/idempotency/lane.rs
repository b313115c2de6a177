//! The doing of requests with a key: what waits is claimed together, and what is won shares a transaction with its answers.
//!
//! ```text
//! requests ─▶ queue ─▶ claims ══▶ the topic ══▶ verdicts ─┬─ won: transaction of the work and its answers
//!                                                         └─ lost: back to the request
//! ```
//! Invariant: what a lane has claimed is in its next transaction, or never. After any failure the producer is made anew under
//! its transactional id, which settles the transaction that failed, and only then are the claims released.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::try_join_all;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::ledger::{Ledger, Standing, Verdict};
use super::note::{Answered, Claim, Note};
use super::{Answer, Request, Work};
use crate::log::{self, Producer, TransactionalProducer};
use crate::server::event::now_ms;
use crate::server::jobs::{
    Job, LARGE_TRANSACTION_TIMEOUT, LaneContext, PRODUCER_PAUSE, ProduceError, TRANSACTION_BYTES, TRANSACTION_JOBS,
};

/// A claim that is silent for so long is doubted by others. A doubt that is wrong costs the lane its producer, and nothing else.
const PATIENCE: Duration = Duration::from_secs(3);

/// How often a lane says that its claims live, while their transaction lasts.
const RENEW_EVERY: Duration = Duration::from_secs(1);

/// Verdicts that are not there by then are given up: the log does not answer.
const VERDICT_TIMEOUT: Duration = Duration::from_secs(10);

/// A request in a queue.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) request: Request,
    pub(super) work: Work,
    pub(super) reply: oneshot::Sender<Reply>,
}

/// What became of a request.
#[derive(Debug)]
pub(super) enum Reply {
    /// It is done, now and by this lane.
    Done(Answer),
    /// Something stood in its way.
    Lost(Box<Work>, Standing),
    /// Nothing of it is done, or it is not known.
    Failed(ProduceError),
}

/// A transactional producer and the task's work around it.
pub(super) struct Lane {
    context: LaneContext,
    ledger: Ledger,
    /// For claims.
    claims: Producer,
    queue: mpsc::Receiver<Waiting>,
    transactional_id: String,
    incarnation: String,
    producer: TransactionalProducer,
    kind: Kind,
    /// How long a key stands for its request.
    retention: Duration,
}

/// Which requests a lane takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Small ones, as many as wait.
    Shared,
    /// One large request at a time.
    Single,
}

/// A batch that failed: what of it was won, and under which claims.
struct Failed {
    won: Vec<Waiting>,
    claims: Vec<Claim>,
    error: ProduceError,
}

impl Lane {
    /// A lane with its producer ready.
    pub(super) async fn new(
        context: LaneContext,
        (ledger, claims): (Ledger, Producer),
        queue: mpsc::Receiver<Waiting>,
        transactional_id: String,
        kind: Kind,
        retention: Duration,
    ) -> log::Result<Self> {
        let producer = kind.producer(&context, &transactional_id).await?;
        let incarnation = new_incarnation();
        ledger.set_incarnation(&transactional_id, Some(incarnation.clone()));
        Ok(Self {
            context,
            ledger,
            claims,
            queue,
            transactional_id,
            incarnation,
            producer,
            kind,
            retention,
        })
    }

    /// Does what comes, until no more does.
    pub(super) async fn run(mut self) {
        while let Some(batch) = self.next_batch().await {
            if !self.serve(batch).await {
                return;
            }
        }
    }

    /// Everything that waits, as far as it fits into a transaction; `None` when no more comes.
    async fn next_batch(&mut self) -> Option<Vec<Waiting>> {
        let first = tokio::select! {
            biased;
            first = self.queue.recv() => first?,
            () = self.context.drained.cancelled() => return None,
        };
        let mut size_bytes = first.work.size_bytes();
        let mut batch = vec![first];
        while self.kind == Kind::Shared
            && batch.len() < TRANSACTION_JOBS
            && size_bytes < TRANSACTION_BYTES
            && let Ok(next) = self.queue.try_recv()
        {
            size_bytes += next.work.size_bytes();
            batch.push(next);
        }
        Some(batch)
    }

    /// Claims, does and answers a batch. A request that may have spoilt it for the others is tried alone, and all are tried again
    /// when a doubt was wrong. Returns false when no more comes.
    async fn serve(&mut self, batch: Vec<Waiting>) -> bool {
        let Err(failed) = self.try_batch(batch).await else {
            return true;
        };
        let again = match &failed.error {
            ProduceError::Log(log::Error::Fenced(_)) => Again::Together,
            error if failed.won.len() > 1 && error.may_be_of_one_job() => Again::Alone,
            _ => Again::No,
        };
        let Some(won) = self.clean_up(failed, again).await else {
            return false;
        };
        let batches: Vec<Vec<Waiting>> = match again {
            Again::Together => vec![won],
            Again::Alone | Again::No => won.into_iter().map(|waiting| vec![waiting]).collect(),
        };
        for batch in batches {
            if let Err(failed) = self.try_batch(batch).await
                && self.clean_up(failed, Again::No).await.is_none()
            {
                return false;
            }
        }
        true
    }

    /// After a failure: settles what was open, and releases what was claimed. Returns what is to be tried again; `None` when no
    /// more comes.
    async fn clean_up(&mut self, failed: Failed, again: Again) -> Option<Vec<Waiting>> {
        let Failed { won, claims, error } = failed;
        tracing::debug!(%error, requests = won.len(), "requests with a key failed: {error}");
        let settled = self.replace_producer().await;
        let keys = won.iter().map(|waiting| waiting.request.key.to_string());
        let claims = keys.zip(claims.into_iter().map(|claim| claim.id)).collect();
        if settled && let Err(error) = self.ledger.release(&self.claims, claims).await {
            // The ledger sees that they are of a dead incarnation, and goes on trying.
            tracing::warn!(%error, "claims are not released yet: {error}");
        }
        if settled && again != Again::No {
            return Some(won);
        }
        for waiting in won {
            // Who has gone meanwhile needs no answer; so for all replies.
            let _ = waiting.reply.send(Reply::Failed(error.clone()));
        }
        settled.then(Vec::new)
    }

    async fn try_batch(&mut self, mut batch: Vec<Waiting>) -> Result<(), Failed> {
        batch.retain(|waiting| !waiting.reply.is_closed());
        let new_claim = |_: &Waiting| Claim::new(&self.transactional_id, &self.incarnation, PATIENCE);
        let claims: Vec<Claim> = batch.iter().map(new_claim).collect();
        let verdicts = match self.claim(&batch, &claims).await {
            Ok(verdicts) => verdicts,
            Err(error) => {
                let error = error.into();
                return Err(Failed {
                    won: batch,
                    claims,
                    error,
                });
            }
        };
        let (mut won, mut won_claims) = (Vec::new(), Vec::new());
        for ((waiting, verdict), claim) in batch.into_iter().zip(verdicts).zip(claims) {
            match verdict {
                Verdict::Won => {
                    won.push(waiting);
                    won_claims.push(claim);
                }
                Verdict::Lost(standing) => {
                    let _ = waiting.reply.send(Reply::Lost(Box::new(waiting.work), standing));
                }
            }
        }
        if won.is_empty() {
            return Ok(());
        }
        let renewing = renew(self.claims.clone(), self.ledger.clone(), notes(&won, &won_claims));
        let produced = tokio::select! {
            biased;
            produced = self.produce(&won) => produced,
            error = renewing => Err(error.into()),
        };
        match produced {
            Ok(answers) => {
                for (waiting, answer) in won.into_iter().zip(answers) {
                    let _ = waiting.reply.send(Reply::Done(answer));
                }
                Ok(())
            }
            Err(error) => Err(Failed {
                won,
                claims: won_claims,
                error,
            }),
        }
    }

    /// Appends claims and waits until the log's order has judged each.
    async fn claim(&self, batch: &[Waiting], claims: &[Claim]) -> log::Result<Vec<Verdict>> {
        let mut verdicts: Vec<_> = claims.iter().map(|claim| self.ledger.verdict(claim)).collect();
        let claiming = async {
            let mut deliveries = Vec::with_capacity(claims.len());
            for (key, note) in notes(batch, claims) {
                let record = note.record(self.ledger.topic(), &key, now_ms());
                deliveries.push(self.claims.send(record).await?);
            }
            try_join_all(deliveries).await?;
            let verdicts = verdicts.iter_mut().map(async |verdict| verdict.get().await);
            try_join_all(verdicts.map(async |verdict| verdict.await.ok_or(log::Error::Closed))).await
        };
        let began = Instant::now();
        timeout(VERDICT_TIMEOUT, claiming).await.unwrap_or_else(|_| {
            Err(log::Error::Timeout {
                operation: "claim keys",
                after_ms: began.elapsed().as_millis() as u64,
            })
        })
    }

    /// Does what was won, and notes the answers, in one transaction.
    async fn produce(&mut self, won: &[Waiting]) -> Result<Vec<Answer>, ProduceError> {
        let jobs: Vec<&Job> = won.iter().filter_map(|waiting| waiting.work.job()).collect();
        let mut tokens = self.context.tokens(&jobs).await?.into_iter();
        let mut transaction = self.producer.begin();
        let is_abandoned = || self.kind == Kind::Single && won[0].reply.is_closed();
        self.context.write(&mut transaction, &jobs, is_abandoned).await?;
        for record in won.iter().flat_map(|waiting| waiting.work.events()) {
            transaction.send(record.clone()).await?;
        }
        let now_ms = now_ms();
        let mut answers = Vec::with_capacity(won.len());
        for Waiting { request, work, .. } in won {
            let job = work.job().map(|job| job.id.clone());
            let token = job.as_ref().and_then(|_| tokens.next()).map(|token| token.to_string());
            let answer = Answer { job, token };
            let note = Note::Answered(Answered {
                fingerprint: request.fingerprint.clone(),
                answer: answer.clone(),
                until_ms: now_ms.saturating_add(self.retention.as_millis() as i64),
            });
            transaction
                .send(note.record(self.ledger.topic(), &request.key, now_ms))
                .await?;
            answers.push(answer);
        }
        transaction.commit().await?;
        Ok(answers)
    }

    /// Makes the producer anew, and so ends what the old one left open; false when no more requests come.
    async fn replace_producer(&mut self) -> bool {
        self.ledger.set_incarnation(&self.transactional_id, None);
        loop {
            match self.kind.producer(&self.context, &self.transactional_id).await {
                Ok(producer) => {
                    self.producer = producer;
                    self.incarnation = new_incarnation();
                    let incarnation = Some(self.incarnation.clone());
                    self.ledger.set_incarnation(&self.transactional_id, incarnation);
                    return true;
                }
                Err(error) => tracing::error!(%error, "requests with a key cannot be done: {error}"),
            }
            tokio::select! {
                () = self.context.drained.cancelled() => return false,
                () = sleep(PRODUCER_PAUSE) => {}
            }
        }
    }
}

/// How what has failed is tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Again {
    No,
    Together,
    Alone,
}

impl Kind {
    async fn producer(self, context: &LaneContext, transactional_id: &str) -> log::Result<TransactionalProducer> {
        match self {
            Self::Shared => context.log.transactional_producer(transactional_id).await,
            Self::Single => {
                let timeout = LARGE_TRANSACTION_TIMEOUT;
                context
                    .log
                    .transactional_producer_within(transactional_id, timeout)
                    .await
            }
        }
    }
}

/// Claims as notes, each of its key.
fn notes(batch: &[Waiting], claims: &[Claim]) -> Vec<(Arc<str>, Note)> {
    let keys = batch.iter().map(|waiting| Arc::clone(&waiting.request.key));
    keys.zip(claims.iter().cloned().map(Note::Claimed)).collect()
}

/// Says every now and then that claims live, until it is dropped, or the log takes no more.
async fn renew(producer: Producer, ledger: Ledger, notes: Vec<(Arc<str>, Note)>) -> log::Error {
    loop {
        sleep(RENEW_EVERY).await;
        for (key, note) in &notes {
            // Whether it arrives is seen by others, not here.
            if let Err(error) = producer.send(note.record(ledger.topic(), key, now_ms())).await {
                return error;
            }
        }
    }
}

fn new_incarnation() -> String {
    Uuid::now_v7().simple().to_string()
}
