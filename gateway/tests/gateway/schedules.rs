//! Posting events for later.

use std::time::Duration;

use barnabas::log::TopicSpec;
use barnabas::patterns::schedule::{self, SchedulerSettings};
use barnabas::patterns::table;
use barnabas::server::config::OpenTopic;
use http::Method;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::support::{DEADLINE, Gateway};

const JSON: (&str, &str) = ("content-type", "application/json");

/// Bytes of a record that the topic takes.
const MAX_EVENT_BYTES: usize = 4000;

/// A gateway with a topic that is open for posting, and the topic's name.
async fn gateway_with_topic() -> (Gateway, String) {
    let topic = format!("renewals-{}", uuid::Uuid::now_v7().simple());
    let open = topic.clone();
    let spec = TopicSpec {
        max_message_bytes: MAX_EVENT_BYTES,
        ..TopicSpec::new(&topic, 2)
    };
    let gateway = Gateway::start_on_topics(&[spec], |config| config.events.topics = vec![OpenTopic::new(open)]).await;
    (gateway, topic)
}

/// Asks for a path until the answer is as wanted.
async fn until(gateway: &Gateway, path: &str, is_so: impl Fn(&super::support::Answer) -> bool) {
    let asking = async {
        while !is_so(&gateway.get(path, &[]).await) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, asking)
        .await
        .unwrap_or_else(|_| panic!("{path} is not as wanted in time"));
}

