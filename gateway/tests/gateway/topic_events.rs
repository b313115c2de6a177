//! Posting events to topics.

use barnabas::log::{CleanupPolicy, Record, TopicSpec, partition_for_key};
use barnabas::server::Server;
use barnabas::server::config::OpenTopic;

use super::support::Gateway;

const JSON: (&str, &str) = ("content-type", "application/json");

/// Bytes of a record that the topic takes.
const MAX_EVENT_BYTES: usize = 2000;

/// A gateway with a topic that is open for posting, and the topic's name.
async fn gateway_with_topic() -> (Gateway, String) {
    let topic = format!("orders-{}", uuid::Uuid::now_v7().simple());
    let open = topic.clone();
    let spec = TopicSpec {
        max_message_bytes: MAX_EVENT_BYTES,
        ..TopicSpec::new(&topic, 4)
    };
    let gateway = Gateway::start_on_topics(&[spec], |config| config.events.topics = vec![OpenTopic::new(open)]).await;
    (gateway, topic)
}

fn text<'a>(record: &'a Record, header: &str) -> &'a str {
    record.headers.last_str(header).unwrap_or_else(|| panic!("no {header}"))
}

#[tokio::test]
async fn posted_events_are_records_with_the_key_that_they_name() {
    let (gateway, topic) = gateway_with_topic().await;
    let path = format!("/v1/topics/{topic}/events");
    let body = r#"[{"type":"placed","partitionkey":"user-1","id":"1","data":{"n":1}},{"type":"paid","partitionkey":"user-1"}]"#;
    let answer = gateway.post(&path, &[JSON], body).await;
    assert_eq!((answer.status.as_u16(), answer.body.len()), (202, 0));
    let cloud_event =
        r#"{"specversion":"1.0","id":"3","source":"/x","type":"sent","partitionkey":"user-1","data":[3]}"#;
    let structured = [("content-type", "application/cloudevents+json")];
    assert_eq!(gateway.post(&path, &structured, cloud_event).await.status, 202);
    let binary = [
        JSON,
        ("ce-specversion", "1.0"),
        ("ce-id", "4"),
        ("ce-source", "/x"),
        ("ce-type", "seen"),
    ];
    assert_eq!(gateway.post(&path, &binary, "4").await.status, 202);

    let records = gateway.records(&topic, 4).await;
    let partition = partition_for_key(b"user-1", 4) as usize;
    let of_user: Vec<&Record> = records[partition]
        .iter()
        .filter(|record| record.key.as_deref() == Some(b"user-1"))
        .collect();
    let types: Vec<&str> = of_user.iter().map(|record| text(record, "ce_type")).collect();
    assert_eq!(types, ["placed", "paid", "sent"]);
    assert_eq!(of_user[0].value.as_deref(), Some(&br#"{"n":1}"#[..]));
    assert_eq!(text(of_user[0], "ce_id"), "1");
    assert_eq!(of_user[2].value.as_deref(), Some(&b"[3]"[..]));
    let mut all = records.iter().flatten();
    let keyless = all.find(|record| record.key.is_none()).expect("the fourth");
    assert_eq!(
        (text(keyless, "ce_type"), keyless.value.as_deref()),
        ("seen", Some(&b"4"[..]))
    );
    gateway.stop().await;
}

#[tokio::test]
async fn events_with_a_key_are_written_once() {
    let (gateway, topic) = gateway_with_topic().await;
    let path = format!("/v1/topics/{topic}/events");
    let headers = [JSON, ("idempotency-key", "k")];
    let body = r#"[{"type":"a","partitionkey":"1"},{"type":"b","partitionkey":"2"}]"#;
    let posts = futures_util::future::join_all((0..10).map(|_| gateway.post(&path, &headers, body))).await;
    assert!(posts.iter().all(|answer| answer.status == 202), "{posts:?}");
    let other = gateway.post(&path, &headers, r#"{"type":"a"}"#).await;
    assert_eq!(other.problem().1, "idempotency-key-reused");
    // What is refused leaves its key free.
    let headers = [JSON, ("idempotency-key", "large")];
    let large = format!(r#"{{"type":"c","data":"{}"}}"#, "x".repeat(MAX_EVENT_BYTES));
    let refused = gateway.post(&path, &headers, large).await;
    assert_eq!(refused.problem(), (413, "event-too-large".to_owned(), None));
    let small = gateway.post(&path, &headers, r#"{"type":"c"}"#).await;
    assert_eq!(small.status, 202);
    assert_eq!(gateway.records(&topic, 3).await.iter().flatten().count(), 3);
    gateway.stop().await;
}

#[tokio::test]
async fn cloud_events_under_one_key_are_the_same_when_their_headers_are() {
    let (gateway, topic) = gateway_with_topic().await;
    let path = format!("/v1/topics/{topic}/events");
    let post = async |id: &str, event_type: &str| {
        let headers = [
            JSON,
            ("idempotency-key", "k"),
            ("ce-specversion", "1.0"),
            ("ce-id", id),
            ("ce-source", "/x"),
            ("ce-type", event_type),
        ];
        gateway.post(&path, &headers, "{}").await
    };
    for _ in 0..2 {
        assert_eq!(post("1", "placed").await.status, 202);
    }
    for (id, event_type) in [("2", "placed"), ("1", "cancelled")] {
        let other = post(id, event_type).await;
        assert_eq!(other.problem(), (422, "idempotency-key-reused".to_owned(), None));
    }
    assert_eq!(gateway.records(&topic, 1).await.iter().flatten().count(), 1);
    gateway.stop().await;
}

#[tokio::test]
async fn of_events_of_which_one_is_not_taken_none_is_written() {
    let (open, compacted) = ("events".to_owned(), "states".to_owned());
    let specs = [
        TopicSpec {
            max_message_bytes: MAX_EVENT_BYTES,
            ..TopicSpec::new(&open, 1)
        },
        TopicSpec {
            cleanup: CleanupPolicy::Compact,
            ..TopicSpec::new(&compacted, 1)
        },
    ];
    let topics = [&open, &compacted].map(OpenTopic::new).to_vec();
    let gateway = Gateway::start_on_topics(&specs, |config| config.events.topics = topics).await;
    let large = format!(
        r#"[{{"type":"a"}},{{"type":"b","data":"{}"}}]"#,
        "x".repeat(MAX_EVENT_BYTES)
    );
    let keyless = r#"[{"type":"a","partitionkey":"p"},{"type":"b"}]"#.to_owned();
    for (topic, body, expected) in [
        (&open, large, (413, "event-too-large")),
        (&compacted, keyless, (400, "bad-event")),
    ] {
        let path = format!("/v1/topics/{topic}/events");
        for key in [None, Some(("idempotency-key", "k"))] {
            let headers: Vec<_> = [JSON].into_iter().chain(key).collect();
            let (status, code, _) = gateway.post(&path, &headers, body.clone()).await.problem();
            assert_eq!((status, code.as_str()), expected, "{topic}");
        }
        let good = r#"{"type":"c","partitionkey":"p"}"#;
        assert_eq!(gateway.post(&path, &[JSON], good).await.status, 202);
        let records = gateway.records(topic, 1).await;
        let types: Vec<&str> = records.iter().flatten().map(|record| text(record, "ce_type")).collect();
        assert_eq!(types, ["c"], "{topic}");
    }
    gateway.stop().await;
}

#[tokio::test]
async fn what_is_no_event_or_no_open_topic_is_refused() {
    let (gateway, topic) = gateway_with_topic().await;
    let path = format!("/v1/topics/{topic}/events");
    let notifications = format!("/v1/topics/{}/events", gateway.config.topics.notifications());
    let query = format!("{path}?channel=c");
    for (path, content_type, body, expected) in [
        (
            "/v1/topics/other/events",
            "application/json",
            r#"{"type":"t"}"#,
            (404, "unknown-topic"),
        ),
        (
            &notifications,
            "application/json",
            r#"{"type":"t"}"#,
            (404, "unknown-topic"),
        ),
        (&query, "application/json", r#"{"type":"t"}"#, (400, "bad-query")),
        (
            &path,
            "application/json",
            r#"{"type":"t","key":"k"}"#,
            (400, "bad-event"),
        ),
        (
            &path,
            "application/json",
            r#"{"type":"t","partitionkey":""}"#,
            (400, "bad-event"),
        ),
        (&path, "application/json", "[]", (400, "no-event")),
        (&path, "text/html", r#"{"type":"t"}"#, (415, "content-type")),
        (&path, "text/plain;charset=latin1", r#"{"type":"t"}"#, (415, "charset")),
        (&path, "application/x-ndjson", "\n \n", (400, "no-event")),
    ] {
        for key in [None, Some(("idempotency-key", "k"))] {
            let headers: Vec<_> = [("content-type", content_type)].into_iter().chain(key).collect();
            let (status, code, _) = gateway.post(path, &headers, body.to_owned()).await.problem();
            assert_eq!((status, code.as_str()), expected, "{path} {body}");
        }
    }
    assert_eq!(gateway.records(&topic, 0).await.iter().flatten().count(), 0);
    gateway.stop().await;
}

#[tokio::test]
async fn a_topic_that_does_not_exist_is_said_at_the_start() {
    let gateway = Gateway::start().await;
    let mut config = gateway.config.clone();
    let folder = tempfile::tempdir().expect("a folder");
    config.data.dir = folder.path().to_owned();
    config.events.topics = vec![OpenTopic::new("nowhere")];
    let refused = Server::start(config, gateway.log.clone(), gateway.stopping.clone()).await;
    assert_eq!(
        refused.expect_err("an error").to_string(),
        "topic nowhere does not exist"
    );
    gateway.stop().await;
}

#[tokio::test]
async fn events_on_lines_are_taken_in_order_as_browsers_send_them() {
    let (gateway, topic) = gateway_with_topic().await;
    let path = format!("/v1/topics/{topic}/events");
    let host = gateway.address.to_string();
    let origin = format!("http://{host}");
    let body =
        "{\"type\":\"a\",\"partitionkey\":\"p\",\"data\":{\"n\":1}}\r\n\n{\"type\":\"b\",\"partitionkey\":\"p\"}";
    for content_type in ["application/x-ndjson", "text/plain;charset=UTF-8", "text/plain"] {
        let headers = [("content-type", content_type), ("host", &host), ("origin", &origin)];
        let answer = gateway.post(&path, &headers, body).await;
        assert_eq!((answer.status.as_u16(), answer.body.len()), (202, 0), "{content_type}");
    }
    let records = gateway.records(&topic, 6).await;
    let types: Vec<&str> = records.iter().flatten().map(|record| text(record, "ce_type")).collect();
    assert_eq!(types, ["a", "b", "a", "b", "a", "b"]);
    gateway.stop().await;
}

#[tokio::test]
async fn a_line_that_is_no_event_is_named_and_none_is_taken() {
    let (gateway, topic) = gateway_with_topic().await;
    let path = format!("/v1/topics/{topic}/events");
    for (bad, line) in [
        ("{\"type\":\"a\"}\n{\"type\":\"b\"}\n\n{", 4),
        ("{\"type\":\"a\"} {\"type\":\"b\"}", 1),
        ("{\"type\":\"a\"}\n{\"typ\":\"b\"}\n{\"type\":\"c\"}", 2),
        ("{\"type\":\"a\"}\n{\"type\":\"\"}", 2),
        ("{\"type\":\"a\"}\n\u{fffd}", 2),
    ] {
        let answer = gateway.post(&path, &[("content-type", "text/plain")], bad).await;
        assert_eq!(answer.problem(), (400, "bad-event".to_owned(), Some(line)), "{bad}");
    }
    assert_eq!(gateway.records(&topic, 0).await.iter().flatten().count(), 0);
    gateway.stop().await;
}

#[tokio::test]
async fn what_a_beacon_of_a_foreign_page_sends_is_refused() {
    let (gateway, topic) = gateway_with_topic().await;
    let path = format!("/v1/topics/{topic}/events");
    // Text needs no preflight: the browser sends it, and only its origin tells.
    for origin in ["http://evil.example", "null"] {
        let headers = [("content-type", "text/plain;charset=UTF-8"), ("origin", origin)];
        let answer = gateway.post(&path, &headers, "{\"type\":\"a\"}").await;
        assert_eq!(answer.problem(), (403, "origin-not-allowed".to_owned(), None));
    }
    assert_eq!(gateway.records(&topic, 0).await.iter().flatten().count(), 0);
    gateway.stop().await;
}
