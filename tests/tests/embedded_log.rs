//! The embedded log beyond what it shares with Kafka: kills of its process, a second process, a full disk, its cleaner, and large
//! transactions. What is on disk is read with plain SQLite.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use barnabas::log::embedded::EmbeddedSettings;
use barnabas::log::{
    Batch, CleanupPolicy, Error, GroupEvent, GroupSettings, Log, NextOffset, Producer, ProducerRecord,
    ProducerSettings, Reader, StartAt, TopicPartition, TopicSpec,
};
use barnabas_tests::oracle::read_embedded;
use barnabas_tests::process::{Process, program};
use barnabas_tests::site::wait_for;
use rusqlite::{Connection, OpenFlags};
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(60);
const KILLS: usize = 4;
/// Records that a worker is let append before it is killed, at least.
const ENOUGH: usize = 50;
/// The largest file of a worker whose disk is full soon.
const SMALL_DISK_BYTES: u64 = 6 * 1024 * 1024;
/// Well above what the write-ahead log grows to, also on a slow disk, and well below all that is written when 180 MB are deleted.
const WAL_BYTES: u64 = 128 * 1024 * 1024;
const HOUR_MS: i64 = 60 * 60 * 1000;

// --- kills, a second process, a full disk -----------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_survives_kill_9_and_nothing_of_an_unfinished_transaction_is_there() {
    let worker = Worker::new();
    for _ in 0..KILLS {
        let before = worker.said("appended").len();
        let process = worker.start();
        // The file may not be there yet.
        let staged = || try_count(&worker.folder(), "staged").unwrap_or(0);
        wait_for("staged values", SOON, || staged() > 0).await;
        wait_for("appended records", SOON, || {
            worker.said("appended").len() > before + ENOUGH
        })
        .await;
        // Any moment will do.
        tokio::time::sleep(Duration::from_millis(rand::random_range(0..200))).await;
        process.kill();
        assert!(
            worker.count("staged") > 0,
            "the kill has left staged values to be removed"
        );
        worker.assert_all_is_there().await;
    }
    assert!(worker.said("copied").len() > KILLS && worker.said("counted").len() > KILLS);
    assert_eq!(worker.said("refused"), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_process_is_told_that_the_log_is_in_use_and_opens_it_after_kill_9() {
    let worker = Worker::new();
    let process = worker.start();
    wait_for("appended records", SOON, || !worker.said("appended").is_empty()).await;
    let error = worker.open().await.expect_err("it is in use");
    assert!(matches!(error, Error::Locked(_)), "{error:?}");
    let message = error.to_string();
    assert!(message.contains("in use by another process"), "{message}");
    assert!(
        message.contains(&worker.folder().display().to_string()),
        "it says where: {message}"
    );
    // The other way round too: the error is what the second program says when it ends.
    let output = worker.scratch.path().join("second");
    let arguments = [worker.folder().display().to_string()];
    let mut second = Process::start(&program("log-worker"), &arguments, &[], &output);
    let status = second.wait(SOON).expect("it ends at once");
    assert!(!status.success() && second.output().contains(&message));
    process.kill();
    worker.assert_all_is_there().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_an_error_that_loses_nothing_and_ends_when_there_is_room() {
    let worker = Worker::new();
    let process = worker.start_on_a_small_disk();
    wait_for("a full disk", SOON, || worker.said("refused").len() > 20).await;
    let refused = worker.said("refused");
    assert!(refused.iter().all(|error| error.starts_with("Storage(")), "{refused:?}");
    let appended = worker.said("appended").len();
    assert!(appended > ENOUGH, "there was room for some: {appended}");
    let room = Command::new("prlimit")
        .args(["--fsize=unlimited", "--pid", &process.pid().to_string()])
        .status()
        .expect("prlimit of util-linux starts");
    assert!(room.success());
    wait_for("appends when there is room", SOON, || {
        worker.said("appended").len() > appended + ENOUGH
    })
    .await;
    process.kill();
    worker.assert_all_is_there().await;
}

/// The program `log-worker` on a log of its own, and what it says.
struct Worker {
    scratch: TempDir,
}

impl Worker {
    fn new() -> Self {
        Self {
            scratch: TempDir::new().expect("a folder"),
        }
    }

    fn folder(&self) -> PathBuf {
        self.scratch.path().join("log")
    }

    fn output(&self) -> PathBuf {
        self.scratch.path().join("said")
    }

    fn start(&self) -> Process {
        let arguments = [self.folder().display().to_string()];
        Process::start(&program("log-worker"), &arguments, &[], &self.output())
    }

    /// No file can grow beyond [`SMALL_DISK_BYTES`] until its soft limit is lifted. Blocks of `ulimit` have 512 bytes.
    fn start_on_a_small_disk(&self) -> Process {
        const SCRIPT: &str = r#"trap "" XFSZ; ulimit -S -f "$1"; exec "$2" "$3""#;
        let blocks = (SMALL_DISK_BYTES / 512).to_string();
        let worker = program("log-worker").display().to_string();
        let folder = self.folder().display().to_string();
        let arguments = ["-c", SCRIPT, "sh", &blocks, &worker, &folder].map(str::to_owned);
        Process::start(Path::new("/bin/sh"), &arguments, &[], &self.output())
    }

    /// What stands behind a word on whole lines of the output.
    fn said(&self, word: &str) -> Vec<String> {
        let output = std::fs::read_to_string(self.output()).unwrap_or_default();
        let whole = output.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let lines = whole.lines().filter_map(|line| line.strip_prefix(word));
        lines.map(|rest| rest.trim_start().to_owned()).collect()
    }

    /// Rows of a table of the log's file.
    fn count(&self, table: &str) -> usize {
        count(&self.folder(), table)
    }

    async fn open(&self) -> Result<Log, Error> {
        Log::open_embedded(EmbeddedSettings::new(self.folder())).await
    }

    /// Opens the log, which nobody else has open now, and compares what is there with everything that the worker was promised.
    async fn assert_all_is_there(&self) {
        let log = self.open().await.expect("it opens");
        log.close().await;
        assert_eq!((self.count("staged"), self.count("blobs")), (0, 0), "leftovers");
        let input = read_embedded(&self.folder(), "input");
        let offsets: Vec<i64> = input.iter().map(|record| record.offset).collect();
        assert_eq!(offsets, (0..input.len() as i64).collect::<Vec<_>>(), "no gaps");
        let at: BTreeMap<i64, String> = input.iter().map(|record| (record.offset, record.key_text())).collect();
        for promise in self.said("appended") {
            let (sequence, offset) = promise.split_once(' ').expect("two words");
            let offset = offset.parse().expect("an offset");
            assert_eq!(at.get(&offset).map(String::as_str), Some(sequence), "{promise}");
        }
        assert!(
            self.committed("counter") >= self.last_said("counted"),
            "a commit was lost"
        );
        let copied = self.committed("copier");
        assert!(copied >= self.last_said("copied"), "a transaction was lost");
        // Records and offsets of transactions stand and fall together, and nothing else is in that topic.
        let copies = read_embedded(&self.folder(), "copies");
        assert_eq!(copies.len(), copied, "what was copied and how far it was committed");
        let same = copies
            .iter()
            .zip(&input)
            .all(|(copy, record)| copy.value == record.value);
        assert!(same, "copies are not what was copied");
    }

    fn last_said(&self, word: &str) -> usize {
        self.said(word)
            .last()
            .map_or(0, |offset| offset.parse().expect("an offset"))
    }

    fn committed(&self, group: &str) -> usize {
        let select = "SELECT coalesce(max(next_offset), 0) FROM committed WHERE group_id = ?1";
        let offset: rusqlite::Result<i64> =
            open_file(&self.folder())
                .expect("the file is there")
                .query_row(select, [group], |row| row.get(0));
        offset.expect("a number") as usize
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_topic_that_several_make_at_once_is_one() {
    const TOPICS: usize = 300;
    const MAKERS: usize = 8;
    let folder = TempDir::new().expect("a folder");
    let log = Log::open_embedded(EmbeddedSettings::new(folder.path())).await;
    let log = log.expect("a log");
    for number in 0..TOPICS {
        let mut making = JoinSet::new();
        for _ in 0..MAKERS {
            let (log, name) = (log.clone(), format!("t-{number}"));
            making.spawn(async move {
                apply(&log, &TopicSpec::new(&name, 1)).await;
                let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
                let appended = producer.append(ProducerRecord::to(name).value("v")).await;
                appended.expect("appended").offset
            });
        }
        let mut offsets = timeout(SOON, making.join_all()).await.expect("in time");
        offsets.sort_unstable();
        assert_eq!(offsets, (0..MAKERS as i64).collect::<Vec<_>>());
    }
    log.close().await;
}

// --- the cleaner ------------------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn compaction_leaves_the_last_of_each_key_at_its_offset_and_readers_in_the_middle_miss_none_of_them() {
    const RECORDS: i64 = 12_000;
    const KEYS: i64 = 100;
    let (folder, log) = open_with_busy_cleaner().await;
    let mut spec = TopicSpec::new("t", 1);
    apply(&log, &spec).await;
    let mut reader = log.reader("t").await.expect("a reader");
    let mut seen = BTreeMap::new();
    let mut expected: BTreeMap<String, i64> = BTreeMap::new();
    let old_ms = now_ms() - 25 * HOUR_MS;
    let mut producer = log.transactional_producer("writer").await.expect("a producer");
    for _ in 0..2 {
        // Large enough to be staged.
        let mut transaction = producer.begin();
        for number in 0..RECORDS {
            let record = ProducerRecord::to("t").key(format!("k{}", number % KEYS));
            let value = format!("{number} {}", "x".repeat(200));
            transaction.send(record.value(value)).await.expect("sent");
        }
        // What tombstones delete is gone with the first compaction. They are kept for a day from then on, whenever they were written.
        for (key, at_ms) in [("recent", now_ms()), ("old", old_ms)] {
            let value = ProducerRecord::to("t").key(key).value("deleted below");
            let mut tombstone = ProducerRecord::to("t").key(key);
            tombstone.timestamp_ms = Some(at_ms);
            transaction.send(value).await.expect("sent");
            transaction.send(tombstone).await.expect("sent");
        }
        transaction.commit().await.expect("committed");
    }
    let end = 2 * (RECORDS + 4);
    for key in 0..KEYS {
        expected.insert(format!("k{key}"), end - 4 - KEYS + key);
    }
    expected.insert("recent".to_owned(), end - 3);
    expected.insert("old".to_owned(), end - 1);

    // The reader is in the middle of it when compaction begins.
    assert_eq!(reader.assign(0, StartAt::Start).await.expect("assigned"), 0);
    let first = next_batch(&mut reader).await;
    assert!(!first.caught_up);
    note_last(&mut seen, &first);
    spec.cleanup = CleanupPolicy::Compact;
    apply(&log, &spec).await;
    wait_for("compaction", SOON, || count(folder.path(), "records") == expected.len()).await;

    let left: BTreeMap<String, i64> = read_embedded(folder.path(), "t")
        .iter()
        .map(|record| (record.key_text(), record.offset))
        .collect();
    assert_eq!(left, expected);
    assert_eq!(
        count(folder.path(), "blobs"),
        expected.len() - 2,
        "values go with their records; tombstones have none"
    );
    loop {
        let batch = next_batch(&mut reader).await;
        note_last(&mut seen, &batch);
        if batch.caught_up {
            assert_eq!(batch.next_offset, NextOffset(end));
            break;
        }
    }
    assert_eq!(seen, expected, "the reader knows the last of each key");
    // Offsets are never used again, and the end stays, also when the log is opened anew.
    log.close().await;
    // It is as if a day had passed.
    let file = Connection::open(folder.path().join("log.sqlite")).expect("the file is there");
    let a_day_ago = "UPDATE partitions SET settled_ms = settled_ms - 24 * 60 * 60 * 1000";
    file.execute(a_day_ago, []).expect("nobody else writes");
    drop(file);
    let log = open_again_with_busy_cleaner(&folder).await;
    let partition = TopicPartition::new("t", 0);
    assert_eq!(log.offset(&partition, StartAt::Start).await.expect("a start"), 0);
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    let next = ProducerRecord::to("t").key("next");
    assert_eq!(producer.append(next).await.expect("appended").offset, end);
    // The new one, a tombstone too, stays.
    wait_for("tombstones to go", SOON, || {
        count(folder.path(), "records") == expected.len() - 1
    })
    .await;
    let left = read_embedded(folder.path(), "t");
    let left: Vec<String> = left.iter().map(|record| record.key_text()).collect();
    assert!(
        left.iter().all(|key| !["old", "recent"].contains(&key.as_str())),
        "{left:?}"
    );
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_moves_the_start_and_whoever_it_overtakes_is_told() {
    // More than a reader reads ahead, and the last segment of the time index is not all old.
    const OLD: i64 = 60 * 1024 + 7;
    let (folder, log) = open_with_busy_cleaner().await;
    let mut spec = TopicSpec::new("t", 1);
    spec.retention = None;
    apply(&log, &spec).await;
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    append_at(&producer, OLD, now_ms() - 2 * HOUR_MS).await;
    append_at(&producer, 10, now_ms()).await;
    let partition = TopicPartition::new("t", 0);
    let mut reader = log.reader("t").await.expect("a reader");
    reader.assign(0, StartAt::Start).await.expect("assigned");
    assert_eq!(next_batch(&mut reader).await.records[0].offset, 0);
    let mut member = log.join_group(GroupSettings::new("g", ["t"])).await.expect("a member");
    let GroupEvent::Assigned(_) = next_event(&mut member).await else {
        panic!("assigned first");
    };

    spec.retention = Some(Duration::from_secs(3600));
    apply(&log, &spec).await;
    wait_for("retention", SOON, || count(folder.path(), "records") == 10).await;
    assert_eq!(log.offset(&partition, StartAt::Start).await.expect("a start"), OLD);
    assert_eq!(log.offset(&partition, StartAt::End).await.expect("an end"), OLD + 10);
    let wal = std::fs::metadata(folder.path().join("log.sqlite-wal")).expect("it is there");
    assert!(wal.len() < WAL_BYTES, "{} bytes of write-ahead log", wal.len());
    let overtaken = loop {
        match timeout(SOON, reader.next()).await.expect("in time") {
            Ok(batch) => assert!(batch.next_offset.0 < OLD, "skipped to {:?} unsaid", batch.next_offset),
            Err(error) => break error,
        }
    };
    assert!(
        matches!(&overtaken, Error::OffsetOutOfRange { start, end, .. } if (*start, *end) == (OLD, OLD + 10)),
        "{overtaken:?}"
    );
    let refused = reader.assign(0, StartAt::Offset(OLD - 1)).await;
    assert!(matches!(refused, Err(Error::OffsetOutOfRange { .. })), "{refused:?}");
    assert_eq!(reader.assign(0, StartAt::Offset(OLD)).await.expect("kept"), OLD);
    assert_eq!(next_batch(&mut reader).await.records.len(), 10);
    // A member of a group goes on with the first that is kept, as its settings say.
    let mut offsets = Vec::new();
    while offsets.last() != Some(&(OLD + 9)) {
        if let GroupEvent::Records(batch) = next_event(&mut member).await {
            offsets.extend(batch.records.iter().map(|record| record.offset));
        }
    }
    assert_eq!(offsets[offsets.len() - 10..], (OLD..OLD + 10).collect::<Vec<_>>());
    assert!(offsets.len() < OLD as usize, "the member was never overtaken");
    log.close().await;
}

// --- large transactions -----------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn small_appends_go_on_beside_a_large_transaction_that_is_seen_whole_or_not_at_all() {
    const RECORDS: usize = 256;
    const VALUE_BYTES: usize = 128 * 1024;
    let folder = TempDir::new().expect("a folder");
    let log = Log::open_embedded(EmbeddedSettings::new(folder.path()))
        .await
        .expect("a log");
    apply(&log, &TopicSpec::new("t", 1)).await;
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    let small = || producer.append(ProducerRecord::to("t").value("small"));
    let mut reader = log.reader("t").await.expect("a reader");
    reader.assign(0, StartAt::Start).await.expect("assigned");
    let mut large = log.transactional_producer("large").await.expect("a producer");
    let mut offset = 0;
    for commits in [false, true] {
        let mut transaction = large.begin();
        for number in 0..RECORDS {
            let value = vec![number as u8; VALUE_BYTES];
            transaction
                .send(ProducerRecord::to("t").value(value))
                .await
                .expect("sent");
            // Each stands right behind the one before, and a reader has it at once.
            assert_eq!(small().await.expect("appended").offset, offset);
            loop {
                let batch = next_batch(&mut reader).await;
                assert!(
                    batch
                        .records
                        .iter()
                        .all(|record| record.value.as_deref() == Some(b"small")),
                    "a record of an open transaction is seen"
                );
                if batch.next_offset.0 > offset {
                    break;
                }
            }
            offset += 1;
        }
        assert!(count(folder.path(), "staged") > RECORDS / 2, "most of it is on disk");
        if commits {
            transaction.commit().await.expect("committed");
        } else {
            transaction.abort().await.expect("aborted");
            assert_eq!((count(folder.path(), "staged"), count(folder.path(), "blobs")), (0, 0));
        }
    }
    assert_eq!(
        (count(folder.path(), "staged"), count(folder.path(), "blobs")),
        (0, RECORDS)
    );
    let mut numbers = Vec::new();
    while numbers.len() < RECORDS {
        for record in next_batch(&mut reader).await.records {
            assert_eq!(record.offset, offset);
            offset += 1;
            let value = record.value.expect("a value");
            assert!(value.len() == VALUE_BYTES && value.iter().all(|byte| *byte == value[0]));
            numbers.push(usize::from(value[0]));
        }
    }
    assert_eq!(numbers, (0..RECORDS).collect::<Vec<_>>());
    assert_eq!(small().await.expect("appended").offset, offset);
    log.close().await;
}

// --- what they share --------------------------------------------------------------------------------------------------------

async fn open_with_busy_cleaner() -> (TempDir, Log) {
    let folder = TempDir::new().expect("a folder");
    let log = open_again_with_busy_cleaner(&folder).await;
    (folder, log)
}

async fn open_again_with_busy_cleaner(folder: &TempDir) -> Log {
    let mut settings = EmbeddedSettings::new(folder.path());
    settings.cleanup_interval = Duration::from_millis(20);
    let log = Log::open_embedded(settings).await;
    log.expect("a closed log can be opened, whoever still has a handle")
}

async fn apply(log: &Log, spec: &TopicSpec) {
    let plan = log.plan_topics(std::slice::from_ref(spec)).await.expect("a plan");
    log.apply_topics(&plan).await.expect("applied");
}

/// Appends records with a timestamp, several thousand under way at a time.
async fn append_at(producer: &Producer, records: i64, timestamp_ms: i64) {
    let mut deliveries = Vec::new();
    for _ in 0..records {
        let mut record = ProducerRecord::to("t").value(vec![b'x'; 3000]);
        record.timestamp_ms = Some(timestamp_ms);
        deliveries.push(producer.send(record).await.expect("sent"));
    }
    for delivery in deliveries {
        delivery.await.expect("appended");
    }
}

async fn next_batch(reader: &mut Reader) -> Batch {
    timeout(SOON, reader.next()).await.expect("in time").expect("a batch")
}

async fn next_event(member: &mut barnabas::log::GroupMember) -> GroupEvent {
    timeout(SOON, member.next()).await.expect("in time").expect("an event")
}

/// Notes the last offset of each key, and that offsets only rise.
fn note_last(seen: &mut BTreeMap<String, i64>, batch: &Batch) {
    for record in &batch.records {
        let key = String::from_utf8_lossy(record.key.as_deref().unwrap_or_default()).into_owned();
        let before = seen.insert(key, record.offset);
        assert!(before < Some(record.offset));
    }
}

fn open_file(folder: &Path) -> rusqlite::Result<Connection> {
    Connection::open_with_flags(folder.join("log.sqlite"), OpenFlags::SQLITE_OPEN_READ_ONLY)
}

/// Rows of a table of a log's file.
fn count(folder: &Path, table: &str) -> usize {
    try_count(folder, table).unwrap_or_else(|error| panic!("{table}: {error}"))
}

fn try_count(folder: &Path, table: &str) -> rusqlite::Result<usize> {
    let select = format!("SELECT count(*) FROM {table}");
    let count: i64 = open_file(folder)?.query_row(&select, [], |row| row.get(0))?;
    Ok(count as usize)
}

fn now_ms() -> i64 {
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since_epoch.expect("a clock").as_millis() as i64
}
