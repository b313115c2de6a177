//! The ledger: the topic of keys, folded in its order. It says who may do a request.
//!
//! ```text
//! the topic ═══▶ apply: one batch, one transaction of the file ─▶ verdicts to the lanes that wait for their claims
//!                           └─ claims that are live, in memory ─▶ the warden's doubts
//! ```
//! Invariant: the file and the live claims are what the topic says up to the positions in the file, and every node that folds
//! the same records comes to the same end: nothing but the log decides.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, oneshot};
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::file::{FileError, LedgerFile};
use super::note::{Answered, Claim, Note};
use crate::log::{self, Batch, Log, Producer, StartAt, TopicDescription};
use crate::server::event::now_ms;

/// The file's name in the data folder.
const FILE: &str = "idempotency.sqlite";

/// How long the ledger rests after a failure.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A doubt is delayed by up to this, so that of several nodes one is first and the others see what it has found.
const DOUBT_JITTER_MS: u64 = 500;

/// How often keys whose time has passed are removed, and how long after it: the clocks of nodes differ.
const FORGET: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(10 * 60));

/// The keys as this node knows them. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct Ledger(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    topic: TopicDescription,
    /// For the fold alone.
    writing: Mutex<LedgerFile>,
    /// For look-ups. SQLite's write-ahead log lets it read while the other writes.
    reading: Mutex<LedgerFile>,
    live: Mutex<HashMap<String, Live>>,
    /// Notified when there are live claims again.
    appeared: Notify,
    /// Who waits for the verdict on a claim, by the claim's id.
    waiting: Mutex<HashMap<String, oneshot::Sender<Verdict>>>,
    /// The producers of this node, and which incarnation of each is at work.
    own: Mutex<HashMap<String, Option<String>>>,
}

/// A claim that holds its key. Who waits for its end is told when it is dropped.
#[derive(Debug)]
struct Live {
    claim: Claim,
    /// When others may doubt it.
    doubted_from: Instant,
    ended: CancellationToken,
}

/// What stands in the way of a request.
#[derive(Clone, Debug)]
pub(super) enum Standing {
    /// A claim, over when this is cancelled: with an answer, or with a free key.
    Claimed(CancellationToken),
    /// An answer.
    Answered(Answered),
}

/// What became of a claim.
#[derive(Clone, Debug)]
pub(super) enum Verdict {
    /// The key was free: the claimant does the request now, or its incarnation ends.
    Won,
    /// It counts for nothing.
    Lost(Standing),
}

