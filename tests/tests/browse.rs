//! What operators see of tables, atomic stores and schedules over HTTP, on both logs.

use barnabas::log::{Log, ProducerRecord, ProducerSettings, TopicSpec};
use barnabas::patterns::schedule::{self, SchedulerSettings};
use barnabas::patterns::{atomic_store, table};
use barnabas::server::config::OpenTopic;
use barnabas_tests::conformance::{unique, within};
use barnabas_tests::http::post;
use barnabas_tests::kafka::brokers;
use barnabas_tests::on_both_logs;
use barnabas_tests::site::Engine;
use barnabas_tests::world::World;
use serde_json::{Value, json};

on_both_logs!(
    a_table_is_listed_and_shows_the_last_value_of_each_key,
    pages_of_a_table_are_turned_and_keys_are_found_by_how_they_begin,
    a_store_is_told_from_a_table_and_from_what_is_noted_of_it,
    what_cannot_be_browsed_is_refused,
    schedules_that_were_set_aside_are_listed_by_themselves,
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
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
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
    let mut topics = atomic_store::topics(&store, 2, std::time::Duration::from_secs(3600)).to_vec();
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
        let answer = post(world.address, "/v1/schedules", "application/json", schedule).await;
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