#[tokio::test]
async fn a_scheduled_event_is_a_record_of_its_topic_when_it_is_due() {
    let (gateway, topic) = gateway_with_topic().await;
    let event = json!({"topic": topic, "type": "renewal.due", "partitionkey": "ada", "data": {"month": 1}});
    let past = json!({"at": "2026-01-01T00:00:00+01:00", "event": event}).to_string();
    let answer = gateway.post("/v1/schedules", &[JSON], past).await;
    assert_eq!(answer.status, 202, "{answer:?}");
    let shown = answer.json();
    assert_eq!(shown["due"], "2025-12-31T23:00:00.000Z");
    let id = shown["id"].as_str().expect("an id");
    assert_eq!(answer.header("location"), Some(format!("/v1/schedules/{id}").as_str()));
    let soon = json!({"id": "soon", "after_s": 1, "event": event}).to_string();
    assert_eq!(gateway.post("/v1/schedules", &[JSON], soon).await.status, 202);
    let records = gateway.records(&topic, 2).await;
    let records: Vec<_> = records.iter().flatten().collect();
    assert_eq!(records.len(), 2);
    for (record, id) in records.iter().zip([id, "soon"]) {
        assert_eq!(record.key.as_deref(), Some(&b"ada"[..]));
        assert_eq!(record.value.as_deref(), Some(&br#"{"month":1}"#[..]));
        assert_eq!(record.headers.last_str("ce_type"), Some("renewal.due"));
        assert_eq!(record.headers.last_str("bn-schedule-id"), Some(id));
        let due_ms: i64 = record
            .headers
            .last_str("bn-due-ms")
            .expect("a due time")
            .parse()
            .expect("a number");
        assert!(record.timestamp_ms >= due_ms);
    }
    assert_eq!(records[0].headers.last_str("ce_time"), Some("2025-12-31T23:00:00.000Z"));
    until(&gateway, "/v1/schedules/soon", |answer| answer.status == 404).await;
    gateway.stop().await;
}

#[tokio::test]
async fn schedules_are_shown_listed_and_cancelled() {
    let (gateway, topic) = gateway_with_topic().await;
    let event = json!({"topic": topic, "type": "renewal.due", "data": [1]});
    for (id, when) in [
        ("c", json!({"at": "2200-01-03T00:00:00Z"})),
        ("a/ä", json!({"cron": "0 9 1 1 *", "time_zone": "Europe/Berlin"})),
        ("b", json!({"at": "2200-01-02T00:00:00Z"})),
    ] {
        let mut schedule = when;
        schedule["id"] = id.into();
        schedule["event"] = event.clone();
        let answer = gateway.post("/v1/schedules", &[JSON], schedule.to_string()).await;
        assert_eq!(answer.status, 202, "{answer:?}");
    }
    until(&gateway, "/v1/schedules", |answer| {
        answer.json()["schedules"].as_array().map(Vec::len) == Some(3)
    })
    .await;
    let first = gateway.get("/v1/schedules?limit=2", &[]).await.json();
    assert_eq!(
        (&first["schedules"][0]["id"], &first["schedules"][1]["id"]),
        (&"a/ä".into(), &"b".into())
    );
    let next = first["next"].as_str().expect("there is more");
    let second = gateway
        .get(&format!("/v1/schedules?limit=2&after={next}"), &[])
        .await
        .json();
    assert_eq!(
        (&second["schedules"][0]["id"], &second["next"]),
        (&"c".into(), &serde_json::Value::Null)
    );
    let shown = gateway.get("/v1/schedules/a%2F%C3%A4", &[]).await.json();
    assert_eq!(
        (&shown["cron"], &shown["time_zone"]),
        (&"0 9 1 1 *".into(), &"Europe/Berlin".into())
    );
    assert_eq!(shown["event"], event);
    assert!(
        shown["due"]
            .as_str()
            .is_some_and(|due| due.ends_with("-01-01T08:00:00.000Z")),
        "{shown}"
    );
    let cancelled = gateway.send(Method::DELETE, "/v1/schedules/b", &[], "").await;
    assert_eq!((cancelled.status.as_u16(), cancelled.body.len()), (202, 0));
    until(&gateway, "/v1/schedules/b", |answer| answer.status == 404).await;
    assert_eq!(
        gateway.get("/v1/schedules/b", &[]).await.problem().1,
        "unknown-schedule"
    );
    gateway.stop().await;
}

#[tokio::test]
async fn what_is_wrong_with_a_schedule_is_named() {
    let (gateway, topic) = gateway_with_topic().await;
    let good = json!({"topic": topic, "type": "t"});
    let notifications = gateway.config.topics.notifications();
    let large = json!({"topic": topic, "type": "t", "data": "x".repeat(MAX_EVENT_BYTES)});
    let long_id = "i".repeat(256);
    for (schedule, expected, named) in [
        (json!({"event": good}), (400, "bad-when"), "at, after_s"),
        (
            json!({"after_s": 1, "cron": "* * * * *", "event": good}),
            (400, "bad-when"),
            "one of",
        ),
        (
            json!({"after_s": 1, "time_zone": "UTC", "event": good}),
            (400, "bad-when"),
            "time_zone",
        ),
        (
            json!({"at": "2026-13-01T00:00:00Z", "event": good}),
            (400, "bad-time"),
            "at must be",
        ),
        (
            json!({"at": "2026-01-01T00:00:00", "event": good}),
            (400, "bad-time"),
            "offset",
        ),
        (
            json!({"after_s": u64::MAX, "event": good}),
            (400, "bad-time"),
            "after_s",
        ),
        (json!({"after_s": -1, "event": good}), (400, "bad-schedule"), "-1"),
        (
            json!({"cron": "61 * * * *", "event": good}),
            (400, "bad-cron"),
            "61 * * * *",
        ),
        (
            json!({"cron": "0 0 30 2 *", "event": good}),
            (400, "bad-cron"),
            "0 0 30 2 *",
        ),
        (
            json!({"cron": "0 0 * * *", "time_zone": "Europe/Nowhere", "event": good}),
            (400, "unknown-time-zone"),
            "Europe/Nowhere",
        ),
        (json!({"after_s": 1, "id": "", "event": good}), (400, "bad-id"), "id"),
        (
            json!({"after_s": 1, "id": long_id, "event": good}),
            (400, "bad-id"),
            "id",
        ),
        (
            json!({"after_s": 1, "event": {"topic": "elsewhere", "type": "t"}}),
            (404, "unknown-topic"),
            "elsewhere",
        ),
        (
            json!({"after_s": 1, "event": {"topic": notifications, "type": "t"}}),
            (404, "unknown-topic"),
            "open",
        ),
        (
            json!({"after_s": 1, "event": {"topic": topic, "type": ""}}),
            (400, "bad-event"),
            "type",
        ),
        (
            json!({"after_s": 1, "event": {"topic": topic, "type": "t", "key": "k"}}),
            (400, "bad-schedule"),
            "key",
        ),
        (json!({"after": 1, "event": good}), (400, "bad-schedule"), "after"),
        (json!({"after_s": 1}), (400, "bad-schedule"), "event"),
        (json!([]), (400, "bad-schedule"), ""),
        (json!({"after_s": 1, "event": large}), (413, "event-too-large"), "4000"),
    ] {
        let answer = gateway.post("/v1/schedules", &[JSON], schedule.to_string()).await;
        let (status, code, _) = answer.problem();
        assert_eq!((status, code.as_str()), expected, "{schedule}");
        let detail = answer.json()["detail"].as_str().unwrap_or_default().to_owned();
        assert!(detail.contains(named), "{detail:?} names {named:?}");
    }
    let body = json!({"after_s": 1, "event": good}).to_string();
    for (headers, expected) in [
        (vec![("content-type", "text/plain")], (415, "content-type")),
        (
            vec![("content-type", "application/cloudevents+json")],
            (415, "content-type"),
        ),
        (vec![JSON, ("idempotency-key", "k")], (400, "bad-idempotency-key")),
    ] {
        let (status, code, _) = gateway.post("/v1/schedules", &headers, body.clone()).await.problem();
        assert_eq!((status, code.as_str()), expected);
    }
    for query in ["limit=0", "limit=1001", "limit=x", "after=%21", "order=due"] {
        let (status, code, _) = gateway.get(&format!("/v1/schedules?{query}"), &[]).await.problem();
        assert_eq!((status, code.as_str()), (400, "bad-query"), "{query}");
    }
    let commands = format!("{}.commands", gateway.config.topics.schedules());
    assert_eq!(
        gateway.records(&commands, 0).await.iter().flatten().count(),
        0,
        "nothing of it was taken"
    );
    gateway.stop().await;
}

#[tokio::test]
async fn an_event_without_a_key_is_refused_for_a_compacted_topic() {
    let topic = format!("accounts-{}", uuid::Uuid::now_v7().simple());
    let open = OpenTopic::new(topic.clone());
    let gateway =
        Gateway::start_on_topics(&[table::topic(&topic, 1)], |config| config.events.topics = vec![open]).await;
    let keyless = json!({"after_s": 3600, "event": {"topic": topic, "type": "t"}});
    let answer = gateway.post("/v1/schedules", &[JSON], keyless.to_string()).await;
    let (status, code, _) = answer.problem();
    assert_eq!((status, code.as_str()), (400, "bad-event"));
    let detail = answer.json()["detail"].as_str().unwrap_or_default().to_owned();
    assert!(detail.contains(&topic) && detail.contains("partitionkey"), "{detail}");
    let keyed = json!({"after_s": 3600, "event": {"topic": topic, "type": "t", "partitionkey": "ada"}});
    let answer = gateway.post("/v1/schedules", &[JSON], keyed.to_string()).await;
    assert_eq!(answer.status, 202, "{answer:?}");
    gateway.stop().await;
}

#[tokio::test]
async fn without_a_topic_that_is_open_there_is_nothing_to_schedule() {
    let gateway = Gateway::start().await;
    assert_eq!(gateway.get("/v1/schedules", &[]).await.problem().1, "no-schedules");
    assert!(
        gateway
            .log
            .describe_topic(&gateway.config.topics.schedules())
            .await
            .is_err(),
        "no topic is made for it"
    );
    gateway.stop().await;
}

#[tokio::test]
async fn a_node_that_does_not_fire_leaves_schedules_to_others() {
    let topic = format!("renewals-{}", uuid::Uuid::now_v7().simple());
    let open = topic.clone();
    let gateway = Gateway::start_on_topics(&[TopicSpec::new(&topic, 1)], |config| {
        config.events.topics = vec![OpenTopic::new(open)];
        config.schedules.fire = false;
    })
    .await;
    let schedule = json!({"after_s": 0, "event": {"topic": topic, "type": "t"}}).to_string();
    assert_eq!(gateway.post("/v1/schedules", &[JSON], schedule).await.status, 202);
    let name = gateway.config.topics.schedules();
    let stopping = CancellationToken::new();
    let other = schedule::run(gateway.log.clone(), SchedulerSettings::new(&name), stopping.clone());
    let other = tokio::spawn(other);
    assert_eq!(gateway.records(&topic, 1).await.iter().flatten().count(), 1);
    let groups = gateway.log.groups().await.expect("groups");
    let owners = groups.iter().find(|group| group.group == name).expect("it has owners");
    assert_eq!(owners.members.len(), 1, "{owners:?}");
    stopping.cancel();
    other.await.expect("no panic").expect("a clean end");
    gateway.stop().await;
}
