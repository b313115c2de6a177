//! What operators see of tables, atomic stores, schedules and projections over HTTP, and of their dead letters, on both logs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use barnabas::log::{Log, ProducerRecord, ProducerSettings, TopicSpec};
use barnabas::patterns::atomic_store::{Aggregate, AtomicStore, AtomicStoreSettings, Derived};
use barnabas::patterns::dead_letter::dead_letter_topic;
use barnabas::patterns::projection::Projection;
use barnabas::patterns::schedule::{self, SchedulerSettings};
use barnabas::patterns::{atomic_store, table};
use barnabas::server::config::OpenTopic;
use barnabas_tests::conformance::{unique, within};
use barnabas_tests::http;
use barnabas_tests::kafka::brokers;
use barnabas_tests::on_both_logs;
use barnabas_tests::projection::ProjectionWork;
use barnabas_tests::site::Engine;
use barnabas_tests::world::World;
use serde_json::{Value, json};

on_both_logs!(
    a_table_is_listed_and_shows_the_last_value_of_each_key,
    pages_of_a_table_are_turned_and_keys_are_found_by_how_they_begin,
    a_store_is_told_from_a_table_and_from_what_is_noted_of_it,
    what_cannot_be_browsed_is_refused,
    schedules_that_were_set_aside_are_listed_by_themselves,
    a_command_that_made_its_store_panic_is_redriven_to_it,
    what_a_projection_could_not_project_is_seen_and_discarded,
);

/// A gateway on the log, with topics of its own.
async fn gateway(engine: Engine) -> World {
    World::with(|config| {
        config.topics.prefix = unique("browse");
        if let Engine::Kafka = engine {
            config.kafka.brokers = Some(brokers());
        }
    })
    .await
}

async fn make(log: &Log, topics: &[TopicSpec]) {
    let plan = log.plan_topics(topics).await.expect("a plan");
    log.apply_topics(&plan).await.expect("topics");
}

/// Appends keys and values to a topic, one after the other; no value is a tombstone.
async fn append(log: &Log, topic: &str, entries: &[(&str, Option<&[u8]>)]) {
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    for (key, value) in entries {
        let mut record = ProducerRecord::to(topic).key((*key).to_owned());
        record.value = value.map(|value| value.to_vec().into());
        producer.append(record).await.expect("appended");
    }
}