/// The ledger cannot go on.
#[derive(Debug, thiserror::Error)]
enum LedgerError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Log(#[from] log::Error),
    #[error("the ledger's thread ended: {0}")]
    Thread(#[from] tokio::task::JoinError),
}

impl Ledger {
    /// Opens the ledger of a topic in a folder.
    pub(super) fn open(folder: &Path, topic: TopicDescription) -> Result<Self, FileError> {
        let path = folder.join(FILE);
        let mut writing = LedgerFile::open(&path)?;
        writing.positions(topic.id)?;
        let reading = LedgerFile::open(&path)?;
        Ok(Self(Arc::new(Inner {
            topic,
            writing: Mutex::new(writing),
            reading: Mutex::new(reading),
            live: Mutex::default(),
            appeared: Notify::new(),
            waiting: Mutex::default(),
            own: Mutex::default(),
        })))
    }

    /// What stands under a key now, as far as this node has read. Nothing may mean that it has not read on yet: only a claim tells.
    pub(super) async fn look_up(&self, key: &str) -> Result<Option<Standing>, FileError> {
        if let Some(live) = lock(&self.0.live).get(key) {
            return Ok(Some(live.standing()));
        }
        let (ledger, key) = (self.clone(), key.to_owned());
        let found = spawn_blocking(move || lock(&ledger.0.reading).find(&key)).await;
        let found = found.map_err(std::io::Error::other)??;
        Ok(found
            .filter(|answered| now_ms() < answered.until_ms)
            .map(Standing::Answered))
    }

    /// The verdict on a claim that is about to be appended.
    pub(super) fn verdict(&self, claim: &Claim) -> AwaitedVerdict {
        let (sender, receiver) = oneshot::channel();
        lock(&self.0.waiting).insert(claim.id.clone(), sender);
        AwaitedVerdict {
            ledger: self.clone(),
            claim: claim.id.clone(),
            receiver,
        }
    }

    /// Says which incarnation of a producer of this node is at work: none from the first failure on until the next one has
    /// fenced it. Claims of any other are dead.
    pub(super) fn set_incarnation(&self, producer: &str, incarnation: Option<String>) {
        lock(&self.0.own).insert(producer.to_owned(), incarnation);
    }

    /// Follows the topic until `ended`. Failures are logged and tried again.
    pub(super) async fn run(self, log: Log, ended: CancellationToken) {
        loop {
            let failed = tokio::select! {
                () = ended.cancelled() => return,
                failed = self.follow(&log) => failed,
            };
            if let Err(error) = failed {
                tracing::warn!(%error, "idempotency keys cannot be followed: {error}");
            }
            tokio::select! {
                () = ended.cancelled() => return,
                () = sleep(RETRY_AFTER) => {}
            }
        }
    }

    async fn follow(&self, log: &Log) -> Result<(), LedgerError> {
        let ledger = self.clone();
        let positions = spawn_blocking(move || ledger.load()).await??;
        let mut reader = log.reader(&self.0.topic.name).await?;
        for partition in 0..self.0.topic.partitions {
            let from = positions.get(&partition).copied();
            let from = from.map_or(StartAt::Start, StartAt::Offset);
            match reader.assign(partition, from).await {
                // What retention has taken is past its time.
                Err(log::Error::OffsetOutOfRange { .. }) => reader.assign(partition, StartAt::Start).await?,
                assigned => assigned?,
            };
        }
        let mut forget_at = Instant::now();
        loop {
            let batch = match reader.next().await {
                Ok(batch) => batch,
                Err(log::Error::OffsetOutOfRange { partition, .. }) => {
                    reader.assign(partition.partition, StartAt::Start).await?;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let forget = Instant::now() >= forget_at;
            if forget {
                forget_at = Instant::now() + FORGET.0;
            }
            let ledger = self.clone();
            spawn_blocking(move || ledger.apply(&batch, forget)).await??;
        }
    }

    /// Takes the live claims from the file, and says where to read on.
    fn load(&self) -> Result<HashMap<i32, i64>, FileError> {
        let mut file = lock(&self.0.writing);
        let positions = file.positions(self.0.topic.id)?;
        let claims = file.claims()?;
        let mut live = lock(&self.0.live);
        // Who waits for one of these looks again.
        live.clear();
        live.extend(claims.into_iter().map(|(key, claim)| (key, Live::new(claim))));
        drop(live);
        self.0.appeared.notify_one();
        Ok(positions)
    }

    /// Folds a batch: the file first, then who waits for it.
    fn apply(&self, batch: &Batch, forget: bool) -> Result<(), FileError> {
        let mut file = lock(&self.0.writing);
        if forget {
            file.forget(now_ms() - FORGET.1.as_millis() as i64)?;
        }
        let changes = file.begin()?;
        let mut verdicts = Vec::new();
        // Dropped, they tell who waits for their end; not before the answers can be read.
        let mut ended = Vec::new();
        for record in &batch.records {
            let (key, note) = match Note::read(record) {
                Ok(read) => read,
                Err(reason) => {
                    let (partition, offset) = (batch.partition.partition, record.offset);
                    tracing::warn!(
                        partition,
                        offset,
                        reason,
                        "passing over a record that is no idempotency key's"
                    );
                    continue;
                }
            };
            let mut live = lock(&self.0.live);
            match note {
                Note::Claimed(claim) => {
                    let id = claim.id.clone();
                    let verdict = if let Some(holder) = live.get_mut(key) {
                        if holder.claim.id == id {
                            holder.doubted_from = doubted_from(&claim);
                        }
                        Verdict::Lost(holder.standing())
                    } else if let Some(answered) = changes.find(key)?.filter(|a| record.timestamp_ms < a.until_ms) {
                        Verdict::Lost(Standing::Answered(answered))
                    } else {
                        changes.claim(key, &claim)?;
                        live.insert(key.to_owned(), Live::new(claim));
                        Verdict::Won
                    };
                    verdicts.push((id, verdict));
                }
                Note::Answered(answered) => {
                    changes.end_claim(key)?;
                    changes.answer(key, &answered)?;
                    ended.extend(live.remove(key));
                }
                Note::Released { claim } => {
                    if live.get(key).is_some_and(|live| live.claim.id == claim) {
                        changes.end_claim(key)?;
                        ended.extend(live.remove(key));
                    }
                }
            }
        }
        changes.commit(batch.partition.partition, batch.next_offset)?;
        if !lock(&self.0.live).is_empty() {
            self.0.appeared.notify_one();
        }
        let mut waiting = lock(&self.0.waiting);
        for (id, verdict) in verdicts {
            if let Some(waiting) = waiting.remove(&id) {
                // Who has given up has ended its incarnation, and with it the claim.
                let _ = waiting.send(verdict);
            }
        }
        Ok(())
    }

    /// Waits until there are live claims, or were some since the last time.
    pub(super) async fn appeared(&self) {
        self.0.appeared.notified().await;
    }

    /// Whether any key is held now.
    pub(super) fn has_live_claims(&self) -> bool {
        !lock(&self.0.live).is_empty()
    }

    /// Whether a producer is one of this node's.
    pub(super) fn is_own(&self, producer: &str) -> bool {
        lock(&self.0.own).contains_key(producer)
    }

    /// Keys and ids of claims that are doubted, by their producer: those of earlier incarnations of this node's producers, and
    /// those of others that are silent for too long.
    pub(super) fn doubtful(&self) -> HashMap<String, Vec<(String, String)>> {
        let own = lock(&self.0.own);
        let now = Instant::now();
        let mut doubtful: HashMap<String, Vec<_>> = HashMap::new();
        for (
            key,
            Live {
                claim, doubted_from, ..
            },
        ) in lock(&self.0.live).iter()
        {
            let is_doubtful = match own.get(&claim.producer) {
                Some(at_work) => at_work.as_ref().is_some_and(|at_work| *at_work != claim.incarnation),
                None => *doubted_from <= now,
            };
            if is_doubtful {
                let claims = doubtful.entry(claim.producer.clone()).or_default();
                claims.push((key.clone(), claim.id.clone()));
            }
        }
        doubtful
    }

    /// Says that claims, each of a key, will never be answered. If one was answered before, the log's order knows.
    pub(super) async fn release(&self, producer: &Producer, claims: Vec<(String, String)>) -> Result<(), log::Error> {
        let mut deliveries = Vec::with_capacity(claims.len());
        for (key, claim) in claims {
            let record = Note::Released { claim }.record(&self.0.topic.name, &key, now_ms());
            deliveries.push(producer.send(record).await?);
        }
        for delivery in deliveries {
            delivery.await?;
        }
        Ok(())
    }

    /// The topic's name.
    pub(super) fn topic(&self) -> &str {
        &self.0.topic.name
    }
}

impl Live {
    fn new(claim: Claim) -> Self {
        Self {
            doubted_from: doubted_from(&claim),
            claim,
            ended: CancellationToken::new(),
        }
    }

    fn standing(&self) -> Standing {
        Standing::Claimed(self.ended.clone())
    }
}

/// When a claim is doubted that is heard of now.
fn doubted_from(claim: &Claim) -> Instant {
    let jitter_ms = rand::random_range(0..DOUBT_JITTER_MS);
    let patience = Duration::from_millis(claim.patience_ms.saturating_add(jitter_ms));
    let now = Instant::now();
    // A patience beyond all clocks is none of ours.
    now.checked_add(patience).unwrap_or(now)
}

impl Drop for Live {
    fn drop(&mut self) {
        self.ended.cancel();
    }
}

/// A verdict that is waited for. Dropped, it is waited for no more.
#[derive(Debug)]
pub(super) struct AwaitedVerdict {
    ledger: Ledger,
    claim: String,
    receiver: oneshot::Receiver<Verdict>,
}

impl AwaitedVerdict {
    /// Waits for it; `None` when the ledger has ended.
    pub(super) async fn get(&mut self) -> Option<Verdict> {
        (&mut self.receiver).await.ok()
    }
}

impl Drop for AwaitedVerdict {
    fn drop(&mut self) {
        lock(&self.ledger.0.waiting).remove(&self.claim);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while one is held; what it guards is whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::{CleanupPolicy, Headers, NextOffset, Record, Timestamps, TopicId, TopicPartition};
    use crate::server::idempotency::{Answer, Fingerprinter};
    use http::{HeaderMap, Method, Uri};

    const PATIENCE: Duration = Duration::from_secs(3);

    /// A ledger that is told what stands on its topic.
    struct Bench {
        ledger: Ledger,
        next_offset: i64,
        folder: tempfile::TempDir,
    }

    fn topic() -> TopicDescription {
        TopicDescription {
            name: "keys".to_owned(),
            id: TopicId([1; 16]),
            partitions: 1,
            cleanup: CleanupPolicy::Delete,
            retention: None,
            max_message_bytes: 1,
            timestamps: Timestamps::Create,
        }
    }

    impl Bench {
        fn new() -> Self {
            let folder = tempfile::tempdir().expect("a folder");
            Self {
                ledger: Ledger::open(folder.path(), topic()).expect("a ledger"),
                next_offset: 0,
                folder,
            }
        }

        /// The gateway starts again.
        fn restart(&mut self) {
            self.ledger = Ledger::open(self.folder.path(), topic()).expect("a ledger");
            let positions = self.ledger.load().expect("positions");
            assert_eq!(positions[&0], self.next_offset);
        }

        fn say(&mut self, at_ms: i64, note: &Note) {
            let record = note.record("keys", "k", at_ms);
            let record = Record {
                offset: self.next_offset,
                timestamp_ms: at_ms,
                key: record.key,
                value: record.value,
                headers: Headers::new(),
            };
            self.next_offset += 1;
            let batch = Batch {
                partition: TopicPartition::new("keys", 0),
                records: vec![record],
                next_offset: NextOffset(self.next_offset),
                caught_up: true,
            };
            self.ledger.apply(&batch, false).expect("applied");
        }

        /// Whether a claim wins, loses to another or finds an answer.
        fn claim(&mut self, at_ms: i64, claim: &Claim) -> &'static str {
            let mut verdict = self.ledger.verdict(claim);
            self.say(at_ms, &Note::Claimed(claim.clone()));
            match verdict.receiver.try_recv().expect("a verdict") {
                Verdict::Won => "won",
                Verdict::Lost(Standing::Claimed(_)) => "claimed",
                Verdict::Lost(Standing::Answered(_)) => "answered",
            }
        }

        fn ended(&self) -> CancellationToken {
            lock(&self.ledger.0.live)["k"].ended.clone()
        }

        fn doubtful(&self) -> Vec<String> {
            let doubtful = self.ledger.doubtful().into_values().flatten();
            doubtful.map(|(_, claim)| claim).collect()
        }
    }

    fn claim_of(producer: &str) -> Claim {
        Claim::new(producer, "1", PATIENCE)
    }

    fn answered(until_ms: i64) -> Note {
        let request = Fingerprinter::new(&Method::POST, &Uri::from_static("/"), &HeaderMap::new());
        Note::Answered(Answered {
            fingerprint: request.finish(),
            answer: Answer { job: None, token: None },
            until_ms,
        })
    }

    fn released(claim: &Claim) -> Note {
        let claim = claim.id.clone();
        Note::Released { claim }
    }

    #[test]
    fn the_first_claim_holds_its_key_until_it_is_answered_or_released() {
        let mut bench = Bench::new();
        let (first, second, third) = (claim_of("a"), claim_of("b"), claim_of("c"));
        assert_eq!(bench.claim(1, &first), "won");
        assert_eq!(bench.claim(2, &second), "claimed");
        let ended = bench.ended();
        bench.say(3, &released(&second));
        assert!(!ended.is_cancelled(), "another claim's release");
        bench.say(4, &released(&first));
        assert!(ended.is_cancelled());
        assert_eq!(bench.claim(5, &third), "won", "who has lost does not inherit");
        let ended = bench.ended();
        bench.say(6, &answered(1000));
        assert!(ended.is_cancelled());
        assert_eq!(bench.claim(7, &claim_of("d")), "answered");
    }

    #[test]
    fn a_release_behind_the_answer_means_nothing() {
        let mut bench = Bench::new();
        let claim = claim_of("a");
        assert_eq!(bench.claim(1, &claim), "won");
        bench.say(2, &answered(1000));
        bench.say(3, &released(&claim));
        bench.say(4, &Note::Claimed(claim));
        assert_eq!(bench.claim(5, &claim_of("b")), "answered");
    }

    #[test]
    fn a_key_is_free_from_the_end_of_its_time_on_by_the_clock_of_the_log() {
        let mut bench = Bench::new();
        assert_eq!(bench.claim(1, &claim_of("a")), "won");
        bench.say(2, &answered(1000));
        assert_eq!(bench.claim(999, &claim_of("b")), "answered");
        assert_eq!(bench.claim(1000, &claim_of("c")), "won");
    }

    #[test]
    fn claims_and_answers_survive_a_restart() {
        let mut bench = Bench::new();
        let first = claim_of("a");
        assert_eq!(bench.claim(1, &first), "won");
        bench.restart();
        assert_eq!(bench.claim(2, &claim_of("b")), "claimed");
        bench.say(3, &answered(1000));
        bench.restart();
        assert_eq!(bench.claim(4, &claim_of("c")), "answered");
    }

    #[test]
    fn claims_of_this_nodes_earlier_producers_are_doubted_at_once_and_those_of_its_present_ones_never() {
        let mut bench = Bench::new();
        let claim = claim_of("own");
        bench.ledger.set_incarnation("own", Some("1".to_owned()));
        assert_eq!(bench.claim(1, &claim), "won");
        lock(&bench.ledger.0.live).get_mut("k").expect("a claim").doubted_from = Instant::now();
        assert!(bench.doubtful().is_empty());
        bench.ledger.set_incarnation("own", None);
        assert!(bench.doubtful().is_empty(), "its transaction may still be committed");
        bench.ledger.set_incarnation("own", Some("2".to_owned()));
        assert_eq!(bench.doubtful(), [claim.id]);
    }

    #[test]
    fn claims_of_other_nodes_are_doubted_when_they_are_silent() {
        let mut bench = Bench::new();
        let claim = claim_of("other");
        assert_eq!(bench.claim(1, &claim), "won");
        assert!(bench.doubtful().is_empty());
        lock(&bench.ledger.0.live).get_mut("k").expect("a claim").doubted_from = Instant::now();
        assert_eq!(bench.doubtful(), std::slice::from_ref(&claim.id));
        bench.say(2, &Note::Claimed(claim));
        assert!(bench.doubtful().is_empty(), "it has said that it lives");
    }
}
