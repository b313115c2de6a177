//! The task behind a [`crate::log::Reader`].

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::EmbeddedLog;
use super::catalog::Partition;
use super::cursor::Cursors;
use crate::log::reader::{AssignedBatch, READ_AHEAD_BATCHES, ReaderCommand};
use crate::log::{Error, Reader, Result, StartAt};

/// Commands of a reader that wait for its task. When the queue is full the reader waits.
const WAITING_COMMANDS: usize = 16;

pub(super) fn start(log: EmbeddedLog, topic: Arc<str>) -> Reader {
    let (commands, command_queue) = mpsc::channel(WAITING_COMMANDS);
    let (batches, batch_queue) = mpsc::channel(READ_AHEAD_BATCHES);
    let stopping = log.stopping().clone();
    let task = ReaderTask {
        log,
        topic: topic.clone(),
        commands: command_queue,
        batches,
        cursors: Cursors::default(),
    };
    tokio::spawn(task.run(stopping));
    Reader::new(topic, commands, batch_queue)
}

struct ReaderTask {
    log: EmbeddedLog,
    topic: Arc<str>,
    commands: mpsc::Receiver<ReaderCommand>,
    batches: mpsc::Sender<Result<AssignedBatch>>,
    cursors: Cursors,
}

impl ReaderTask {
    /// Runs until the reader is dropped or the log closed.
    async fn run(mut self, stopping: CancellationToken) {
        loop {
            let changed = self.cursors.changed.clone();
            // Room first, then the read: nothing is read that cannot be handed on.
            let batches = self.batches.clone();
            tokio::select! {
                biased;
                () = stopping.cancelled() => return,
                command = self.commands.recv() => match command {
                    Some(command) => self.obey(command).await,
                    None => return,
                },
                room = batches.reserve() => {
                    let Ok(room) = room else { return };
                    match self.cursors.read(self.log.read_pool()).await {
                        Ok(Some((assignment, batch))) => room.send(Ok(AssignedBatch { assignment, batch })),
                        Err(error) => {
                            if let Error::OffsetOutOfRange { partition, .. } = &error {
                                self.unassign(partition.partition);
                            }
                            room.send(Err(error));
                        }
                        Ok(None) => {
                            drop(room);
                            tokio::select! {
                                () = stopping.cancelled() => return,
                                command = self.commands.recv() => match command {
                                    Some(command) => self.obey(command).await,
                                    None => return,
                                },
                                () = changed.notified() => {}
                            }
                        }
                    }
                }
            }
        }
    }

    async fn obey(&mut self, command: ReaderCommand) {
        match command {
            ReaderCommand::Assign {
                partition,
                at,
                assignment,
                reply,
            } => {
                let assigned = match self.log.topic(&self.topic).and_then(|topic| topic.partition(partition)) {
                    Ok(partition) => self.assign(partition, at, assignment).await,
                    Err(error) => Err(error),
                };
                // The asker may have given up waiting; it is assigned all the same until it says otherwise.
                let _ = reply.send(assigned);
            }
            ReaderCommand::Unassign { partition } => self.unassign(partition),
        }
    }

    fn unassign(&mut self, partition: i32) {
        let cursor = self.cursors.find(&self.topic, partition);
        if let Some(row) = cursor.map(|cursor| cursor.partition.row) {
            self.cursors.remove(row);
        }
    }

    async fn assign(&mut self, partition: Arc<Partition>, at: StartAt, assignment: u64) -> Result<i64> {
        self.cursors.remove(partition.row);
        let offset = self.log.offset_in(&partition, at).await?;
        if offset < partition.start() || offset > partition.end() {
            let error: Error = partition.out_of_range(offset);
            return Err(error);
        }
        self.cursors.insert(partition, offset, assignment);
        Ok(offset)
    }
}
