//! Reading without a group: a thread that owns a consumer, assigns it partitions, and hands over what it reads.
//!
//! Invariant: reading never jumps. Where it starts is checked against what is kept, and a partition whose next record is gone
//! is unassigned and said to be [`Error::OffsetOutOfRange`].

use std::collections::HashMap;
use std::sync::Arc;

use rdkafka::consumer::Consumer as _;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::{Offset, TopicPartitionList};
use tokio::sync::mpsc;
use tokio::time::sleep;

use super::batch::PartitionBuffer;
use super::error::Resource;
use super::event::{Consumer, ConsumerError, IDLE_TICK, Read, RecordMemory};
use super::{KafkaLog, Started, blocking};
use crate::log::reader::{AssignedBatch, ReaderCommand};
use crate::log::{Batch, Error, Result, StartAt, TopicPartition};

/// Messages taken from librdkafka before batches are handed over and commands are looked at.
const ROUND_MESSAGES: usize = 4000;

type Outgoing = Result<AssignedBatch>;

/// Serves a reader until its handle is dropped or the log is closed.
pub(super) async fn run(
    log: KafkaLog,
    topic: Arc<str>,
    mut commands: mpsc::Receiver<ReaderCommand>,
    batches: mpsc::Sender<Outgoing>,
    started: Started,
) {
    let attempt = log.attempt("read", Resource::Topic(&topic));
    let consumer = match Consumer::new(&log.0.settings.reader(), &log) {
        Ok(consumer) => consumer,
        Err(error) => {
            // A caller who no longer waits needs no answer.
            let _ = started.send(Err(attempt.error(&error)));
            return;
        }
    };
    // As above: the loop then ends at once, its commands being closed.
    let _ = started.send(Ok(()));
    let closing = log.0.closing.clone();
    let mut thread = ReaderThread {
        log: log.clone(),
        topic: topic.clone(),
        consumer,
        partitions: HashMap::new(),
        memory: RecordMemory::default(),
        outgoing: Vec::new(),
    };
    loop {
        let idle = thread.collect().await;
        // One at a time, while commands are served: a caller who assigns need not read for it.
        for batch in std::mem::take(&mut thread.outgoing) {
            let room = loop {
                tokio::select! {
                    biased;
                    () = closing.cancelled() => return,
                    room = batches.reserve() => match room {
                        Ok(room) => break room,
                        Err(_) => return,
                    },
                    command = commands.recv() => match command {
                        Some(command) => thread.serve(command).await,
                        None => return,
                    },
                }
            };
            room.send(batch);
        }
        let ready = thread.consumer.ready.clone();
        tokio::select! {
            biased;
            () = closing.cancelled() => return,
            command = commands.recv() => match command {
                Some(command) => thread.serve(command).await,
                None => return,
            },
            () = std::future::ready(()), if !idle => {}
            () = ready.notified() => {}
            () = sleep(IDLE_TICK) => {}
        }
    }
}

struct ReaderThread {
    log: KafkaLog,
    topic: Arc<str>,
    consumer: Consumer,
    partitions: HashMap<i32, Assigned>,
    memory: RecordMemory,
    outgoing: Vec<Outgoing>,
}

struct Assigned {
    assignment: u64,
    buffer: PartitionBuffer,
}

impl Assigned {
    fn batch(&self, batch: Batch) -> Outgoing {
        Ok(AssignedBatch {
            assignment: self.assignment,
            batch,
        })
    }
}

impl ReaderThread {
    /// Moves what librdkafka has read to `outgoing`. Whether nothing is left there.
    async fn collect(&mut self) -> bool {
        let messages = self.consumer.take(ROUND_MESSAGES);
        let idle = messages.len() < ROUND_MESSAGES;
        let mut buffered = false;
        for message in messages {
            match message.read() {
                Read::Record(message) => {
                    let partition = message.partition();
                    if let Some(assigned) = self.partitions.get_mut(&partition)
                        && let Some(batch) = assigned.buffer.push(&message, &mut self.memory)
                    {
                        self.outgoing.push(assigned.batch(batch));
                    }
                    buffered = true;
                }
                Read::EndOfPartition { partition, offset } => {
                    if let Some(assigned) = self.partitions.get_mut(&partition.partition)
                        && let Some(batch) = assigned.buffer.reach_end(offset)
                    {
                        self.outgoing.push(assigned.batch(batch));
                    }
                }
                Read::Error(error) => self.fail(&error).await,
            }
        }
        if buffered {
            for assigned in self.partitions.values_mut() {
                if let Some(batch) = assigned.buffer.flush() {
                    self.outgoing.push(assigned.batch(batch));
                }
            }
        }
        idle
    }

