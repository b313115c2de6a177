//! Consumers as separate processes (`consumer-worker`), and what their ledger and the log say of them.
//!
//! ```text
//! test ── settings as JSON ──▶ consumer-worker ──▶ Kafka
//!   ▲                              │ a line for each call of the handler and each completion
//!   └──── ledger, topics ◀─────────┘
//! ```
//! Everything here judges by the ledger and by what plain rdkafka reads, never by what the library counts.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use barnabas::log::embedded::EmbeddedSettings;
use barnabas::log::kafka::KafkaSettings;
use barnabas::log::{GroupProtocol, Log, Producer, ProducerRecord, ProducerSettings, TopicSpec};
use barnabas::patterns::consumer::{ConsumerBuilder, DeliveryGuarantee, ProcessingOrder};
use barnabas::patterns::retry::{BackOff, RetryPolicy, RetryTopics};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use crate::conformance::{make_topic, unique};
use crate::oracle::{OracleRecord, committed_embedded, committed_kafka, read_embedded, read_kafka};
use crate::process::{Process, STOP_TIMEOUT, program};

/// Within it everything that a test waits for has happened.
pub const SOON: Duration = Duration::from_secs(120);

/// Records that wait to be handled after [`Crew::top_up`].
const BACKLOG: u64 = 600;

/// How often it is looked whether more is needed.
const TOP_UP_STEP: Duration = Duration::from_millis(250);

/// What one `consumer-worker` does.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WorkerSettings {
    /// Brokers, or the folder of an embedded log if it begins with `/`.
    pub log: String,
    /// Its group.
    pub group: String,
    /// What it consumes.
    pub topics: Vec<String>,
    /// Where its handler sends a record for each; none: nowhere.
    pub output: Option<String>,
    /// In which order.
    pub order: Order,
    /// How often.
    pub guarantee: Guarantee,
    /// What becomes of failures.
    pub retry: Retry,
    /// Handlers at a time.
    pub pool: usize,
    /// The slot of its transactional id.
    pub slot: String,
    /// How it is a member of its group.
    pub membership: Membership,
    /// As [`ConsumerBuilder::session_timeout`].
    pub session_timeout_ms: u64,
    /// As [`ConsumerBuilder::drain_timeout`].
    pub drain_timeout_ms: u64,
    /// As [`ConsumerBuilder::commit_interval`].
    pub commit_interval_ms: u64,
    /// As [`ConsumerBuilder::handler_timeout`].
    pub handler_timeout_ms: Option<u64>,
    /// As [`ConsumerBuilder::buffer_bytes`].
    pub buffer_bytes: Option<usize>,
    /// As [`KafkaSettings::transaction_timeout`].
    pub transaction_timeout_ms: u64,
    /// Further settings of librdkafka.
    pub overrides: BTreeMap<String, String>,
    /// The handler takes a random time up to this.
    pub work_max_us: u64,
    /// What goes wrong, the first that fits.
    pub faults: Vec<Fault>,
    /// How far its wall clock is ahead of the machine's, in milliseconds.
    pub clock_ahead_ms: i64,
    /// The file to which it adds lines.
    pub ledger: PathBuf,
}

/// As [`ProcessingOrder`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum Order {
    Partition,
    Key,
    Unordered,
}

/// How a worker is a member of its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Membership {
    /// For as long as it runs.
    Dynamic,
    /// Under its slot, over restarts.
    Static,
    /// With the partitions that the broker assigns.
    Broker,
}

/// As [`DeliveryGuarantee`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum Guarantee {
    AtMostOnce,
    AtLeastOnce,
    ExactlyOnce,
}

/// As [`RetryPolicy`], delays in milliseconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum Retry {
    None,
    /// For ever.
    Blocking(u64),
    NonBlocking(Vec<u64>),
}

/// Something that a handler does wrong.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Fault {
    /// For which records.
    pub at: At,
    /// Up to this attempt.
    pub attempts: u32,
    /// Only until this file exists.
    pub until: Option<PathBuf>,
    /// What happens.
    pub kind: FaultKind,
}

