//! Repeating a request under its `Idempotency-Key`.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::json;

use super::support::{Answer, DEADLINE, Gateway};

const CSV: (&str, &str) = ("content-type", "text/csv");
const PATH: &str = "/v1/jobs/import-contacts?channel=c";

/// What must be the same in every answer to a request.
fn identity(answer: &Answer) -> (u16, String, String) {
    let header = |name| {
        answer
            .header(name)
            .unwrap_or_else(|| panic!("no {name}: {answer:?}"))
            .to_owned()
    };
    (answer.status.as_u16(), header("location"), header("barnabas-token"))
}

async fn post(gateway: &Gateway, key: &str, body: &str) -> Answer {
    let headers = [CSV, ("idempotency-key", key)];
    gateway.post(PATH, &headers, body.to_owned()).await
}

/// How many chunks and registrations are on the log, once there are `at_least` so many of each.
async fn counts(gateway: &Gateway, at_least: usize) -> (usize, usize) {
    let chunks = gateway.records(&gateway.job_topic("import-contacts"), at_least).await;
    let commands = gateway.records(&gateway.config.topics.job_commands(), at_least).await;
    let count = |records: Vec<Vec<_>>| records.iter().map(Vec::len).sum();
    (count(chunks), count(commands))
}

#[tokio::test]
async fn a_repeated_request_is_done_once_and_answered_the_same() {
    let gateway = Gateway::start().await;
    let first = post(&gateway, "a-key", "name\nAda\n").await;
    assert_eq!((first.status.as_u16(), first.body.len()), (202, 0));
    for key in ["a-key", "\"a-key\""] {
        let again = post(&gateway, key, "name\nAda\n").await;
        assert_eq!(identity(&again), identity(&first));
    }
    let headers = [CSV, ("idempotency-key", "a-key"), ("prefer", "return=representation")];
    let shown = gateway.post(PATH, &headers, "name\nAda\n").await;
    let (_, location, token) = identity(&first);
    let id = location.strip_prefix("/v1/jobs/").expect("a place");
    assert_eq!(shown.json(), json!({"id": id, "channel": "c", "token": token}));
    // Another key, and none, are other requests.
    let other = post(&gateway, "another", "name\nAda\n").await;
    let none = gateway.post(PATH, &[CSV], "name\nAda\n").await;
    let places: BTreeSet<String> = [&first, &other, &none]
        .map(|answer| identity(answer).1)
        .into_iter()
        .collect();
    assert_eq!(places.len(), 3);
    assert_eq!(counts(&gateway, 3).await, (3, 3));
    gateway.stop().await;
}

#[tokio::test]
async fn a_key_that_comes_with_another_request_is_refused() {
    let gateway = Gateway::start().await;
    assert_eq!(post(&gateway, "k", "name\nAda\n").await.status, 202);
    let key = ("idempotency-key", "k");
    let other_type = ("content-type", "application/csv");
    for (path, content_type, body) in [
        (PATH, CSV, "name\nBob\n"),
        ("/v1/jobs/import-contacts?channel=d", CSV, "name\nAda\n"),
        (PATH, other_type, "name\nAda\n"),
    ] {
        let refused = gateway.post(path, &[content_type, key], body).await;
        assert_eq!(refused.problem(), (422, "idempotency-key-reused".to_owned(), None));
    }
    assert_eq!(counts(&gateway, 1).await, (1, 1));
    gateway.stop().await;
}

#[tokio::test]
async fn a_key_that_is_none_is_refused() {
    let gateway = Gateway::start().await;
    let too_long = "x".repeat(256);
    for key in ["", "\"\"", "\"open", "two words", &too_long] {
        let refused = post(&gateway, key, "name\nAda\n").await;
        assert_eq!(
            refused.problem(),
            (400, "bad-idempotency-key".to_owned(), None),
            "{key}"
        );
    }
    let twice = [CSV, ("idempotency-key", "a"), ("idempotency-key", "a")];
    let refused = gateway.post(PATH, &twice, "name\nAda\n").await;
    assert_eq!(refused.problem().1, "bad-idempotency-key");
    assert_eq!(counts(&gateway, 0).await, (0, 0));
    gateway.stop().await;
}