/// Asks until it is so.
async fn until(world: &World, path: &str, is_so: impl Fn(&Value) -> bool) -> Value {
    within(path, async {
        loop {
            let answer = world.get(path).await;
            if answer.status == 200 && is_so(&answer.json()) {
                return answer.json();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
}

/// The line of a topic on the list; null: it is not there.
fn listed(tables: &Value, topic: &str) -> Value {
    let tables = tables["tables"].as_array().expect("tables");
    let found = tables.iter().find(|table| table["topic"] == topic);
    found.cloned().unwrap_or_default()
}

fn keys(page: &Value) -> Vec<&str> {
    let records = page["records"].as_array().expect("records");
    let keys = records.iter().map(|record| record["key"].as_str().expect("a key"));
    keys.collect()
}

async fn a_table_is_listed_and_shows_the_last_value_of_each_key(engine: Engine) {
    let world = gateway(engine).await;
    let (topic, plain) = (unique("prices"), unique("plain"));
    make(&world.log, &[table::topic(&topic, 1), TopicSpec::new(&plain, 1)]).await;
    let entries: [(&str, Option<&[u8]>); 6] = [
        ("pear", Some(b"1")),
        ("apple", Some(br#"{"cents":9007199254740993}"#)),
        ("plum", Some(b"3")),
        ("pear", Some(&[0xff, 0x00])),
        ("plum", None),
        ("fig", Some(b"")),
    ];
    append(&world.log, &topic, &entries).await;
    let tables = until(&world, "/v1/admin/tables", |tables| !listed(tables, &topic).is_null()).await;
    let line = json!({ "topic": topic, "kind": "table", "internal": false, "partitions": 1, "records": 6 });
    assert_eq!(listed(&tables, &topic), line);
    assert_eq!(listed(&tables, &plain), Value::Null, "it is not compacted");

    let page = world.get(&format!("/v1/admin/tables/{topic}")).await.json();
    assert_eq!((&page["next"], &page["cut"]), (&Value::Null, &json!(false)));
    assert_eq!(keys(&page), ["apple", "fig", "pear"]);
    let records = &page["records"];
    assert_eq!(records[0]["value"], r#"{"cents":9007199254740993}"#);
    assert_eq!(
        (&records[0]["partition"], &records[0]["offset"]),
        (&json!(0), &json!(1))
    );
    assert_eq!(records[1]["value"], "");
    assert_eq!(
        (&records[2]["value_base64"], &records[2]["offset"]),
        (&json!("/wA="), &json!(3))
    );
    assert!(
        records
            .as_array()
            .expect("records")
            .iter()
            .all(|record| record["timestamp_ms"].as_i64() > Some(0))
    );
}

async fn pages_of_a_table_are_turned_and_keys_are_found_by_how_they_begin(engine: Engine) {
    let world = gateway(engine).await;
    let topic = unique("users");
    make(&world.log, &[table::topic(&topic, 3)]).await;
    let names: Vec<String> = (0..25).map(|number| format!("user-{number:02}")).collect();
    let others = ["admin", "user", "usher"];
    let entries: Vec<(&str, Option<&[u8]>)> = names
        .iter()
        .map(String::as_str)
        .chain(others)
        .rev()
        .map(|key| (key, Some(&b"1"[..])))
        .collect();
    append(&world.log, &topic, &entries).await;
    let mut path = format!("/v1/admin/tables/{topic}?prefix=user-&limit=10");
    let (mut seen, mut pages) = (Vec::new(), 0);
    loop {
        let page = world.get(&path).await.json();
        assert!(keys(&page).len() <= 10);
        seen.extend(keys(&page).into_iter().map(str::to_owned));
        pages += 1;
        let Some(next) = page["next"].as_str() else { break };
        path = format!("/v1/admin/tables/{topic}?prefix=user-&limit=10&after={next}");
    }
    assert_eq!((seen, pages), (names, 3));
    let page = world
        .get(&format!("/v1/admin/tables/{topic}?prefix=nobody"))
        .await
        .json();
    assert_eq!((keys(&page).len(), &page["next"]), (0, &Value::Null));
}

async fn a_store_is_told_from_a_table_and_from_what_is_noted_of_it(engine: Engine) {
    let world = gateway(engine).await;
    let store = unique("orders");
    let group = unique("billing");
    let mut topics = atomic_store::topics(&store, 2, Duration::from_secs(3600)).to_vec();
    topics.push(table::topic(format!("{group}.blocked"), 1));
    topics.push(TopicSpec::new(format!("{group}.control"), 1));
    make(&world.log, &topics).await;
    append(&world.log, &store, &[("order-1", Some(br#"{"paid":true}"#))]).await;
    let jobs = world.config.topics.jobs();
    let tables = until(&world, "/v1/admin/tables", |tables| !listed(tables, &store).is_null()).await;
    for (topic, kind, internal) in [
        (&store, "store", false),
        (&format!("{group}.blocked"), "blocked", true),
        (&jobs, "store", true),
    ] {
        let line = listed(&tables, topic);
        assert_eq!(
            (&line["kind"], &line["internal"]),
            (&json!(kind), &json!(internal)),
            "{topic}"
        );
    }
    let page = world.get(&format!("/v1/admin/tables/{store}")).await.json();
    assert_eq!(
        (keys(&page), &page["records"][0]["value"]),
        (vec!["order-1"], &json!(r#"{"paid":true}"#))
    );
}

async fn what_cannot_be_browsed_is_refused(engine: Engine) {
    let world = gateway(engine).await;
    let (topic, plain) = (unique("prices"), unique("plain"));
    make(&world.log, &[table::topic(&topic, 1), TopicSpec::new(&plain, 1)]).await;
    for (path, status, code) in [
        (plain, 404, "unknown-topic"),
        (unique("nothing"), 404, "unknown-topic"),
        (format!("{topic}?limit=0"), 400, "bad-query"),
        (format!("{topic}?limit=501"), 400, "bad-query"),
        (format!("{topic}?after=nonsense"), 400, "bad-query"),
        (format!("{topic}?suffix=a"), 400, "bad-query"),
    ] {
        let answer = world.get(&format!("/v1/admin/tables/{path}")).await;
        assert_eq!(
            (answer.status.as_u16(), answer.code().as_str()),
            (status, code),
            "{path}"
        );
    }
}

async fn schedules_that_were_set_aside_are_listed_by_themselves(engine: Engine) {
    let mut world = gateway(engine).await;
    let events = unique("events");
    make(&world.log, &[TopicSpec::new(&events, 1)]).await;
    world.config.events.topics = vec![OpenTopic::new(&events)];
    world.config.schedules.fire = false;
    world.address = world.another_gateway().await;
    for (id, after_s) in [("later", 3600), ("now", 0)] {
        let event = json!({ "topic": events, "type": "renewal.due", "data": {} });
        let schedule = json!({ "id": id, "after_s": after_s, "event": event }).to_string();
        let answer = http::post(world.address, "/v1/schedules", "application/json", schedule).await;
        assert_eq!(answer.expect("an answer").status, 202);
    }
    world.log.delete_topic(&events).await.expect("deleted");
    let refused = "/v1/schedules?refused=true";
    assert_eq!(world.get(refused).await.json()["schedules"], json!([]));
    let settings = SchedulerSettings::new(world.config.topics.schedules());
    let owner = tokio::spawn(schedule::run(world.log.clone(), settings, world.stopping.clone()));
    let page = until(&world, refused, |page| page["schedules"] != json!([])).await;
    let ids: Vec<_> = page["schedules"]
        .as_array()
        .expect("schedules")
        .iter()
        .map(|one| &one["id"])
        .collect();
    assert_eq!(ids, ["now"]);
    assert!(page["schedules"][0]["refused"].is_string() && page["schedules"][0]["due"].is_null());
    let all = until(&world, "/v1/schedules", |page| page["schedules"][1] != Value::Null).await;
    assert_eq!(
        (&all["schedules"][0]["id"], &all["schedules"][1]["id"]),
        (&json!("later"), &json!("now"))
    );
    world.stopping.cancel();
    owner.await.expect("no panic").expect("a good end");
}

/// Sums what it is told, and cannot bear some numbers until it is mended.
struct Sums {
    is_mended: Arc<AtomicBool>,
}

impl Aggregate for Sums {
    type State = i64;
    type Command = i64;

    fn apply(&self, _: &str, sum: &mut Option<i64>, number: i64) {
        assert!(
            number >= 0 || self.is_mended.load(Ordering::SeqCst),
            "no number below zero"
        );
        *sum = Some(sum.unwrap_or(0) + number);
    }

    fn derive(&self, _: &str, _: &mut i64, _: i64) -> Derived {
        Derived::default()
    }
}

/// The line of a topic on the list of dead letters; null: it is not there.
fn letters(listed: &Value, topic: &str) -> Value {
    let topics = listed["topics"].as_array().expect("topics");
    let found = topics.iter().find(|one| one["topic"] == topic);
    found.cloned().unwrap_or_default()
}

/// Waits until so many dead letters of a topic wait, of so many in all, and returns its line.
async fn waiting(world: &World, topic: &str, waiting: i64, records: i64) -> Value {
    let listed = until(world, "/v1/admin/dead-letters", |listed| {
        let line = letters(listed, topic);
        (&line["waiting"], &line["records"]) == (&json!(waiting), &json!(records))
    });
    letters(&listed.await, topic)
}

/// Does it with all dead letters of a topic.
async fn settle(world: &World, topic: &str, action: &str) -> http::Answer {
    let path = format!("/v1/admin/dead-letters/{topic}/{action}");
    let answer = http::post(world.address, &path, "application/json", r#"{"filter":""}"#).await;
    answer.expect("an answer")
}

/// What was done about what belongs to `group`.
async fn actions(world: &World, group: &str) -> Vec<Value> {
    let told = world.get(&format!("/v1/admin/groups/{group}/actions")).await.json();
    let told = told["actions"].as_array().expect("actions").clone();
    // Those of other tests are on the same Kafka.
    let all = world.get("/v1/admin/actions").await.json();
    let all = all["actions"].as_array().expect("actions");
    assert!(told.iter().all(|action| all.contains(action)), "{all:?}");
    told
}

async fn a_command_that_made_its_store_panic_is_redriven_to_it(engine: Engine) {
    let world = gateway(engine).await;
    let store = unique("sums");
    make(&world.log, &atomic_store::topics(&store, 2, Duration::from_secs(3600))).await;
    let is_mended = Arc::new(AtomicBool::new(false));
    let sums = Sums {
        is_mended: is_mended.clone(),
    };
    let settings = AtomicStoreSettings::new(&store);
    let owner = tokio::spawn(AtomicStore::run(
        world.log.clone(),
        settings,
        sums,
        world.stopping.clone(),
    ));
    let commands = atomic_store::commands_topic(&store);
    append(&world.log, &commands, &[("a", Some(b"5")), ("a", Some(b"-2"))]).await;
    let topic = atomic_store::dead_letters_topic(&store);
    let line = waiting(&world, &topic, 1, 1).await;
    assert_eq!(
        (&line["group"], &line["source"], &line["redrives"]),
        (&json!(store), &json!(commands), &json!(true))
    );
    let page = world.get(&format!("/v1/admin/dead-letters/{topic}")).await.json();
    assert_eq!((keys(&page), &page["records"][0]["value"]), (vec!["a"], &json!("-2")));

    is_mended.store(true, Ordering::SeqCst);
    assert_eq!(settle(&world, &topic, "redrive").await.json()["records"], 1);
    waiting(&world, &topic, 0, 1).await;
    let states = format!("/v1/admin/tables/{store}");
    until(&world, &states, |page| page["records"][0]["value"] == "3").await;
    let actions = actions(&world, &store).await;
    assert_eq!(
        (
            actions.len(),
            &actions[0]["action"],
            &actions[0]["topic"],
            &actions[0]["records"]
        ),
        (1, &json!("redrive"), &json!(topic), &json!(1))
    );
    world.stopping.cancel();
    owner.await.expect("no panic").expect("a good end");
}

async fn what_a_projection_could_not_project_is_seen_and_discarded(engine: Engine) {
    let world = gateway(engine).await;
    let (topic, group) = (unique("entries"), unique("view"));
    let folder = tempfile::TempDir::new().expect("a folder");
    let work = ProjectionWork {
        log: String::new(),
        database: folder.path().join("view.sqlite").display().to_string(),
        group: group.clone(),
        topic: topic.clone(),
        view: "entries".to_owned(),
        version: 1,
    };
    make(&world.log, &[TopicSpec::new(&topic, 2)]).await;
    make(&world.log, &work.settings().topics(&world.log).await.expect("topics")).await;
    let projection = Projection::start(&world.log, work.open_database(), work.settings(), work.projector());
    let projection = projection.await.expect("it starts");
    append(&world.log, &topic, &[("a", Some(b"nonsense"))]).await;
    let letters = dead_letter_topic(&topic, &group);
    let line = waiting(&world, &letters, 1, 1).await;
    assert_eq!((&line["group"], &line["redrives"]), (&json!(group), &json!(false)));

    let skip = json!({ "action": "skip", "topic": topic, "partition": 0, "offset": 0 }).to_string();
    let path = format!("/v1/admin/groups/{group}/commands");
    let refused = http::post(world.address, &path, "application/json", skip).await;
    assert_eq!(
        refused.expect("an answer").code(),
        "unknown-group",
        "it takes no commands"
    );

    let refused = settle(&world, &letters, "redrive").await;
    assert_eq!((refused.status.as_u16(), refused.code().as_str()), (409, "refused"));
    assert_eq!(settle(&world, &letters, "discard").await.json()["records"], 1);
    waiting(&world, &letters, 0, 1).await;
    let actions = actions(&world, &group).await;
    assert_eq!((actions.len(), &actions[0]["action"]), (1, &json!("discard")));
    projection.shutdown().await.expect("a good end");
}
