//! Transactions: records to several topics and consumed offsets become visible together, or not at all.
//!
//! A [`TransactionalProducer`] is a handle; its engine owns the producer in a thread or task of its own. Records travel to it
//! in slices, so that a transaction larger than memory can be written.

use tokio::sync::{mpsc, oneshot};

use super::{CommittedOffset, Error, GroupMetadata, ProducerRecord, Result, TopicPartition};

/// A slice is handed to the engine when it has this many bytes.
const SLICE_BYTES: usize = 512 * 1024;
/// A slice is handed to the engine when it has this many records.
const SLICE_RECORDS: usize = 1000;

/// Slices on their way to the engine. When the queue is full [`Transaction::send`] waits.
pub(super) const WAITING_SLICES: usize = 4;

/// Writes transactions under one transactional id, one at a time.
#[derive(Debug)]
pub struct TransactionalProducer {
    transactional_id: String,
    commands: mpsc::Sender<TransactionCommand>,
    /// A dropped transaction could not be aborted at once because the queue was full: the next one does it first.
    abort_first: bool,
}

/// What a transactional producer asks of its engine. A transaction is open from its first command to `Commit` or `Abort`.
#[derive(Debug)]
pub(super) enum TransactionCommand {
    /// Records of the open transaction. An error is kept and answered to `Commit`.
    Records(Vec<ProducerRecord>),
    /// The last records, the consumed offsets, and the end. After an error nothing of it is visible, except for
    /// [`Error::Indefinite`].
    Commit {
        records: Vec<ProducerRecord>,
        offsets: Vec<GroupOffsets>,
        reply: oneshot::Sender<Result<()>>,
    },
    /// Nothing of the open transaction becomes visible.
    Abort { reply: oneshot::Sender<Result<()>> },
}

/// Offsets that a member of a group has consumed.
#[derive(Debug)]
pub(super) struct GroupOffsets {
    pub(super) group: GroupMetadata,
    pub(super) offsets: Vec<(TopicPartition, CommittedOffset)>,
}

impl TransactionalProducer {
    pub(super) fn new(transactional_id: &str, commands: mpsc::Sender<TransactionCommand>) -> Self {
        Self {
            transactional_id: transactional_id.to_owned(),
            commands,
            abort_first: false,
        }
    }

    /// The transactional id.
    pub fn transactional_id(&self) -> &str {
        &self.transactional_id
    }

    /// Begins a transaction. It costs nothing until the first record is sent.
    pub fn begin(&mut self) -> Transaction<'_> {
        Transaction {
            producer: self,
            slice: Vec::new(),
            slice_bytes: 0,
            offsets: Vec::new(),
            open: false,
        }
    }

    async fn command(&mut self, command: TransactionCommand) -> Result<()> {
        if self.abort_first {
            let (reply, _) = oneshot::channel();
            self.commands
                .send(TransactionCommand::Abort { reply })
                .await
                .map_err(|_| Error::Closed)?;
            self.abort_first = false;
        }
        self.commands.send(command).await.map_err(|_| Error::Closed)
    }
}

/// An open transaction. Dropped without a commit, it is aborted.
#[derive(Debug)]
pub struct Transaction<'a> {
    producer: &'a mut TransactionalProducer,
    slice: Vec<ProducerRecord>,
    slice_bytes: usize,
    offsets: Vec<GroupOffsets>,
    /// Whether the engine has something of it that is neither committed nor aborted.
    open: bool,
}

impl Transaction<'_> {
    /// Adds a record, waiting while the engine is behind. Records keep their order.
    ///
    /// # Errors
    /// [`Error::Closed`]. Everything else is answered by the commit.
    pub async fn send(&mut self, record: ProducerRecord) -> Result<()> {
        self.slice_bytes += record.size_bytes();
        self.slice.push(record);
        if self.slice_bytes >= SLICE_BYTES || self.slice.len() >= SLICE_RECORDS {
            let slice = std::mem::take(&mut self.slice);
            self.slice_bytes = 0;
            self.open = true;
            self.producer.command(TransactionCommand::Records(slice)).await?;
        }
        Ok(())
    }

    /// Makes the consumed offsets of a group member part of the transaction, and what is noted beside them. Members of several
    /// groups may have theirs in one transaction.
    pub fn send_offsets<O: Into<CommittedOffset>>(
        &mut self,
        group: GroupMetadata,
        offsets: impl IntoIterator<Item = (TopicPartition, O)>,
    ) {
        let offsets = offsets
            .into_iter()
            .map(|(partition, offset)| (partition, offset.into()));
        let offsets: Vec<_> = offsets.collect();
        if !offsets.is_empty() {
            self.offsets.push(GroupOffsets { group, offsets });
        }
    }

    /// Ends the transaction; when it returns, everything in it is durable and becomes visible: on the embedded engine at once, on
    /// Kafka within milliseconds, when the brokers have written their markers. A transaction with nothing in it does nothing.
    ///
    /// # Errors
    /// [`Error::Fenced`]; [`Error::UnknownMember`] when the offsets' member was replaced; [`Error::UnknownTopic`],
    /// [`Error::RecordTooLarge`] of any of its records; [`Error::Aborted`]. After each of them nothing of the transaction is
    /// visible. [`Error::Indefinite`]: it may or may not be.
    pub async fn commit(mut self) -> Result<()> {
        if !self.open && self.slice.is_empty() && self.offsets.is_empty() {
            return Ok(());
        }
        let (reply, answer) = oneshot::channel();
        let command = TransactionCommand::Commit {
            records: std::mem::take(&mut self.slice),
            offsets: std::mem::take(&mut self.offsets),
            reply,
        };
        self.producer.command(command).await?;
        self.open = false;
        answer.await.map_err(|_| Error::Closed)?
    }

    /// Ends the transaction with nothing of it visible.
    ///
    /// # Errors
    /// [`Error::Fenced`], [`Error::Closed`].
    pub async fn abort(mut self) -> Result<()> {
        if !self.open {
            return Ok(());
        }
        let (reply, answer) = oneshot::channel();
        self.producer.command(TransactionCommand::Abort { reply }).await?;
        self.open = false;
        answer.await.map_err(|_| Error::Closed)?
    }
}

impl Drop for Transaction<'_> {
    fn drop(&mut self) {
        if self.open {
            let (reply, _) = oneshot::channel();
            let abort = self.producer.commands.try_send(TransactionCommand::Abort { reply });
            self.producer.abort_first = matches!(abort, Err(mpsc::error::TrySendError::Full(_)));
        }
    }
}
