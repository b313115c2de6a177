//! The task behind a [`crate::log::TransactionalProducer`]. A small transaction is one command to the writer; the values of a
//! large one are staged slice by slice, so that others' appends go in between, and published by small rows.

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use super::EmbeddedLog;
use super::writer::{MemberOffsets, Row, TransactionRows, Value, Write, unstage};
use crate::log::group::GroupMetadataEngine;
use crate::log::transaction::{GroupOffsets, TransactionCommand, WAITING_SLICES};
use crate::log::{Error, ProducerRecord, Result, TransactionalProducer};

/// Bytes of values from which a transaction is staged.
const STAGE_BYTES: usize = 1024 * 1024;

pub(super) async fn start(log: EmbeddedLog, transactional_id: &str) -> Result<TransactionalProducer> {
    let epoch = log.coordinator().fence(transactional_id);
    // A transaction of the fenced producer may be in the writer's hands: what follows must see it.
    log.write(|_| Ok(())).await?;
    let (commands, queue) = mpsc::channel(WAITING_SLICES);
    let producer = TransactionTask {
        log,
        transactional_id: transactional_id.to_owned(),
        epoch,
        open: Open::default(),
    };
    tokio::spawn(producer.run(queue));
    Ok(TransactionalProducer::new(transactional_id, commands))
}

struct TransactionTask {
    log: EmbeddedLog,
    transactional_id: String,
    epoch: u64,
    open: Open,
}

/// The open transaction.
#[derive(Default)]
struct Open {
    rows: Vec<Row>,
    /// Bytes of values in `rows` that are not staged.
    inline_bytes: usize,
    staged: Vec<i64>,
    /// The first thing that went wrong; answered to the commit.
    failed: Option<Error>,
}

impl TransactionTask {
    /// Runs until the producer is dropped. What is open then is aborted.
    async fn run(mut self, mut commands: mpsc::Receiver<TransactionCommand>) {
        while let Some(command) = commands.recv().await {
            match command {
                TransactionCommand::Records(records) => self.add(records).await,
                TransactionCommand::Commit {
                    records,
                    offsets,
                    reply,
                } => {
                    self.add(records).await;
                    // The asker may have given up waiting; the outcome is the same.
                    let _ = reply.send(self.commit(offsets).await);
                }
                TransactionCommand::Abort { reply } => {
                    self.abort().await;
                    let _ = reply.send(self.log.coordinator().check_epoch(&self.transactional_id, self.epoch));
                }
            }
        }
        self.abort().await;
    }

    async fn add(&mut self, records: Vec<ProducerRecord>) {
        if self.open.failed.is_some() {
            return;
        }
        for record in records {
            match self.log.row(record) {
                Ok(row) => {
                    if let Value::Inline(Some(value)) = &row.value {
                        self.open.inline_bytes += value.len();
                    }
                    self.open.rows.push(row);
                }
                Err(error) => {
                    self.open.failed = Some(error);
                    return;
                }
            }
        }
        if self.open.inline_bytes >= STAGE_BYTES
            && let Err(error) = self.stage().await
        {
            self.open.failed = Some(error);
        }
    }

    /// Writes the values that are held, leaving where they are.
    async fn stage(&mut self) -> Result<()> {
        let held = |row: &Row| match &row.value {
            Value::Inline(Some(value)) => Some(value.clone()),
            _ => None,
        };
        let values: Vec<Bytes> = self.open.rows.iter().filter_map(held).collect();
        let (reply, answer) = oneshot::channel();
        self.log.send(Write::Stage { values, reply }).await?;
        let blobs = answer.await.map_err(|_| Error::Closed)??;
        self.open.staged.extend(&blobs);
        let rows = self
            .open
            .rows
            .iter_mut()
            .filter(|row| matches!(row.value, Value::Inline(Some(_))));
        for (row, blob) in rows.zip(blobs) {
            row.value = Value::Staged(blob);
        }
        self.open.inline_bytes = 0;
        Ok(())
    }

    async fn commit(&mut self, offsets: Vec<GroupOffsets>) -> Result<()> {
        if let Some(error) = self.open.failed.take() {
            self.abort().await;
            return Err(error);
        }
        let offsets = offsets.into_iter().map(|offsets| self.member_offsets(offsets));
        let offsets = match offsets.collect::<Result<_>>() {
            Ok(offsets) => offsets,
            Err(error) => {
                self.abort().await;
                return Err(error);
            }
        };
        let transaction = TransactionRows {
            transactional_id: self.transactional_id.clone(),
            epoch: self.epoch,
            rows: std::mem::take(&mut self.open.rows),
            offsets,
        };
        let (reply, answer) = oneshot::channel();
        self.log.send(Write::Transaction { transaction, reply }).await?;
        let committed = answer.await.map_err(|_| Error::Closed)?;
        match &committed {
            Ok(()) => self.open = Open::default(),
            Err(_) => self.abort().await,
        }
        committed
    }

    fn member_offsets(&self, GroupOffsets { group, offsets }: GroupOffsets) -> Result<MemberOffsets> {
        let GroupMetadataEngine::Embedded(metadata) = group.engine else {
            return Err(Error::UnknownMember {
                group: "of another log".to_owned(),
            });
        };
        let offsets = offsets
            .into_iter()
            .map(|(name, committed)| Ok((self.log.partition(&name)?, committed)));
        Ok(MemberOffsets {
            group: metadata.group,
            member: metadata.member,
            offsets: offsets.collect::<Result<_>>()?,
        })
    }

    async fn abort(&mut self) {
        let staged = std::mem::take(&mut self.open).staged;
        for blobs in staged.chunks(100).map(<[i64]>::to_vec) {
            if let Err(error) = self.log.write(move |connection| unstage(connection, &blobs)).await {
                // They are deleted when the log is opened the next time.
                tracing::warn!(%error, "staged values of an aborted transaction stay for now: {error}");
                return;
            }
        }
    }
}
