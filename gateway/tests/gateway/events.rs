//! Posting events.

use barnabas::log::{NextOffset, partition_for_key};
use barnabas::server::event::Event;
use barnabas::server::token::Token;

use super::support::Gateway;

const JSON: &[(&str, &str)] = &[("content-type", "application/json")];

#[tokio::test]
async fn posted_events_stand_on_the_channels_partition_in_their_order() {
    let gateway = Gateway::start().await;
    let body = r#"[{"type":"a","data":{"n":1}},{"type":"b","subject":"s"},{"type":"c","id":"7"}]"#;
    let answer = gateway.post("/v1/channels/tenant:1/events", JSON, body).await;
    assert_eq!((answer.status.as_u16(), answer.body.len()), (202, 0));
    let token: Token = answer
        .header("barnabas-token")
        .expect("a token")
        .parse()
        .expect("a token");
    assert_eq!(
        gateway
            .post("/v1/channels/tenant:1/events", JSON, r#"{"type":"d"}"#)
            .await
            .status,
        202
    );

    let notifications = gateway.records(&gateway.config.topics.notifications(), 4).await;
    let partition = partition_for_key(b"tenant:1", notifications.len() as i32) as usize;
    let events: Vec<Event> = notifications[partition]
        .iter()
        .map(|record| Event::from_record(record, String::new).expect("an event"))
        .collect();
    assert_eq!(token.position(partition as i32), Some(NextOffset(3)));
    let types: Vec<_> = events.iter().map(|event| event.event_type.as_str()).collect();
    assert_eq!(types, ["a", "b", "c", "d"]);
    assert_eq!(events[0].data.as_ref().map(|data| data.get()), Some(r#"{"n":1}"#));
    assert_eq!((events[1].subject.as_deref(), events[2].id.as_str()), (Some("s"), "7"));
    gateway.stop().await;
}

#[tokio::test]
async fn what_is_no_event_is_refused_and_nothing_is_written() {
    let gateway = Gateway::start().await;
    let too_large = format!(r#"{{"type":"t","data":"{}"}}"#, "x".repeat(256 * 1024));
    let cases: &[(&str, &[(&str, &str)], &str, (u16, &str))] = &[
        (
            "/v1/channels/c/events",
            JSON,
            r#"[{"type":"t"},{"typ":"t"}]"#,
            (400, "bad-event"),
        ),
        ("/v1/channels/c/events", JSON, "[]", (400, "no-event")),
        ("/v1/channels/c/events?x=1", JSON, r#"{"type":"t"}"#, (400, "bad-query")),
        (
            "/v1/channels/a%2Fb/events",
            JSON,
            r#"{"type":"t"}"#,
            (400, "bad-channel"),
        ),
        (
            "/v1/channels/c/events",
            &[("content-type", "text/plain")],
            "t",
            (415, "content-type"),
        ),
        ("/v1/channels/c/events", JSON, &too_large, (413, "body-too-large")),
    ];
    for (path, headers, body, (status, code)) in cases {
        let problem = gateway.post(path, headers, (*body).to_owned()).await.problem();
        assert_eq!(problem, (*status, (*code).to_owned(), None), "{path} {code}");
    }
    let notifications = gateway.records(&gateway.config.topics.notifications(), 0).await;
    assert!(notifications.iter().all(Vec::is_empty));
    gateway.stop().await;
}
