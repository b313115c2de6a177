//! The handle of a running consumer, and what it can be asked.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{FailureKind, PauseReason};
use crate::log::{self, Log, NextOffset, StartAt, TopicPartition};
use crate::patterns::Error;

/// Requests that may wait for the runner. When the queue is full the next one waits.
pub(super) const WAITING_REQUESTS: usize = 16;

/// A running consumer. Dropped, it stops as [`ConsumerHandle::shutdown`] does, without anybody waiting for it.
#[derive(Debug)]
pub struct ConsumerHandle {
    log: Log,
    requests: mpsc::Sender<Request>,
    stopping: CancellationToken,
    runner: JoinHandle<Result<(), Error>>,
}

/// What a handle asks of the runner.
#[derive(Debug)]
pub(super) enum Request {
    /// `None`: all partitions, those assigned later too.
    Pause(Option<Vec<TopicPartition>>, bool),
    State(oneshot::Sender<ConsumerState>),
    /// Answered when no handler is at work and all that is done is committed.
    Drain(oneshot::Sender<()>),
}

/// What a consumer has and does now.
#[derive(Clone, Debug, Default)]
pub struct ConsumerState {
    /// The partitions that are the member's, by name.
    pub partitions: Vec<PartitionState>,
    /// Commits that succeeded.
    pub commits: u64,
}

/// One of a consumer's partitions.
#[derive(Clone, Debug)]
pub struct PartitionState {
    /// The partition.
    pub partition: TopicPartition,
    /// What was committed since the partition was assigned.
    pub committed: Option<NextOffset>,
    /// Before it everything is done.
    pub done: NextOffset,
    /// How far it has been read.
    pub read: NextOffset,
    /// Records read and not done.
    pub open: usize,
    /// Bytes of them.
    pub open_bytes: usize,
    /// Why it is paused; empty when it is not.
    pub pauses: Vec<PauseReason>,
    /// What waits for its next attempt.
    pub blocked: Vec<BlockedLane>,
}

/// A record that waits for its next attempt, and with it what must come behind it.
#[derive(Clone, Debug)]
pub struct BlockedLane {
    /// The key that waits; `None`: the whole partition, or a record by itself.
    pub key: Option<bytes::Bytes>,
    /// The failed record.
    pub offset: i64,
    /// Attempts made, those before it waited on retry topics counted.
    pub attempts: u32,
    /// What kind of failure the last one was.
    pub kind: FailureKind,
    /// What it said.
    pub message: String,
    /// How long ago the first attempt failed.
    pub since: Duration,
    /// Until the next attempt; `None`: there is none before an operator asks for it.
    pub due_in: Option<Duration>,
    /// Records that wait behind it.
    pub waiting: usize,
}

impl ConsumerHandle {
    pub(super) fn new(
        log: Log,
        requests: mpsc::Sender<Request>,
        stopping: CancellationToken,
        runner: JoinHandle<Result<(), Error>>,
    ) -> Self {
        Self {
            log,
            requests,
            stopping,
            runner,
        }
    }

    /// Handles no further records of these partitions until [`ConsumerHandle::resume`]. Those in hand are finished.
    ///
    /// # Errors
    /// [`log::Error::Closed`] when the consumer has ended.
    pub async fn pause(&self, partitions: Vec<TopicPartition>) -> log::Result<()> {
        self.send(Request::Pause(Some(partitions), true)).await
    }

    /// Handles records of these partitions again.
    ///
    /// # Errors
    /// [`log::Error::Closed`] when the consumer has ended.
    pub async fn resume(&self, partitions: Vec<TopicPartition>) -> log::Result<()> {
        self.send(Request::Pause(Some(partitions), false)).await
    }

    /// Pauses all partitions, those that are assigned later too.
    ///
    /// # Errors
    /// [`log::Error::Closed`] when the consumer has ended.
    pub async fn pause_all(&self) -> log::Result<()> {
        self.send(Request::Pause(None, true)).await
    }

    /// Resumes all partitions, those paused one by one too.
    ///
    /// # Errors
    /// [`log::Error::Closed`] when the consumer has ended.
    pub async fn resume_all(&self) -> log::Result<()> {
        self.send(Request::Pause(None, false)).await
    }

    /// What the consumer has and does now.
    ///
    /// # Errors
    /// [`log::Error::Closed`] when the consumer has ended.
    pub async fn state(&self) -> log::Result<ConsumerState> {
        self.ask(Request::State).await
    }

    /// How far each of the consumer's partitions is behind: the offsets between what is done and the end, in the order of
    /// [`ConsumerState::partitions`].
    ///
    /// # Errors
    /// [`log::Error::Closed`] when the consumer has ended; what the log says when it cannot be asked for an end.
    pub async fn lag(&self) -> log::Result<Vec<(TopicPartition, i64)>> {
        let states = self.state().await?.partitions;
        let partitions: Vec<_> = states.iter().map(|state| state.partition.clone()).collect();
        let ends = self.log.offsets(&partitions, StartAt::End).await?;
        let behind = states.iter().zip(ends).map(|(state, end)| (end - state.done.0).max(0));
        Ok(partitions.into_iter().zip(behind).collect())
    }

    /// Pauses all partitions, finishes what is in hand and commits it. What is blocked stays uncommitted.
    ///
    /// # Errors
    /// [`log::Error::Closed`] when the consumer ends before that.
    pub async fn drain(&self) -> log::Result<()> {
        self.pause_all().await?;
        self.ask(Request::Drain).await
    }

    /// Finishes what is in hand, for as long as [`super::ConsumerBuilder::drain_timeout`] says, commits it and leaves the group.
    ///
    /// # Errors
    /// What had ended the consumer before.
    pub async fn shutdown(self) -> Result<(), Error> {
        self.stopping.cancel();
        self.ended().await
    }

    /// Waits until the consumer has ended.
    ///
    /// # Errors
    /// [`Error::Log`] when the log refused in a way that trying again does not help.
    pub async fn ended(mut self) -> Result<(), Error> {
        match (&mut self.runner).await {
            Ok(ended) => ended,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            // Only the end of the runtime cancels the task.
            Err(_) => Err(log::Error::Closed.into()),
        }
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> log::Result<T> {
        let (reply, answer) = oneshot::channel();
        self.send(request(reply)).await?;
        answer.await.map_err(|_| log::Error::Closed)
    }

    async fn send(&self, request: Request) -> log::Result<()> {
        self.requests.send(request).await.map_err(|_| log::Error::Closed)
    }
}

impl Drop for ConsumerHandle {
    fn drop(&mut self) {
        self.stopping.cancel();
    }
}