/// Which records.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum At {
    /// Those whose number is a multiple of this.
    Every(u64),
    /// The one with this number.
    Number(u64),
    /// Those of a partition.
    Partition(i32),
    /// All.
    All,
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FaultKind {
    /// A retriable error.
    Fail,
    /// One that is not.
    Hopeless,
    /// A panic.
    Panic,
    /// The handler does not return.
    Hang,
    /// The process ends as by a crash.
    Abort,
}

impl WorkerSettings {
    /// The log.
    ///
    /// # Errors
    /// Those of the log.
    pub async fn open(&self) -> barnabas::log::Result<Log> {
        if self.log.starts_with('/') {
            let deadline = Instant::now() + Duration::from_secs(10);
            loop {
                match Log::open_embedded(EmbeddedSettings::new(&self.log)).await {
                    // A process that a test starts has the locks of the test's own files until it is another program.
                    Err(barnabas::log::Error::Locked(_)) if Instant::now() < deadline => {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    opened => return opened,
                }
            }
        }
        Log::connect_kafka(KafkaSettings {
            transaction_timeout: Duration::from_millis(self.transaction_timeout_ms),
            overrides: self.overrides.clone(),
            ..KafkaSettings::new(&self.log)
        })
        .await
    }

    /// The consumer.
    pub fn builder(&self) -> ConsumerBuilder {
        let ms = Duration::from_millis;
        let builder = ConsumerBuilder::new(&self.group, &self.topics)
            .order(match self.order {
                Order::Partition => ProcessingOrder::Partition,
                Order::Key => ProcessingOrder::Key,
                Order::Unordered => ProcessingOrder::Unordered,
            })
            .guarantee(match self.guarantee {
                Guarantee::AtMostOnce => DeliveryGuarantee::AtMostOnce,
                Guarantee::AtLeastOnce => DeliveryGuarantee::AtLeastOnce,
                Guarantee::ExactlyOnce => DeliveryGuarantee::ExactlyOnce,
            })
            .retry(match &self.retry {
                Retry::None => RetryPolicy::None,
                Retry::Blocking(delay) => RetryPolicy::Blocking(BackOff::fixed(ms(*delay)).infinite()),
                Retry::NonBlocking(delays) => {
                    RetryPolicy::NonBlocking(RetryTopics::new(delays.iter().copied().map(ms)))
                }
            })
            .pool(self.pool)
            .slot(&self.slot)
            .session_timeout(ms(self.session_timeout_ms))
            .drain_timeout(ms(self.drain_timeout_ms))
            .commit_interval(ms(self.commit_interval_ms));
        let builder = match self.membership {
            Membership::Dynamic => builder,
            Membership::Static => builder.instance_id(&self.slot),
            Membership::Broker => builder.protocol(GroupProtocol::Consumer),
        };
        let builder = match self.buffer_bytes {
            Some(bytes) => builder.buffer_bytes(bytes),
            None => builder,
        };
        match self.handler_timeout_ms {
            Some(timeout) => builder.handler_timeout(ms(timeout)),
            None => builder,
        }
    }

    /// What goes wrong with a record.
    pub fn fault(&self, partition: i32, number: u64, attempt: u32) -> Option<FaultKind> {
        let fits = |fault: &&Fault| {
            let at = match fault.at {
                At::Every(every) => number.is_multiple_of(every),
                At::Number(one) => number == one,
                At::Partition(one) => partition == one,
                At::All => true,
            };
            at && attempt <= fault.attempts && !fault.until.as_ref().is_some_and(|file| file.exists())
        };
        self.faults.iter().find(fits).map(|fault| fault.kind)
    }
}

/// A line of a ledger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// `call`: the handler was called; `done`: it is about to say that it is done; `failed`: or that it has failed.
    pub what: String,
    /// The process.
    pub pid: u32,
    /// Its slot.
    pub slot: String,
    /// Where the record was read.
    pub topic: String,
    /// Its partition.
    pub partition: i32,
    /// Its offset.
    pub offset: i64,
    /// Its timestamp.
    pub timestamp_ms: i64,
    /// Its key.
    pub key: String,
    /// Its value: a number that no other record of the test has.
    pub number: u64,
    /// Which attempt.
    pub attempt: u32,
    /// When, in milliseconds since the Unix epoch by the machine's clock.
    pub at_ms: i64,
}

