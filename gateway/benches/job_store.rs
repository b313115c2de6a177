//! How many commands the job store applies in a second, on the embedded log: `cargo bench -p barnabas --bench job_store`.
//!
//! Commands wait on the log when the store starts, so that nothing but the store is measured: one owner, eight partitions,
//! jobs of 2000 chunks each. For comparison the same records are read in the same run with nothing done to them.

use std::time::{Duration, Instant};

use barnabas::log::embedded::EmbeddedSettings;
use barnabas::log::{Delivery, Log, Producer, ProducerSettings, Record, StartAt, TopicPartition};
use barnabas::server::config::TopicsConfig;
use barnabas::server::job_state::Reject;
use barnabas::server::job_store::{self, JobCommand, command_record};
use tokio_util::sync::CancellationToken;

const JOBS: usize = 100;
const CHUNKS: u32 = 2000;
const COMMANDS: usize = JOBS * (CHUNKS as usize + 1);

#[tokio::main]
async fn main() {
    let folder = tempfile::tempdir().expect("a folder");
    let settings = EmbeddedSettings::new(folder.path());
    let log = Log::open_embedded(settings).await.expect("a log");
    let topics = TopicsConfig::default();
    let plan = log.plan_topics(&topics.specs()).await.expect("a plan");
    log.apply_topics(&plan).await.expect("topics");
    submit(&log, &topics).await;

    let start = Instant::now();
    let records = read(&log, &topics).await;
    let reading = start.elapsed();
    assert_eq!(records, COMMANDS);

    let start = Instant::now();
    let stopping = CancellationToken::new();
    let store = tokio::spawn(job_store::run(log.clone(), topics.clone(), stopping.clone()));
    let (events, states) = ended(&log, &topics).await;
    let applying = start.elapsed();
    stopping.cancel();
    store.await.expect("no panic").expect("a clean end");

    let rate = |elapsed: Duration| COMMANDS as f64 / elapsed.as_secs_f64();
    println!("{COMMANDS} commands of {JOBS} jobs");
    println!("read only        {:>10.0}/s", rate(reading));
    println!(
        "applied          {:>10.0}/s, {:.3} of reading",
        rate(applying),
        rate(applying) / rate(reading)
    );
    println!(
        "states written   {states:>10}, {:.1} commands each",
        COMMANDS as f64 / states as f64
    );
    println!("events written   {events:>10}");
    log.close().await;
}

async fn submit(log: &Log, topics: &TopicsConfig) {
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    let ids: Vec<String> = (0..JOBS).map(|_| uuid::Uuid::now_v7().to_string()).collect();
    let mut last = None;
    for id in &ids {
        let register = JobCommand::Register {
            job_type: "import-contacts".to_owned(),
            channel: id.clone(),
            chunks: CHUNKS,
            rows: u64::from(CHUNKS) * 500,
            submitted_ms: 0,
            traceparent: None,
        };
        last = Some(send(&producer, topics, id, &register).await);
    }
    for chunk in 0..CHUNKS {
        for id in &ids {
            let done = JobCommand::Done {
                chunk,
                ok: 499,
                rejected: 1,
                rejects: vec![Reject {
                    line: u64::from(chunk) * 500 + 7,
                    reason: "e-mail: no @".to_owned(),
                }],
            };
            last = Some(send(&producer, topics, id, &done).await);
        }
    }
    last.expect("a delivery").await.expect("appended");
}

async fn send(producer: &Producer, topics: &TopicsConfig, id: &str, command: &JobCommand) -> Delivery {
    let record = command_record(topics, id, command).expect("a record");
    producer.send(record).await.expect("sent")
}

async fn read(log: &Log, topics: &TopicsConfig) -> usize {
    let mut reader = log.reader(&topics.job_commands()).await.expect("a reader");
    for partition in 0..topics.partitions {
        reader.assign(partition, StartAt::Start).await.expect("assigned");
    }
    let (mut records, mut ended) = (0, 0);
    while ended < topics.partitions {
        let batch = reader.next().await.expect("a batch");
        records += batch.records.len();
        ended += i32::from(batch.caught_up);
    }
    records
}

/// Waits for the end of every job; returns how many events and states were written until then.
async fn ended(log: &Log, topics: &TopicsConfig) -> (usize, i64) {
    let mut reader = log.reader(&topics.notifications()).await.expect("a reader");
    for partition in 0..topics.partitions {
        reader.assign(partition, StartAt::Start).await.expect("assigned");
    }
    let (mut events, mut ended) = (0, 0);
    while ended < JOBS {
        let batch = reader.next().await.expect("a batch");
        events += batch.records.len();
        let is_end = |record: &&Record| record.headers.last_str("ce_type") == Some("job.completed");
        ended += batch.records.iter().filter(is_end).count();
    }
    let mut states = 0;
    for partition in 0..topics.partitions {
        let partition = TopicPartition::new(topics.jobs(), partition);
        states += log.offset(&partition, StartAt::End).await.expect("an end");
    }
    (events, states)
}
