//! A worker that knows Kafka and JSON but nothing of Barnabas takes part: it does what the page on workers says, and a clumsy one
//! that says everything twice does no harm.

use std::collections::BTreeMap;
use std::time::Duration;

use barnabas_tests::http;
use barnabas_tests::job::{self, Job};
use barnabas_tests::kafka;
use barnabas_tests::oracle::OracleRecord;
use barnabas_tests::site::{Engine, Gateway, Site, contacts_csv, wait_for};
use rdkafka::ClientConfig;
use rdkafka::message::ToBytes;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};
use serde_json::json;

const ROWS: usize = 3000;
const SOON: Duration = Duration::from_secs(60);

fn producer() -> BaseProducer {
    ClientConfig::new()
        .set("bootstrap.servers", kafka::brokers())
        // As every client of Java and most others choose a key's partition; librdkafka's own default differs.
        .set("partitioner", "murmur2_random")
        .create()
        .expect("a producer")
}

fn say(producer: &BaseProducer, site: &Site, job: &str, command: &serde_json::Value) {
    let topic = site.commands_topic();
    let value = command.to_string();
    let record: BaseRecord<'_, str, [u8]> = BaseRecord::to(&topic).key(job).payload(value.to_bytes());
    producer.send(record).map_err(|(error, _)| error).expect("it is queued");
}

fn chunks(site: &Site, job: &str) -> Vec<OracleRecord> {
    let mut chunks = site.records(&site.chunks_topic());
    chunks.retain(|chunk| chunk.header("bn-job") == job);
    chunks.sort_by_key(|chunk| chunk.header("bn-chunk").parse::<u32>().expect("a number"));
    chunks
}

/// Types of the events of a job, in the order of the log.
fn told(site: &Site, job: &str) -> Vec<String> {
    let events = site.records(&site.notifications_topic()).into_iter();
    let own = events.filter(|event| event.header("ce_subject") == job);
    own.map(|event| event.header("ce_type").to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_of_another_kind_on_kafka_completes_a_job_even_if_it_repeats_itself() {
    let site = Site::new(Engine::Kafka);
    let gateway = site.gateway("gateway");
    let job = job::submit(gateway.address(), "c", contacts_csv("k", ROWS)).await;
    let producer = producer();
    let chunks = chunks(&site, &job.id);
    let mut reasons = BTreeMap::new();
    for chunk in &chunks {
        let index: u32 = chunk.header("bn-chunk").parse().expect("a number");
        let rows: u64 = chunk.header("bn-rows").parse().expect("a number");
        let line: u64 = chunk.header("bn-first-line").parse().expect("a number");
        reasons.insert(line, format!("chunk {index}"));
        let done = json!({
            "command": "done", "chunk": index, "ok": rows - 1, "rejected": 1,
            "rejects": [{"line": line, "reason": format!("chunk {index}")}],
        });
        for command in [json!({"command": "started", "chunk": index}), done] {
            say(&producer, &site, &job.id, &command);
            say(&producer, &site, &job.id, &command);
        }
    }
    // Things that no job has, or that are no commands, are passed over.
    say(
        &producer,
        &site,
        &job.id,
        &json!({"command": "done", "chunk": 4_000_000, "ok": 1, "rejected": 0}),
    );
    say(&producer, &site, &job.id, &json!({"command": "dance"}));
    say(
        &producer,
        &site,
        "no-such-job",
        &json!({"command": "done", "chunk": 0, "ok": 1, "rejected": 0}),
    );
    say(&producer, &site, &job.id, &json!(null));
    producer.flush(SOON).expect("Kafka takes it");

    let state = completed(&gateway, &job).await;
    assert_eq!(
        state["rows"],
        json!({"ok": ROWS - chunks.len(), "rejected": chunks.len(), "total": ROWS})
    );
    let rejects: BTreeMap<u64, String> = serde_json::from_value::<Vec<serde_json::Value>>(state["rejects"].clone())
        .expect("a list")
        .into_iter()
        .map(|reject| {
            let reason = reject["reason"].as_str().expect("a text").to_owned();
            (reject["line"].as_u64().expect("a number"), reason)
        })
        .collect();
    assert_eq!(rejects, reasons);
    // What comes after the end changes nothing either.
    say(
        &producer,
        &site,
        &job.id,
        &json!({"command": "done", "chunk": 0, "ok": 500, "rejected": 0}),
    );
    say(
        &producer,
        &site,
        &job.id,
        &json!({"command": "failed", "chunk": 0, "code": "late", "message": "too late"}),
    );
    producer.flush(SOON).expect("Kafka takes it");
    wait_until_applied(&site, &gateway, &job).await;
    let types = told(&site, &job.id);
    assert_eq!(
        (types[0].as_str(), types[1].as_str()),
        ("job.accepted", "job.consumed"),
        "{types:?}"
    );
    assert_eq!(
        types.iter().filter(|kind| *kind == "job.completed").count(),
        1,
        "{types:?}"
    );
    assert_eq!(types.last().map(String::as_str), Some("job.completed"), "{types:?}");
}

/// Waits until the store has applied what it was told of a job so far: it tells of another whose commands stand behind.
async fn wait_until_applied(site: &Site, gateway: &Gateway, job: &Job) {
    let partition_of = |job: &str| {
        let commands = site.records(&site.commands_topic()).into_iter();
        let mut own = commands.filter(|command| command.key_text() == job);
        own.next().map(|command| command.partition)
    };
    let partition = partition_of(&job.id);
    let other = loop {
        let other = job::submit(gateway.address(), "other", contacts_csv("k", 1)).await;
        if partition_of(&other.id) == partition {
            break other;
        }
    };
    wait_for("job.accepted of the other", SOON, || !told(site, &other.id).is_empty()).await;
}

async fn completed(gateway: &Gateway, job: &Job) -> serde_json::Value {
    let request = http::request(hyper::Method::GET, &job.location)
        .header("prefer", "wait=30")
        .body(http::whole(""))
        .expect("a request");
    let state = http::send(gateway.address(), request).await.expect("an answer").json();
    assert_eq!(state["state"], "completed", "{state}");
    state
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_on_kafka_that_cannot_do_a_chunk_fails_the_job_once() {
    let site = Site::new(Engine::Kafka);
    let gateway = site.gateway("gateway");
    let job = job::submit(gateway.address(), "c", contacts_csv("k", ROWS)).await;
    let producer = producer();
    let failed = json!({"command": "failed", "chunk": 1, "code": "bad-header", "message": "no column of names"});
    for _ in 0..2 {
        say(
            &producer,
            &site,
            &job.id,
            &json!({"command": "done", "chunk": 0, "ok": 500, "rejected": 0}),
        );
        say(&producer, &site, &job.id, &failed);
    }
    producer.flush(SOON).expect("Kafka takes it");
    wait_for("job.failed on the log", SOON, || {
        told(&site, &job.id).contains(&"job.failed".to_owned())
    })
    .await;
    let events = site.records(&site.notifications_topic());
    let ends: Vec<_> = events
        .iter()
        .filter(|event| event.header("ce_type") == "job.failed")
        .collect();
    assert_eq!(ends.len(), 1);
    assert_eq!(
        ends[0].json()["error"],
        json!({"code": "bad-header", "message": "no column of names"})
    );
    assert_eq!(ends[0].key_text(), "c");
}
