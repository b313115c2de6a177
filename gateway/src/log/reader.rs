//! Reading chosen partitions of one topic, in no group and committing nothing.
//!
//! A [`Reader`] is a handle; its engine reads ahead in a thread or task of its own, as far as the bounded queue between the two
//! lets it.

use std::collections::HashMap;

use tokio::sync::{mpsc, oneshot};

use super::{Batch, Error, Result, TopicPartition};

/// Batches that an engine reads ahead for one reader. When the queue is full the engine waits.
pub(super) const READ_AHEAD_BATCHES: usize = 8;

/// Where reading starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartAt {
    /// The first kept record.
    Start,
    /// The end: only what is committed from now on.
    End,
    /// This offset.
    Offset(i64),
    /// The first record whose timestamp (milliseconds since the Unix epoch) is not before this one.
    TimeMs(i64),
}

/// Reads one topic's partitions, each in order. Ends when dropped.
#[derive(Debug)]
pub struct Reader {
    topic: std::sync::Arc<str>,
    commands: mpsc::Sender<ReaderCommand>,
    batches: mpsc::Receiver<Result<AssignedBatch>>,
    /// The running assignment of each partition, so that what was read ahead under an earlier one is dropped.
    assignments: HashMap<i32, u64>,
    next_assignment: u64,
}

/// What a reader asks of its engine.
#[derive(Debug)]
pub(super) enum ReaderCommand {
    /// Read `partition` from `at`, under this assignment number; replaces a running assignment. Answers with the offset that
    /// reading starts from.
    Assign {
        partition: i32,
        at: StartAt,
        assignment: u64,
        reply: oneshot::Sender<Result<i64>>,
    },
    /// Stop reading `partition`.
    Unassign { partition: i32 },
}

/// A batch and the assignment that it was read under.
#[derive(Debug)]
pub(super) struct AssignedBatch {
    pub(super) assignment: u64,
    pub(super) batch: Batch,
}

impl Reader {
    pub(super) fn new(
        topic: std::sync::Arc<str>,
        commands: mpsc::Sender<ReaderCommand>,
        batches: mpsc::Receiver<Result<AssignedBatch>>,
    ) -> Self {
        Self {
            topic,
            commands,
            batches,
            assignments: HashMap::new(),
            next_assignment: 0,
        }
    }

    /// Starts to read a partition, or starts again elsewhere, and returns the offset it starts from.
    ///
    /// # Errors
    /// [`Error::OffsetOutOfRange`] when the offset is not kept (it is never moved silently), [`Error::UnknownPartition`].
    pub async fn assign(&mut self, partition: i32, at: StartAt) -> Result<i64> {
        let assignment = self.next_assignment;
        self.next_assignment += 1;
        self.assignments.insert(partition, assignment);
        let (reply, answer) = oneshot::channel();
        let command = ReaderCommand::Assign {
            partition,
            at,
            assignment,
            reply,
        };
        self.commands.send(command).await.map_err(|_| Error::Closed)?;
        let started = answer.await.map_err(|_| Error::Closed)?;
        if started.is_err() {
            self.assignments.remove(&partition);
        }
        started
    }

    /// Stops reading a partition. Nothing more of it is returned.
    pub async fn unassign(&mut self, partition: i32) -> Result<()> {
        self.assignments.remove(&partition);
        self.commands
            .send(ReaderCommand::Unassign { partition })
            .await
            .map_err(|_| Error::Closed)
    }

    /// The next batch of any assigned partition; waits until there is one. Cancel safe.
    ///
    /// # Errors
    /// [`Error::OffsetOutOfRange`] when retention has overtaken the reader: the partition is then unassigned.
    /// [`Error::Closed`] when the log has ended. After any other the next call goes on where reading stopped.
    pub async fn next(&mut self) -> Result<Batch> {
        loop {
            let AssignedBatch { assignment, batch } = match self.batches.recv().await.ok_or(Error::Closed)? {
                Ok(batch) => batch,
                Err(error) => {
                    if let Error::OffsetOutOfRange { partition, .. } = &error {
                        self.assignments.remove(&partition.partition);
                    }
                    return Err(error);
                }
            };
            if self.assignments.get(&batch.partition.partition) == Some(&assignment) {
                return Ok(batch);
            }
        }
    }

    /// The partition `partition` of the topic that is read.
    pub fn topic_partition(&self, partition: i32) -> TopicPartition {
        TopicPartition::new(self.topic.clone(), partition)
    }
}