/// A broker that was killed is waited for as long as it may take to be back, which on a busy machine is a minute.
fn patient() -> ProducerSettings {
    ProducerSettings {
        delivery_timeout: SOON,
        ..ProducerSettings::default()
    }
}

/// What was read of a ledger so far.
#[derive(Debug, Default)]
struct Ledger {
    lines: Arc<Vec<Line>>,
    bytes: u64,
}

impl Ledger {
    /// Reads on. A line that is not whole is left for the next time: each is one write.
    fn read(&mut self, file: &Path) -> Arc<Vec<Line>> {
        let mut text = String::new();
        if let Ok(mut file) = File::open(file) {
            file.seek(SeekFrom::Start(self.bytes)).expect("the ledger can be read");
            file.read_to_string(&mut text).expect("the ledger is text");
        }
        let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
        self.bytes += whole.len() as u64;
        let line = |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        Arc::make_mut(&mut self.lines).extend(whole.lines().map(line));
        self.lines.clone()
    }
}

/// Topics, a group, and its workers.
#[derive(Debug)]
pub struct Crew {
    /// What a worker does unless it is told otherwise.
    pub settings: WorkerSettings,
    /// Partitions of the topics.
    pub partitions: i32,
    /// `None`: an embedded one, which one process at a time may have open.
    log: Option<(Log, Producer)>,
    next: u64,
    workers: BTreeMap<String, Process>,
    ledger: Mutex<Ledger>,
    /// The processes that were killed with a record in hand.
    killed_at_work: Vec<u32>,
    folder: TempDir,
}

impl Crew {
    /// A topic and one for output on Kafka, and a group without workers.
    ///
    /// # Panics
    /// If they cannot be made; so for all that follows.
    pub async fn new(brokers: &str, partitions: i32, change: impl FnOnce(&mut WorkerSettings)) -> Self {
        let folder = TempDir::new().expect("a folder");
        Self::with(brokers.to_owned(), folder, partitions, change).await
    }

    /// The same on an embedded log. It takes records and one worker in turn: one process at a time may have it open.
    ///
    /// # Panics
    /// As [`Crew::new`].
    pub async fn embedded(partitions: i32, change: impl FnOnce(&mut WorkerSettings)) -> Self {
        let folder = TempDir::new().expect("a folder");
        let log = folder.path().join("log").display().to_string();
        Self::with(log, folder, partitions, change).await
    }

    async fn with(log: String, folder: TempDir, partitions: i32, change: impl FnOnce(&mut WorkerSettings)) -> Self {
        let mut settings = WorkerSettings {
            log,
            group: unique("group"),
            topics: vec![unique("payments")],
            output: Some(unique("checkouts")),
            order: Order::Partition,
            guarantee: Guarantee::ExactlyOnce,
            retry: Retry::None,
            pool: 8,
            slot: String::new(),
            membership: Membership::Dynamic,
            session_timeout_ms: 1500,
            drain_timeout_ms: 3000,
            commit_interval_ms: 50,
            handler_timeout_ms: None,
            buffer_bytes: None,
            transaction_timeout_ms: 10_000,
            overrides: BTreeMap::new(),
            work_max_us: 0,
            faults: Vec::new(),
            clock_ahead_ms: 0,
            ledger: folder.path().join("ledger"),
        };
        change(&mut settings);
        let log = settings.open().await.expect("a log");
        let producer = log.producer(patient()).await.expect("a producer");
        for topic in settings.topics.iter().chain(&settings.output) {
            make_topic(&log, TopicSpec::new(topic.as_str(), partitions)).await;
        }
        for spec in settings.builder().topics(&log).await.expect("topics") {
            make_topic(&log, spec).await;
        }
        let mut crew = Self {
            settings,
            partitions,
            log: None,
            next: 0,
            workers: BTreeMap::new(),
            ledger: Mutex::default(),
            killed_at_work: Vec::new(),
            folder,
        };
        crew.put_back((log, producer)).await;
        crew
    }

    fn is_embedded(&self) -> bool {
        self.settings.log.starts_with('/')
    }

