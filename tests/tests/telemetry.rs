//! Telemetry under a load that the log cannot always take: each event is taken or refused, memory is bounded, and what was taken is on
//! the log.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use barnabas::log::embedded::EmbeddedSettings;
use barnabas::log::kafka::KafkaSettings;
use barnabas::log::{Log, TopicSpec};
use barnabas_tests::http;
use barnabas_tests::on_both_logs;
use barnabas_tests::site::{Engine, Site, wait_for};
use hyper::Method;
use hyper::header::CONTENT_TYPE;

on_both_logs!(
    every_event_is_taken_or_refused_and_nothing_that_was_taken_is_lost,
    events_with_a_key_keep_their_room_when_nobody_waits_for_them_any_more,
);

const CLIENTS: usize = 24;
const BATCH: usize = 100;
/// Twenty batches or so.
const QUEUE_BYTES: usize = 1024 * 1024;
/// What the gateway may need beside it: bodies on their way in, and its log's client.
const MEMORY_BYTES: u64 = 64 * 1024 * 1024;

const DEADLINE: Duration = Duration::from_secs(120);

/// What the clients were told.
#[derive(Debug, Default)]
struct Told {
    /// The ids of events whose request was answered 202.
    taken: Mutex<Vec<String>>,
    refused: AtomicUsize,
    unavailable: AtomicUsize,
    stop: AtomicBool,
}

impl Told {
    fn taken(&self) -> usize {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

async fn every_event_is_taken_or_refused_and_nothing_that_was_taken_is_lost(engine: Engine) {
    let mut site = Site::with_a_log_of_its_own(engine);
    let topic = "visits";
    make_topic(&site, topic).await;
    site.set("BARNABAS_EVENTS_TOPICS", format!("{topic}:telemetry"))
        .set("BARNABAS_EVENTS_QUEUE_BYTES", QUEUE_BYTES)
        .set("BARNABAS_EVENTS_DEADLINE_MS", 2000);
    let gateway = site.gateway("gateway");
    let address = gateway.address();
    gateway.process().forget_peak_memory();
    let idle_bytes = gateway.process().memory_bytes();

    let told = Arc::new(Told::default());
    let mut clients = Vec::new();
    for client in 0..CLIENTS {
        let told = told.clone();
        clients.push(tokio::spawn(async move {
            let path = format!("/v1/topics/{topic}/events");
            for batch in 0.. {
                if told.stop.load(Ordering::Relaxed) {
                    return;
                }
                let ids: Vec<String> = (0..BATCH).map(|nth| format!("{client}-{batch}-{nth}")).collect();
                let line = |id: &String| format!(r#"{{"type":"visit","id":"{id}","data":{{"page":"/{:0>150}"}}}}"#, id);
                let body = ids.iter().map(line).collect::<Vec<_>>().join("\n");
                let answer = http::post(address, &path, "text/plain;charset=UTF-8", body)
                    .await
                    .expect("an answer");
                match answer.status.as_u16() {
                    202 => told.taken.lock().unwrap_or_else(PoisonError::into_inner).extend(ids),
                    429 => {
                        assert_eq!(
                            (answer.code().as_str(), answer.header("retry-after")),
                            ("queue-full", "2")
                        );
                        told.refused.fetch_add(1, Ordering::Relaxed);
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    503 => drop(told.unavailable.fetch_add(1, Ordering::Relaxed)),
                    status => panic!("{status}: {answer:?}"),
                }
            }
        }));
    }
    wait_for("events are taken", DEADLINE, || told.taken() >= 5000).await;
    let away = site.take_log_away();
    wait_for("the queue is full", DEADLINE, || {
        told.refused.load(Ordering::Relaxed) >= 200
    })
    .await;
    drop(away);
    let before = told.taken();
    wait_for("events are taken again", DEADLINE, || told.taken() >= before + 5000).await;
    told.stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.expect("no panic");
    }

    let peak_bytes = gateway.process().peak_memory_bytes();
    assert!(
        peak_bytes < idle_bytes + QUEUE_BYTES as u64 + MEMORY_BYTES,
        "{peak_bytes} bytes at most, {idle_bytes} before"
    );
    let mut written: HashMap<String, usize> = HashMap::new();
    for record in site.records(topic) {
        *written.entry(record.header("ce_id").to_owned()).or_default() += 1;
    }
    let taken = told.taken.lock().unwrap_or_else(PoisonError::into_inner);
    let wrong: Vec<_> = taken.iter().filter(|id| written.get(*id) != Some(&1)).collect();
    assert!(
        wrong.is_empty(),
        "{} of {} are not there once: {wrong:?}",
        wrong.len(),
        taken.len()
    );
}

async fn events_with_a_key_keep_their_room_when_nobody_waits_for_them_any_more(engine: Engine) {
    let mut site = Site::with_a_log_of_its_own(engine);
    make_topic(&site, "visits").await;
    site.set("BARNABAS_EVENTS_TOPICS", "visits")
        .set("BARNABAS_EVENTS_QUEUE_BYTES", 100_000)
        .set("BARNABAS_EVENTS_DEADLINE_MS", 1000);
    let gateway = site.gateway("gateway");
    let address = gateway.address();
    let body = format!(r#"{{"type":"visit","data":"{:0>60000}"}}"#, 0);
    let post = async |key: Option<&str>| {
        let mut request =
            http::request(Method::POST, "/v1/topics/visits/events").header(CONTENT_TYPE, "application/json");
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        let request = request.body(http::whole(body.clone())).expect("a request");
        http::send(address, request).await.expect("an answer")
    };
    assert_eq!(post(Some("before")).await.status, 202);

    let away = site.take_log_away();
    assert_eq!(post(Some("first")).await.status, 503, "the log does not answer in time");
    // It waits for the log still.
    for key in [Some("second"), None] {
        let answer = post(key).await;
        assert_eq!(
            (answer.status.as_u16(), answer.code().as_str()),
            (429, "queue-full"),
            "{key:?}"
        );
    }
    drop(away);
    let again = async { while post(Some("third")).await.status != 202 {} };
    tokio::time::timeout(DEADLINE, again)
        .await
        .expect("there is room again");
}

async fn make_topic(site: &Site, topic: &str) {
    let log = match site.brokers() {
        Some(brokers) => Log::connect_kafka(KafkaSettings::new(brokers)).await,
        None => Log::open_embedded(EmbeddedSettings::new(site.embedded_log().parent().expect("a folder"))).await,
    };
    let log = log.expect("a log");
    let plan = log.plan_topics(&[TopicSpec::new(topic, 4)]).await.expect("a plan");
    log.apply_topics(&plan).await.expect("topics");
    log.close().await;
}
