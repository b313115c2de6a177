//! Writes that are checked: for each partition a lane, a task with a transactional producer under an id that all processes share.
//!
//! Kafka has no conditional write, and a record that turns out to be refused later must not be on a compacted topic, where it would
//! take the place of the one before. So the check comes first, and the lane sees to it that it still holds at the commit: who takes
//! the lane shuts out whoever had it (their commits fail), then reads to the end of the partition. From then on nobody else can
//! change what the check looks at.
//!
//! Invariant: a write is answered when its record has been read back, which also says where it stands; a conflict, when the partition
//! has been read to its end. What waits meanwhile shares the next transaction, one write for each key.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use rand::RngExt;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use super::Shared;
use super::entry::{Key, Revision};
use super::error::Error;
use crate::log::{self, ProducerRecord, StartAt, TopicPartition, TransactionalProducer, partition_for_key};

/// The header by which a lane knows its own records.
pub(super) const WRITE: &str = "bn-write";

/// Writes that wait for a lane; when it is full callers wait.
const WAITING_WRITES: usize = 1024;
/// Most writes of one transaction.
const WINDOW_WRITES: usize = 500;
/// What is committed is read back by then, or the lane is taken anew to find out why not.
const READ_BACK: Duration = Duration::from_secs(5);
/// A rest after a failure, which doubles with each in a row.
const REST: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// What a write expects of its key.
#[derive(Clone, Copy, Debug)]
pub(super) enum Expect {
    Anything,
    Absent,
    At(Revision),
}

impl Expect {
    fn holds(self, current: Option<Revision>) -> bool {
        match self {
            Self::Anything => true,
            Self::Absent => current.is_none(),
            Self::At(expected) => current == Some(expected),
        }
    }
}

#[derive(Debug)]
struct Write<K> {
    key: K,
    text: String,
    value: Option<Bytes>,
    expect: Expect,
    begin: Instant,
    reply: oneshot::Sender<Result<Revision, Error>>,
}

impl<K> Write<K> {
    fn answer(self, answer: Result<Revision, Error>) {
        // Who no longer waits does not want to know.
        let _ = self.reply.send(answer);
    }
}

/// The lanes of a table, each made by the first write to its partition. They end when this is dropped.
#[derive(Debug)]
pub(super) struct Lanes<K> {
    /// Other counts would have other lanes for the same key.
    partitions: i32,
    lanes: Mutex<HashMap<i32, mpsc::Sender<Write<K>>>>,
}

impl<K: Key> Lanes<K> {
    pub(super) fn new(partitions: i32) -> Self {
        Self {
            partitions,
            lanes: Mutex::default(),
        }
    }

    pub(super) async fn write<V: Send + Sync + 'static>(
        &self,
        shared: &Arc<Shared<K, V>>,
        key: K,
        text: String,
        value: Option<Vec<u8>>,
        expect: Expect,
    ) -> Result<Revision, Error> {
        let partition = partition_for_key(text.as_bytes(), self.partitions);
        let lane = {
            let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
            let start = || {
                let (sender, writes) = mpsc::channel(WAITING_WRITES);
                tokio::spawn(Lane::new(shared.clone(), self.partitions, partition).run(writes));
                sender
            };
            lanes.entry(partition).or_insert_with(start).clone()
        };
        let (reply, answer) = oneshot::channel();
        let write = Write {
            key,
            text,
            value: value.map(Bytes::from),
            expect,
            begin: Instant::now(),
            reply,
        };
        lane.send(write).await.map_err(|_| log::Error::Closed)?;
        answer.await.map_err(|_| log::Error::Closed)?
    }
}

struct Lane<K, V> {
    shared: Arc<Shared<K, V>>,
    partitions: i32,
    partition: TopicPartition,
    /// `None`: the lane is somebody else's, or nobody's.
    producer: Option<TransactionalProducer>,
    waiting: VecDeque<Write<K>>,
    failures: u32,
    /// So many writes go one by one, to find the one that the log refuses.
    alone: usize,
}

/// A write that is in a transaction.
struct Begun<K> {
    write: Write<K>,
    id: Uuid,
    /// How its key stood when it was checked.
    checked: Option<Revision>,
}