    /// The log, open, and a producer on it.
    async fn take_log(&mut self) -> (Log, Producer) {
        if let Some(open) = self.log.take() {
            return open;
        }
        let log = self.settings.open().await.expect("a log");
        let producer = log.producer(patient()).await.expect("a producer");
        (log, producer)
    }

    /// Keeps the log for the next time, or lets a worker have it.
    async fn put_back(&mut self, (log, producer): (Log, Producer)) {
        match self.is_embedded() {
            true => log.close().await,
            false => self.log = Some((log, producer)),
        }
    }

    /// The folder of ledger and outputs.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The topic that is consumed.
    pub fn input(&self) -> &str {
        &self.settings.topics[0]
    }

    /// The topic to which handlers send.
    pub fn output(&self) -> &str {
        self.settings.output.as_deref().expect("the handler sends")
    }

    /// The log, which has to be Kafka.
    pub fn log(&self) -> &Log {
        let (log, _) = self.log.as_ref().expect("an embedded one is a worker's");
        log
    }

    /// Takes note of records that another crew has appended to the topic.
    pub fn note_appended(&mut self, records: u64) {
        self.next += records;
    }

    /// How many records were appended.
    pub fn appended(&self) -> u64 {
        self.next
    }

    /// Appends numbered records whose keys are the numbers modulo `keys`.
    pub async fn append(&mut self, count: u64, keys: u64) {
        let (log, producer) = self.take_log().await;
        let mut deliveries = Vec::new();
        for number in self.next..self.next + count {
            let key = format!("k{}", number % keys);
            let record = ProducerRecord::to(self.input()).key(key).value(number.to_string());
            deliveries.push(producer.send(record).await.expect("sent"));
        }
        for delivery in deliveries {
            delivery.await.expect("appended");
        }
        self.next += count;
        self.put_back((log, producer)).await;
    }

    /// Appends a record that handlers make nothing of.
    pub async fn append_unreadable(&mut self, value: &str) {
        let (log, producer) = self.take_log().await;
        let record = ProducerRecord::to(self.input())
            .key("unreadable")
            .value(value.to_owned());
        producer.append(record).await.expect("appended");
        self.put_back((log, producer)).await;
    }

    /// Starts a worker in a slot.
    pub fn start(&mut self, slot: &str) {
        self.start_with(slot, |_| {});
    }

    /// Starts a worker that differs.
    pub fn start_with(&mut self, slot: &str, change: impl FnOnce(&mut WorkerSettings)) {
        let mut settings = WorkerSettings {
            slot: slot.to_owned(),
            ..self.settings.clone()
        };
        change(&mut settings);
        let json = serde_json::to_string(&settings).expect("settings are JSON");
        let output = self.folder.path().join(format!("worker-{slot}"));
        let worker = Process::start(&program("consumer-worker"), &[json], &[], &output);
        assert!(
            self.workers.insert(slot.to_owned(), worker).is_none(),
            "slot {slot} is taken"
        );
    }

    /// The worker of a slot.
    pub fn worker(&mut self, slot: &str) -> &mut Process {
        self.workers.get_mut(slot).expect("a worker in this slot")
    }

    /// Kills the worker of a slot.
    pub fn kill(&mut self, slot: &str) {
        self.workers.remove(slot).expect("a worker in this slot").kill();
    }