    async fn serve(&mut self, command: ReaderCommand) {
        match command {
            ReaderCommand::Assign {
                partition,
                at,
                assignment,
                reply,
            } => {
                let answer = self.assign(partition, at, assignment).await;
                // A caller who does not wait for the answer reads all the same.
                let _ = reply.send(answer);
            }
            ReaderCommand::Unassign { partition } => self.unassign(partition),
        }
    }

    async fn assign(&mut self, partition: i32, at: StartAt, assignment: u64) -> Result<i64> {
        self.unassign(partition);
        let of = TopicPartition::new(self.topic.clone(), partition);
        let start = self.check_start(&of, at).await?;
        let attempt = self.log.attempt("read", Resource::Partition(&of));
        let mut list = TopicPartitionList::with_capacity(1);
        list.add_partition_offset(&self.topic, partition, Offset::Offset(start))
            .and_then(|()| self.consumer.client().incremental_assign(&list))
            .map_err(|error| attempt.error(&error))?;
        self.partitions.insert(
            partition,
            Assigned {
                assignment,
                buffer: PartitionBuffer::new(of, start),
            },
        );
        Ok(start)
    }

    /// The offset to start from, which is kept or the end.
    async fn check_start(&self, partition: &TopicPartition, at: StartAt) -> Result<i64> {
        let offset = self.log.offset(partition, at).await?;
        if !matches!(at, StartAt::Offset(_)) {
            return Ok(offset);
        }
        let start = self.log.offset(partition, StartAt::Start).await?;
        let mut end = self.log.offset(partition, StartAt::End).await?;
        if offset > end {
            // Records behind an open transaction are there, though not yet to be read.
            let (log, of) = (self.log.clone(), partition.clone());
            end = blocking(move || log.uncommitted_end(&of)).await??;
        }
        if (start..=end).contains(&offset) {
            return Ok(offset);
        }
        Err(Error::OffsetOutOfRange {
            partition: partition.clone(),
            offset,
            start,
            end,
        })
    }

    fn unassign(&mut self, partition: i32) {
        if self.partitions.remove(&partition).is_none() {
            return;
        }
        let mut list = TopicPartitionList::with_capacity(1);
        list.add_partition(&self.topic, partition);
        if let Err(error) = self.consumer.client().incremental_unassign(&list) {
            // What is still read of it is dropped, as the partition is no longer known here.
            tracing::error!(topic = %self.topic, partition, "a partition cannot be unassigned: {error}");
        }
    }

    async fn fail(&mut self, error: &ConsumerError) {
        let Some(partition) = &error.partition else {
            tracing::debug!("consumer: {}: {}", error.code, error.reason);
            return;
        };
        let Some(assigned) = self.partitions.get(&partition.partition) else {
            return;
        };
        let offset = assigned.buffer.next_offset;
        let attempt = self.log.attempt("read", Resource::Topic(&self.topic));
        let told = match error.code {
            RDKafkaErrorCode::AutoOffsetReset
            | RDKafkaErrorCode::OffsetOutOfRange
            | RDKafkaErrorCode::LogTruncation => match self.log.out_of_range(partition, offset).await {
                Ok(error) => error,
                // What is kept cannot be asked for now; that the offset is gone is known all the same.
                Err(_) => Error::OffsetOutOfRange {
                    partition: partition.clone(),
                    offset,
                    start: -1,
                    end: -1,
                },
            },
            code => match attempt.error(&KafkaError::MessageConsumption(code)) {
                error @ (Error::Unauthorized(_) | Error::UnknownTopic(_)) => error,
                passing => {
                    tracing::debug!(topic = %self.topic, "{passing}: {}", error.reason);
                    return;
                }
            },
        };
        let partition = partition.partition;
        if let Some(assigned) = self.partitions.get_mut(&partition)
            && let Some(batch) = assigned.buffer.flush()
        {
            self.outgoing.push(Ok(AssignedBatch {
                assignment: assigned.assignment,
                batch,
            }));
        }
        self.unassign(partition);
        self.outgoing.push(Err(told));
    }
}