impl<K: Key, V: Send + Sync + 'static> Lane<K, V> {
    fn new(shared: Arc<Shared<K, V>>, partitions: i32, partition: i32) -> Self {
        Self {
            partition: TopicPartition::new(shared.topic.clone(), partition),
            shared,
            partitions,
            producer: None,
            waiting: VecDeque::new(),
            failures: 0,
            alone: 0,
        }
    }

    /// Serves writes until no handle is left.
    async fn run(mut self, mut writes: mpsc::Receiver<Write<K>>) {
        loop {
            if self.waiting.is_empty() {
                let Some(write) = writes.recv().await else { return };
                self.waiting.push_back(write);
            }
            while self.waiting.len() < WAITING_WRITES
                && let Ok(write) = writes.try_recv()
            {
                self.waiting.push_back(write);
            }
            self.window().await;
        }
    }

    /// Makes as many of the waiting writes as go into one transaction.
    async fn window(&mut self) {
        if let Some(error) = self.cannot_write() {
            return self.refuse_all(&error);
        }
        if let Err(error) = self.take().await {
            return self.failed(error).await;
        }
        let (mut begun, refused) = self.choose();
        if !refused.is_empty() {
            // What was not read yet may say otherwise.
            if let Err(error) = self.read_to_end().await {
                self.put_back(refused);
                self.put_back(begun.into_iter().map(|begun| begun.write));
                return self.failed(error).await;
            }
            for write in refused {
                match self.begin(write) {
                    Ok(write) => begun.push(write),
                    Err(write) => {
                        let (key, current) = (write.text.clone(), self.current(&write.key));
                        write.answer(Err(Error::Conflict { key, current }));
                    }
                }
            }
        }
        if begun.is_empty() {
            return;
        }
        self.alone = self.alone.saturating_sub(1);
        let ids: Vec<_> = begun.iter().map(|begun| begun.id).collect();
        self.shared.progress.await_writes(ids.iter().copied());
        match self.commit(&begun).await {
            Ok(()) => {
                self.failures = 0;
                match timeout(READ_BACK, self.shared.progress.wait_seen(&ids)).await {
                    Ok(Ok(())) => self.settle(begun, &Unseen::Committed),
                    Ok(Err(error)) => self.settle(begun, &Unseen::Undecided(error.to_string())),
                    Err(_) => self.resolve(begun, Unseen::Committed).await,
                }
            }
            Err(error) => self.undone(begun, error).await,
        }
    }

    /// Why nothing can be written through this lane any more.
    fn cannot_write(&self) -> Option<Error> {
        let progress = &self.shared.progress;
        let raised = || {
            (progress.partitions() != self.partitions).then(|| Error::PartitionsRaised {
                topic: self.shared.topic.as_ref().to_owned(),
                partitions: progress.partitions(),
            })
        };
        progress.ended().or_else(raised)
    }

    /// Takes the lane, if it is not this process's: nobody else can commit from then on, and what was committed has been read.
    async fn take(&mut self) -> Result<(), Error> {
        if self.producer.is_some() {
            return Ok(());
        }
        let id = format!("{}.table-{}", self.partition.topic, self.partition.partition);
        let producer = self.shared.log.transactional_producer(&id).await?;
        self.read_to_end().await?;
        tracing::debug!(partition = %self.partition, "the lane of a checked table is taken");
        self.producer = Some(producer);
        Ok(())
    }

    async fn read_to_end(&self) -> Result<(), Error> {
        let end = self.shared.log.offset(&self.partition, StartAt::End).await?;
        let last = Revision {
            partition: self.partition.partition,
            offset: end - 1,
        };
        let within = self.shared.settings.write_timeout;
        match timeout(within, self.shared.progress.wait_applied(last)).await {
            Ok(read) => read,
            Err(_) => Err(Error::Log(log::Error::Timeout {
                operation: "reading a table to its end",
                after_ms: u64::try_from(within.as_millis()).unwrap_or(u64::MAX),
            })),
        }
    }

    /// The writes that go into the next transaction, and those that do not find what they expect; the others go on waiting.
    fn choose(&mut self) -> (Vec<Begun<K>>, Vec<Write<K>>) {
        let most = match self.alone {
            0 => WINDOW_WRITES,
            _ => 1,
        };
        let (mut begun, mut refused, mut keys) = (Vec::new(), Vec::new(), HashSet::new());
        for write in std::mem::take(&mut self.waiting) {
            if write.reply.is_closed() {
                continue;
            }
            if begun.len() == most || !keys.insert(write.key.clone()) {
                self.waiting.push_back(write);
                continue;
            }
            match self.begin(write) {
                Ok(write) => begun.push(write),
                Err(write) => refused.push(write),
            }
        }
        (begun, refused)
    }

    /// The write as part of a transaction, if it finds what it expects.
    fn begin(&self, write: Write<K>) -> Result<Begun<K>, Write<K>> {
        let checked = self.current(&write.key);
        match write.expect.holds(checked) {
            true => Ok(Begun {
                write,
                id: Uuid::now_v7(),
                checked,
            }),
            false => Err(write),
        }
    }

    fn current(&self, key: &K) -> Option<Revision> {
        self.shared.map.kept(key).map(|kept| kept.revision)
    }

    async fn commit(&mut self, begun: &[Begun<K>]) -> log::Result<()> {
        let home = self.partition.partition;
        let producer = self.producer.as_mut().ok_or(log::Error::Closed)?;
        let mut transaction = producer.begin();
        for Begun { write, id, .. } in begun {
            let mut record = ProducerRecord::to(self.partition.topic.clone())
                .partition(home)
                .key(write.text.clone())
                .header(WRITE, id.as_bytes().to_vec());
            record.value.clone_from(&write.value);
            let elsewhere = self.shared.elsewhere(&write.key, &record, home);
            transaction.send(record).await?;
            if let Some(tombstone) = elsewhere {
                transaction.send(tombstone).await?;
            }
        }
        transaction.commit().await
    }

    /// After a commit that failed.
    async fn undone(&mut self, begun: Vec<Begun<K>>, error: log::Error) {
        // A transaction that is aborted may take a new producer, and with it the lane from somebody who has had it meanwhile and
        // written. So the lane is taken anew, and with that read to its end.
        self.producer = None;
        match error {
            // Somebody has taken the lane; before that the commit may have been carried out, and only its answer be lost.
            log::Error::Fenced(_) => {
                self.rest().await;
                self.resolve(begun, Unseen::Fenced).await;
                self.refuse_late(&error.into());
            }
            log::Error::Aborted(_) => {
                self.begin_again(begun);
                self.failed(error.into()).await;
            }
            log::Error::RecordTooLarge { .. }
            | log::Error::UnknownTopic(_)
            | log::Error::UnknownPartition(_)
            | log::Error::InvalidTopic { .. }
            | log::Error::Unauthorized(_) => {
                if let [_] = begun.as_slice() {
                    for Begun { write, id, .. } in begun {
                        self.shared.progress.take_seen(id);
                        write.answer(Err(error.clone().into()));
                    }
                } else {
                    // One of them: each in a transaction of its own shows which.
                    self.alone = begun.len();
                    self.begin_again(begun);
                }
            }
            error => {
                tracing::warn!(partition = %self.partition, %error, "what became of a transaction has to be read");
                self.resolve(begun, Unseen::Read).await;
                self.refuse_late(&error.into());
            }
        }
    }

    /// Finds out what became of a transaction: who takes the lane waits until it is decided.
    async fn resolve(&mut self, begun: Vec<Begun<K>>, unseen: Unseen) {
        self.producer = None;
        loop {
            let error = match self.take().await {
                Ok(()) => return self.settle(begun, &unseen),
                Err(error) => error,
            };
            if !error.is_retriable() || begun.iter().any(|begun| self.is_late(&begun.write)) {
                return self.settle(begun, &Unseen::Undecided(error.to_string()));
            }
            self.refuse_late(&error);
            self.rest().await;
        }
    }

    /// Answers the writes that were seen on the log. Of the others `unseen` says what that means.
    fn settle(&mut self, begun: Vec<Begun<K>>, unseen: &Unseen) {
        let mut again = Vec::new();
        for Begun { write, id, checked } in begun {
            if let Some(revision) = self.shared.progress.take_seen(id) {
                write.answer(Ok(revision));
                continue;
            }
            let reason = match unseen {
                Unseen::Fenced => {
                    again.push(write);
                    continue;
                }
                Unseen::Read if self.current(&write.key) == checked => {
                    again.push(write);
                    continue;
                }
                Unseen::Read | Unseen::Committed => "a later write of the key hides it".to_owned(),
                Unseen::Undecided(reason) => reason.clone(),
            };
            let key = write.text.clone();
            write.answer(Err(Error::Unknown { key, reason }));
        }
        self.put_back(again);
    }

    /// Nothing of these is on the log.
    fn begin_again(&mut self, begun: Vec<Begun<K>>) {
        for begun in &begun {
            self.shared.progress.take_seen(begun.id);
        }
        self.put_back(begun.into_iter().map(|begun| begun.write));
    }

    /// Before all that wait.
    fn put_back(&mut self, writes: impl IntoIterator<Item = Write<K>, IntoIter: DoubleEndedIterator>) {
        for write in writes.into_iter().rev() {
            self.waiting.push_front(write);
        }
    }

    /// Rests if the trouble may pass, and refuses what has waited for too long.
    async fn failed(&mut self, error: Error) {
        if !error.is_retriable() && !matches!(error, Error::Log(log::Error::Fenced(_))) {
            return self.refuse_all(&error);
        }
        tracing::debug!(partition = %self.partition, %error, "a transaction of a checked table is tried again");
        self.refuse_late(&error);
        self.rest().await;
    }

    /// Refuses those that have waited for too long.
    fn refuse_late(&mut self, error: &Error) {
        for write in std::mem::take(&mut self.waiting) {
            match self.is_late(&write) {
                false => self.waiting.push_back(write),
                true => write.answer(Err(error.clone())),
            }
        }
    }

    fn is_late(&self, write: &Write<K>) -> bool {
        write.begin.elapsed() >= self.shared.settings.write_timeout
    }

    fn refuse_all(&mut self, error: &Error) {
        for write in self.waiting.drain(..) {
            write.answer(Err(error.clone()));
        }
    }

    /// At random, so that two processes that take the lane from each other do not do it in step.
    async fn rest(&mut self) {
        let most = (REST.0 * 2u32.pow(self.failures.min(10))).min(REST.1);
        self.failures += 1;
        let part = rand::rng().random_range(0.1..1.0);
        sleep(most.mul_f64(part)).await;
    }
}

/// What it means when a write was not seen on the log.
enum Unseen {
    /// It was committed: something has hidden it.
    Committed,
    /// The partition has been read past it: it was not made, unless something has hidden it.
    Read,
    /// Whoever has taken the lane ended it, and the partition has been read past that: it was not made.
    Fenced,
    /// Nobody knows, and why.
    Undecided(String),
}