    /// Kills the worker of a slot while a handler of its is at work. Appends records until it is; on an embedded log they have to be
    /// there.
    pub async fn kill_at_work(&mut self, slot: &str, keys: u64) {
        let deadline = Instant::now() + SOON;
        let mut looked = Instant::now();
        loop {
            if self.worker(slot).try_wait().is_some() {
                self.kill(slot);
                self.start(slot);
            }
            let pid = self.worker(slot).pid();
            if self.is_at_work(pid) {
                // It cannot finish any more while somebody looks.
                self.worker(slot).pause();
                if self.is_at_work(pid) {
                    self.killed_at_work.push(pid);
                    return self.kill(slot);
                }
                self.worker(slot).resume();
            }
            assert!(
                Instant::now() < deadline,
                "{slot} has nothing to do: {:?} of {:?} are committed\n{}",
                self.committed(),
                self.ends(),
                self.worker(slot).last_output()
            );
            if !self.is_embedded() && looked.elapsed() > TOP_UP_STEP {
                self.top_up(keys).await;
                looked = Instant::now();
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Appends so many records that each worker has some to handle.
    pub async fn top_up(&mut self, keys: u64) {
        let waiting = match self.settings.guarantee {
            // It cannot be told from what the killed have taken with them.
            Guarantee::AtMostOnce => 0,
            Guarantee::AtLeastOnce | Guarantee::ExactlyOnce => self.next - self.count("call") as u64,
        };
        if waiting < BACKLOG {
            self.append(BACKLOG - waiting, keys).await;
        }
    }

    /// Whether a handler of a process has been called and is not done.
    fn is_at_work(&self, pid: u32) -> bool {
        let mut open: HashSet<u64> = HashSet::new();
        for line in self.ledger().iter().filter(|line| line.pid == pid) {
            match line.what.as_str() {
                "call" => open.insert(line.number),
                _ => open.remove(&line.number),
            };
        }
        !open.is_empty()
    }

    /// Asks the worker of a slot to stop, and waits for it.
    pub fn stop(&mut self, slot: &str) {
        self.workers.remove(slot).expect("a worker in this slot").stop();
    }

    /// As [`Crew::stop`], while the test does other things.
    pub async fn stop_meanwhile(&mut self, slot: &str) {
        let mut worker = self.workers.remove(slot).expect("a worker in this slot");
        worker.terminate();
        let deadline = Instant::now() + STOP_TIMEOUT;
        let status = loop {
            if let Some(status) = worker.try_wait() {
                break Some(status);
            }
            if Instant::now() > deadline {
                break None;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        assert!(
            status.is_some_and(|status| status.success()),
            "{slot} was asked to stop and ended with {status:?}\n{}",
            worker.last_output()
        );
    }

    /// Asks all to stop.
    pub fn stop_all(&mut self) {
        for (_, worker) in std::mem::take(&mut self.workers) {
            worker.stop();
        }
    }

    /// Kills all.
    pub fn kill_all(&mut self) {
        for (_, worker) in std::mem::take(&mut self.workers) {
            worker.kill();
        }
    }

    /// Starts those again that have ended by themselves.
    pub fn restart_crashed(&mut self) -> usize {
        let ended: Vec<String> = self
            .workers
            .iter_mut()
            .filter_map(|(slot, worker)| worker.try_wait().map(|_| slot.clone()))
            .collect();
        for slot in &ended {
            let output = self.worker(slot).output();
            let why = output.lines().rev().find(|line| line.contains("consumer-worker ended"));
            eprintln!("{slot} ended by itself: {}", why.unwrap_or("it does not say why"));
            self.kill(slot);
            self.start(slot);
        }
        ended.len()
    }

    /// What the handlers were called for, so far.
    pub fn ledger(&self) -> Arc<Vec<Line>> {
        let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        ledger.read(&self.settings.ledger)
    }

    /// How many different records have a line of this kind.
    pub fn count(&self, what: &str) -> usize {
        let lines = self.ledger();
        let numbers: HashSet<u64> = lines
            .iter()
            .filter(|line| line.what == what)
            .map(|line| line.number)
            .collect();
        numbers.len()
    }

    /// Waits for a fact, and shows what the workers wrote when it does not come.
    pub async fn until(&mut self, what: &str, within: Duration, mut is_so: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + within;
        while !is_so(self) {
            if Instant::now() > deadline {
                let outputs = self.workers.values().map(Process::last_output).collect::<Vec<_>>();
                panic!(
                    "{what}: not within {within:?}\ncommitted: {:?}\n{}",
                    self.committed(),
                    outputs.join("\n")
                );
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until the group has committed everything on its topic.
    pub async fn caught_up(&mut self) {
        let ends = self.ends();
        self.until("the group has committed everything", SOON, |crew| {
            crew.committed()
                .iter()
                .zip(&ends)
                .all(|((offset, _), end)| offset >= end)
        })
        .await;
    }

    /// The offset behind the last record of each partition of the topic.
    pub fn ends(&self) -> Vec<i64> {
        let mut ends = vec![0; usize::try_from(self.partitions).expect("a small number")];
        for record in self.read(self.input()) {
            ends[usize::try_from(record.partition).expect("a small number")] = record.offset + 1;
        }
        ends
    }

    /// What the group has committed.
    pub fn committed(&self) -> Vec<(i64, String)> {
        let WorkerSettings { log, group, .. } = &self.settings;
        match self.is_embedded() {
            true => committed_embedded(Path::new(log), group, self.input(), self.partitions),
            false => committed_kafka(log, group, self.input(), self.partitions),
        }
    }

    /// The ids of the group's members now.
    ///
    /// # Panics
    /// If the group cannot be asked for, or the log is an embedded one.
    pub async fn members(&self) -> Vec<String> {
        let (log, _) = self.log.as_ref().expect("a log on Kafka");
        let groups = log.groups().await.expect("groups");
        let own = groups.into_iter().filter(|group| group.group == self.settings.group);
        own.flat_map(|group| group.members)
            .map(|member| member.member)
            .collect()
    }

    /// All committed records of a topic.
    pub fn read(&self, topic: &str) -> Vec<OracleRecord> {
        match self.is_embedded() {
            true => read_embedded(Path::new(&self.settings.log), topic),
            false => read_kafka(&self.settings.log, topic),
        }
    }

    /// L and D in committed output: each record that was appended has exactly one; O: those of a key come in order.
    pub fn assert_exactly_once(&self) {
        assert_each_once(self.next, &self.read(self.output()));
    }

    /// L: each record was done. O: the first completions of a key come in order.
    pub fn assert_at_least_once(&self) {
        let mut seen = HashSet::new();
        let mut last: HashMap<&str, u64> = HashMap::new();
        let lines = self.ledger();
        for line in lines.iter().filter(|line| line.what == "done") {
            if seen.insert(line.number)
                && self.settings.order != Order::Unordered
                && let Some(before) = last.insert(&line.key, line.number)
            {
                assert!(before < line.number, "{before} was done before {line:?}");
            }
        }
        let lost: Vec<_> = (0..self.next).filter(|number| !seen.contains(number)).collect();
        assert!(lost.is_empty(), "{} lost: {lost:?}", lost.len());
    }

    /// Each process that was killed at work had a record in hand, which another process did again if it is to be done at least
    /// once, and nobody did if it is to be done at most once. Without that, kills prove nothing.
    pub fn assert_kills_told(&self, kills: usize) {
        assert!(
            self.killed_at_work.len() >= kills,
            "{} of {kills} kills hit a handler at work",
            self.killed_at_work.len()
        );
        let lines = self.ledger();
        let with = |what: &str| -> HashSet<(u32, u64)> {
            let lines = lines.iter().filter(|line| line.what == what);
            lines.map(|line| (line.pid, line.number)).collect()
        };
        let (calls, done) = (with("call"), with("done"));
        let mut callers: HashMap<u64, usize> = HashMap::new();
        for (_, number) in &calls {
            *callers.entry(*number).or_default() += 1;
        }
        for pid in &self.killed_at_work {
            let mut cut_off = calls.difference(&done).filter(|(by, _)| by == pid);
            let told = cut_off.any(|(_, number)| match self.settings.guarantee {
                Guarantee::AtMostOnce => callers[number] == 1,
                Guarantee::AtLeastOnce | Guarantee::ExactlyOnce => callers[number] > 1,
            });
            assert!(told, "nothing came of the kill of {pid}");
        }
    }

    /// Nothing was handled twice, and nothing came out of order.
    pub fn assert_at_most_once(&self) {
        let mut seen = HashSet::new();
        let mut last: HashMap<&str, u64> = HashMap::new();
        let lines = self.ledger();
        for line in lines.iter().filter(|line| line.what == "call") {
            assert!(seen.insert(line.number), "handled twice: {line:?}");
            if self.settings.order != Order::Unordered
                && let Some(before) = last.insert(&line.key, line.number)
            {
                assert!(before < line.number, "{before} was handled before {line:?}");
            }
        }
    }

    /// No committed offset is above a record that was not done, and its metadata names only what was done. A record is done if the
    /// ledger says so, or if it stands on one of the topics `left` to which the group sends what failed.
    pub fn assert_offsets(&self, left: &[String]) {
        // First the offsets: what is done later does not excuse them.
        let committed = self.committed();
        let mut done: HashSet<(i32, i64)> = self
            .ledger()
            .iter()
            .filter(|line| {
                line.topic == self.input() && (line.what == "done" || self.settings.guarantee == Guarantee::AtMostOnce)
            })
            .map(|line| (line.partition, line.offset))
            .collect();
        for record in left.iter().flat_map(|topic| self.read(topic)) {
            let origin = record.header("bn-origin-offset").parse().expect("an offset");
            done.insert((record.partition, origin));
        }
        for record in self.read(self.input()) {
            let (offset, metadata) = &committed[usize::try_from(record.partition).expect("a small number")];
            let claimed = record.offset < *offset
                || done_above(*offset, metadata)
                    .iter()
                    .any(|(from, to)| (*from..*to).contains(&record.offset));
            assert!(
                !claimed || done.contains(&(record.partition, record.offset)),
                "{}-{} is committed ({offset}, {metadata:?}) and was never done",
                record.partition,
                record.offset
            );
        }
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        if std::thread::panicking() && std::env::var_os("BARNABAS_TEST_KEEP").is_some() {
            self.folder.disable_cleanup(true);
            eprintln!("ledger and outputs are in {}", self.folder.path().display());
        }
    }
}

/// Each number below `count` stands in the output once, and those of a key are in order.
///
/// # Panics
/// If not.
pub fn assert_each_once(count: u64, output: &[OracleRecord]) {
    let mut last: HashMap<String, u64> = HashMap::new();
    for record in output {
        let number = record.number();
        if let Some(before) = last.insert(record.key_text(), number) {
            assert!(
                before <= number,
                "{number} of key {} is behind {before}",
                record.key_text()
            );
        }
    }
    assert_once(0..count, output);
}

/// Each of the numbers stands in the output once, and no other does, in whatever order.
///
/// # Panics
/// If not.
pub fn assert_once(numbers: impl IntoIterator<Item = u64>, output: &[OracleRecord]) {
    let mut times: BTreeMap<u64, Vec<String>> = numbers.into_iter().map(|number| (number, Vec::new())).collect();
    let count = times.len();
    for record in output {
        let place = format!("{}-{} by {}", record.partition, record.offset, record.header("worker"));
        match times.get_mut(&record.number()) {
            Some(places) => places.push(place),
            None => panic!("{} is at {place}", record.number()),
        }
    }
    let wrong: Vec<_> = times.iter().filter(|(_, places)| places.len() != 1).collect();
    assert!(
        wrong.is_empty(),
        "{} of {count} are not there exactly once: {:?}",
        wrong.len(),
        &wrong[..wrong.len().min(20)]
    );
}

/// The runs that metadata of Barnabas names as done above a committed offset: lengths of what is not done and what is, in turn.
fn done_above(offset: i64, metadata: &str) -> Vec<(i64, i64)> {
    let Some(text) = metadata.strip_prefix("bn1.") else {
        return Vec::new();
    };
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let (mut bytes, mut bits, mut count) = (Vec::new(), 0u32, 0);
    for letter in text.bytes() {
        let value = ALPHABET.iter().position(|known| *known == letter).expect("base64url");
        bits = bits << 6 | u32::try_from(value).expect("six bits");
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push(u8::try_from(bits >> count & 0xff).expect("eight bits"));
        }
    }
    let mut numbers = Vec::new();
    let (mut number, mut shift) = (0i64, 0);
    for byte in bytes {
        number |= i64::from(byte & 0x7f) << shift;
        shift += 7;
        if byte & 0x80 == 0 {
            numbers.push(number);
            (number, shift) = (0, 0);
        }
    }
    let mut at = offset;
    let run = |pair: &[i64]| {
        let from = at + pair[0];
        at = from + pair[1];
        (from, at)
    };
    numbers.chunks_exact(2).map(run).collect()
}