#[tokio::test]
async fn duplicates_at_the_same_time_are_one_job() {
    let gateway = Gateway::start().await;
    for round in 0..5 {
        let (key, body) = (format!("key {round}"), format!("name\nnumber {round}\n"));
        let key = format!("\"{key}\"");
        let answers = join_all((0..20).map(|_| post(&gateway, &key, &body))).await;
        let identities: BTreeSet<_> = answers.iter().map(identity).collect();
        assert_eq!(identities.len(), 1, "{identities:?}");
        assert!(identities.iter().all(|(status, ..)| *status == 202));
    }
    assert_eq!(counts(&gateway, 5).await, (5, 5));
    gateway.stop().await;
}

#[tokio::test]
async fn of_different_requests_at_the_same_time_one_gets_the_key() {
    let gateway = Gateway::start().await;
    let bodies: Vec<String> = (0..20).map(|number| format!("name\nnumber {number}\n")).collect();
    let answers = join_all(bodies.iter().map(|body| post(&gateway, "k", body))).await;
    let (taken, refused): (Vec<_>, Vec<_>) = answers.iter().partition(|answer| answer.status == 202);
    assert_eq!(taken.len(), 1, "{answers:?}");
    for refused in refused {
        assert_eq!(refused.problem(), (422, "idempotency-key-reused".to_owned(), None));
    }
    assert_eq!(counts(&gateway, 1).await, (1, 1));
    gateway.stop().await;
}

#[tokio::test]
async fn a_refused_request_leaves_its_key_free() {
    let gateway = Gateway::start().await;
    assert_eq!(post(&gateway, "k", "").await.problem().1, "no-header");
    assert_eq!(post(&gateway, "k", "name\nAda\n").await.status, 202);
    assert_eq!(counts(&gateway, 1).await, (1, 1));
    gateway.stop().await;
}

#[tokio::test]
async fn a_request_that_the_log_refuses_leaves_its_key_free_and_harms_no_other() {
    let gateway = Gateway::start_with(|config| {
        let mut gone = config.jobs.types["import-contacts"].clone();
        gone.topic = "gone".to_owned();
        config.jobs.types.insert("gone".to_owned(), gone);
    })
    .await;
    let topic = gateway.job_topic("gone");
    gateway.log.delete_topic(&topic).await.expect("the topic");
    for _ in 0..2 {
        let requests = (0..10).map(|number| {
            let gateway = &gateway;
            async move {
                let job_type = ["import-contacts", "gone"][number % 2];
                let key = number.to_string();
                let headers = [CSV, ("idempotency-key", key.as_str())];
                let path = format!("/v1/jobs/{job_type}?channel=c");
                gateway.post(&path, &headers, "name\nAda\n").await.status.as_u16()
            }
        });
        assert_eq!(join_all(requests).await, [202, 500].repeat(5));
    }
    assert_eq!(counts(&gateway, 5).await, (5, 5));
    gateway.stop().await;
}

#[tokio::test]
async fn a_large_request_is_done_once() {
    let gateway = Gateway::start().await;
    let mut body = String::from("name,email\n");
    for row in 0..60_000 {
        body += &format!("Person {row},p{row}@example.org\n");
    }
    let answers = join_all((0..3).map(|_| post(&gateway, "large", &body))).await;
    let identities: BTreeSet<_> = answers.iter().map(identity).collect();
    assert_eq!(identities.len(), 1, "{identities:?}");
    let chunks = gateway.records(&gateway.job_topic("import-contacts"), 120).await;
    assert_eq!(chunks.iter().map(Vec::len).sum::<usize>(), 120);
    gateway.stop().await;
}

#[tokio::test]
async fn a_key_is_free_again_when_its_time_has_passed() {
    let retention = Duration::from_secs(2);
    let gateway = Gateway::start_with(|config| config.idempotency.retention = retention).await;
    let began = std::time::Instant::now();
    let first = identity(&post(&gateway, "k", "name\nAda\n").await);
    let another = async {
        loop {
            let again = identity(&post(&gateway, "k", "name\nAda\n").await);
            if again != first {
                return again;
            }
        }
    };
    let another = tokio::time::timeout(DEADLINE, another)
        .await
        .expect("a free key in time");
    assert!(began.elapsed() >= retention, "it was free after {:?}", began.elapsed());
    assert_eq!(another.0, 202);
    // For another request too.
    let free = async { while post(&gateway, "k", "name\nBob\n").await.status != 202 {} };
    tokio::time::timeout(DEADLINE, free).await.expect("a free key in time");
    assert_eq!(counts(&gateway, 3).await, (3, 3));
    gateway.stop().await;
}
