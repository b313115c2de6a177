//! Posting jobs.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use barnabas::log::{NextOffset, ProducerSettings, Record, partition_for_key};
use barnabas::server::Config;
use barnabas::server::config::{BodyFormat, JobTypeConfig};
use barnabas::server::job_store::{JobCommand, command_record};
use barnabas::server::token::Token;
use futures_util::future::join_all;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::support::{DEADLINE, Gateway};

const CSV: &[(&str, &str)] = &[("content-type", "text/csv; charset=utf-8")];
const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

fn contacts(rows: usize) -> String {
    let mut body = String::from("name,email\n");
    for row in 0..rows {
        body += &format!("Person {row},p{row}@example.org\n");
    }
    body
}

/// The chunk records of a job type in the order of their jobs and indices.
async fn chunks(gateway: &Gateway, job_type: &str, at_least: usize) -> Vec<Record> {
    let topic = gateway.job_topic(job_type);
    let mut chunks: Vec<Record> = gateway.records(&topic, at_least).await.into_iter().flatten().collect();
    chunks.sort_by_key(|chunk| {
        let index: usize = header(chunk, "bn-chunk").parse().expect("an index");
        (header(chunk, "bn-job").to_owned(), index)
    });
    chunks
}

async fn registrations(gateway: &Gateway, at_least: usize) -> Vec<(String, serde_json::Value)> {
    let commands = gateway.records(&gateway.config.topics.job_commands(), at_least).await;
    let mut registrations = Vec::new();
    for command in commands.into_iter().flatten() {
        let value: serde_json::Value = serde_json::from_slice(&command.value.expect("a command")).expect("JSON");
        if value["command"] == "register" {
            let job = String::from_utf8(command.key.expect("a key").to_vec()).expect("a job id");
            registrations.push((job, value));
        }
    }
    registrations
}

#[track_caller]
fn header<'a>(record: &'a Record, name: &str) -> &'a str {
    record.headers.last_str(name).unwrap_or_else(|| panic!("no {name}"))
}

fn value(record: &Record) -> &str {
    std::str::from_utf8(record.value.as_ref().expect("a value")).expect("UTF-8")
}

#[tokio::test]
async fn a_file_becomes_chunks_and_one_registration() {
    let gateway = Gateway::start().await;
    let body = contacts(1201);
    let headers = [CSV[0], ("traceparent", TRACEPARENT)];
    let answer = gateway
        .post("/v1/jobs/import-contacts?channel=c", &headers, body.clone())
        .await;
    assert_eq!((answer.status.as_u16(), answer.body.len()), (202, 0));
    let job = answer
        .header("location")
        .and_then(|l| l.strip_prefix("/v1/jobs/"))
        .expect("a place")
        .to_owned();

    let chunks = chunks(&gateway, "import-contacts", 3).await;
    let mut rows = String::from("name,email\n");
    for (index, (chunk, (first_line, row_count))) in chunks.iter().zip([(2, 500), (502, 500), (1002, 201)]).enumerate()
    {
        assert_eq!(header(chunk, "bn-job"), job);
        assert_eq!(header(chunk, "bn-job-type"), "import-contacts");
        assert_eq!(header(chunk, "bn-chunk"), index.to_string());
        assert_eq!(header(chunk, "bn-chunks"), "3");
        assert_eq!(header(chunk, "bn-first-line"), first_line.to_string());
        assert_eq!(header(chunk, "bn-rows"), row_count.to_string());
        assert_eq!(header(chunk, "bn-channel"), "c");
        assert_eq!(header(chunk, "traceparent"), TRACEPARENT);
        assert_eq!(header(chunk, "content-type"), "text/csv; charset=utf-8");
        assert_eq!(chunk.key, None);
        rows += value(chunk).strip_prefix("name,email\n").expect("the header line");
    }
    assert_eq!(chunks.len(), 3);
    assert_eq!(rows, body);

    let registrations = registrations(&gateway, 1).await;
    let (registered, register) = &registrations[0];
    assert_eq!((registrations.len(), registered), (1, &job));
    assert!(
        register["submitted_ms"]
            .as_i64()
            .is_some_and(|ms| ms > 1_700_000_000_000)
    );
    for (field, expected) in [
        ("job_type", json!("import-contacts")),
        ("channel", json!("c")),
        ("chunks", json!(3)),
        ("rows", json!(1201)),
        ("traceparent", json!(TRACEPARENT)),
    ] {
        assert_eq!(register[field], expected, "{field}");
    }
    gateway.stop().await;
}

#[tokio::test]
async fn a_client_that_prefers_it_gets_the_job_in_the_answer() {
    let gateway = Gateway::start().await;
    let headers = [CSV[0], ("prefer", "respond-async, return=representation")];
    let answer = gateway
        .post("/v1/jobs/import-contacts?channel=c", &headers, contacts(1))
        .await;
    let job = answer.json();
    assert_eq!(
        answer.header("location"),
        Some(&*format!("/v1/jobs/{}", job["id"].as_str().expect("an id")))
    );
    assert_eq!(job["channel"], "c");
    assert!(answer.header("barnabas-token").is_some());
    assert_eq!(job["token"].as_str(), answer.header("barnabas-token"));
    gateway.stop().await;
}

#[tokio::test]
async fn the_token_of_a_job_stands_before_all_its_events_and_behind_all_others() {
    let gateway = Gateway::start().await;
    let json = [("content-type", "application/json")];
    let event = gateway.post("/v1/channels/c/events", &json, r#"{"type":"t"}"#).await;
    let job = gateway
        .post("/v1/jobs/import-contacts?channel=c", CSV, contacts(1))
        .await;
    // The job's `job.accepted` comes behind it.
    let notifications = gateway.config.topics.notifications();
    gateway.records(&notifications, 2).await;
    assert!(event.header("barnabas-token").is_some());
    assert_eq!(job.header("barnabas-token"), event.header("barnabas-token"));
    let id = gateway.log.describe_topic(&notifications).await.expect("the topic").id;
    let token: Token = job.header("barnabas-token").expect("a token").parse().expect("a token");
    let partition = partition_for_key(b"c", gateway.config.topics.partitions);
    assert!(token.is_of(id));
    assert_eq!(token.positions().collect::<Vec<_>>(), [(partition, NextOffset(1))]);
    gateway.stop().await;
}

#[tokio::test]
async fn a_header_alone_is_a_job_without_chunks() {
    let gateway = Gateway::start().await;
    let answer = gateway
        .post("/v1/jobs/import-contacts?channel=c", CSV, "name,email\r\n")
        .await;
    assert_eq!(answer.status, 202);
    let registrations = registrations(&gateway, 1).await;
    assert_eq!(
        (&registrations[0].1["chunks"], &registrations[0].1["rows"]),
        (&json!(0), &json!(0))
    );
    assert!(chunks(&gateway, "import-contacts", 0).await.is_empty());
    gateway.stop().await;
}

#[tokio::test]
async fn another_job_type_is_a_matter_of_settings() {
    let settings = tempfile::NamedTempFile::new().expect("a file");
    let job_type = "[job_types.import-events]\nformat = \"ndjson\"\ntopic = \"events-in\"\nchunk_rows = 2\n";
    std::fs::write(settings.path(), job_type).expect("the settings are written");
    let arguments = ["--config".into(), settings.path().into()];
    let loaded = Config::from_sources(arguments, []).expect("good settings");
    let gateway = Gateway::start_with(|config| config.jobs.types = loaded.jobs.types).await;
    assert!(gateway.job_topic("import-events").ends_with(".events-in"));
    let body = "{\"n\":1}\n\n{\"n\":2}\n{\"n\":3}";
    let headers = [("content-type", "application/x-ndjson")];
    let answer = gateway.post("/v1/jobs/import-events?channel=c", &headers, body).await;
    assert_eq!(answer.status, 202);
    let chunks = chunks(&gateway, "import-events", 2).await;
    let values: Vec<_> = chunks
        .iter()
        .map(|chunk| (value(chunk), header(chunk, "bn-first-line")))
        .collect();
    assert_eq!(values, [("{\"n\":1}\n\n{\"n\":2}\n", "1"), ("{\"n\":3}", "4")]);
    assert_eq!(header(&chunks[0], "content-type"), "application/x-ndjson");

    // A worker answers as for any other type, and the job's state is told as of any other.
    let producer = gateway
        .log
        .producer(ProducerSettings::default())
        .await
        .expect("a producer");
    for chunk in &chunks {
        let done = JobCommand::Done {
            chunk: header(chunk, "bn-chunk").parse().expect("an index"),
            ok: header(chunk, "bn-rows").parse().expect("a number"),
            rejected: 0,
            rejects: Vec::new(),
        };
        let job = header(chunk, "bn-job");
        let record = command_record(&gateway.config.topics, job, &done).expect("a command");
        producer.send(record).await.expect("taken").await.expect("appended");
    }
    let path = answer.header("location").expect("a place");
    let state = gateway.get(path, &[("prefer", "wait=15")]).await.json();
    assert_eq!(
        (&state["state"], &state["type"], &state["rows"]),
        (
            &json!("completed"),
            &json!("import-events"),
            &json!({"ok": 3, "rejected": 0, "total": 3})
        ),
        "{state}"
    );
    gateway.stop().await;
}

#[tokio::test]
async fn what_is_no_job_is_refused_and_nothing_of_it_is_written() {
    let gateway = Gateway::start_with(|config| {
        let job_type = config.jobs.types.get_mut("import-contacts").expect("the default");
        job_type.max_body_bytes = 1_000_000;
    })
    .await;
    let path = "/v1/jobs/import-contacts?channel=c";
    let too_long = "x".repeat(129);
    let large_row = format!("a\n1\n{}", "x".repeat(300_000));
    let too_large = "x\n".repeat(500_001);
    let zipped = [CSV[0], ("content-encoding", "gzip")];
    let latin1 = [("content-type", "text/csv; charset=iso-8859-1")];
    let json = [("content-type", "application/json")];
    let cases: &[(&str, &[(&str, &str)], &[u8], (u16, &str, Option<u64>))] = &[
        (
            "/v1/jobs/import-cats?channel=c",
            CSV,
            b"a\n1",
            (404, "unknown-job-type", None),
        ),
        ("/v1/jobs/import-contacts", CSV, b"a\n1", (400, "bad-query", None)),
        (
            "/v1/jobs/import-contacts?channel=c&x=1",
            CSV,
            b"a\n1",
            (400, "bad-query", None),
        ),
        (
            "/v1/jobs/import-contacts?channel=a%20b",
            CSV,
            b"a\n1",
            (400, "bad-channel", None),
        ),
        (
            &format!("/v1/jobs/import-contacts?channel={too_long}"),
            CSV,
            b"a\n1",
            (400, "bad-channel", None),
        ),
        (path, &json, b"a\n1", (415, "content-type", None)),
        (path, &[], b"a\n1", (415, "content-type", None)),
        (path, &latin1, b"a\n1", (415, "charset", None)),
        (path, &zipped, b"a\n1", (415, "content-encoding", None)),
        (path, CSV, too_large.as_bytes(), (413, "body-too-large", None)),
        (path, CSV, b"", (422, "no-header", Some(1))),
        (path, CSV, b"a\n1\n\xff\n", (422, "not-utf-8", Some(3))),
        (path, CSV, b"\xff\xfea\0\n\0", (422, "not-utf-8", Some(1))),
        (path, CSV, b"a\n1\n\"2\n3\n", (422, "unbalanced-quote", Some(3))),
        (path, CSV, large_row.as_bytes(), (422, "row-too-large", Some(3))),
    ];
    for (path, headers, body, (status, code, line)) in cases {
        let problem = gateway.post(path, headers, body.to_vec()).await.problem();
        assert_eq!(problem, (*status, (*code).to_owned(), *line), "{path}");
    }
    assert!(chunks(&gateway, "import-contacts", 0).await.is_empty());
    assert!(registrations(&gateway, 0).await.is_empty());
    gateway.stop().await;
}

#[tokio::test]
async fn a_large_file_is_taken_whole() {
    let gateway = Gateway::start().await;
    let body = contacts(100_000);
    let answer = gateway
        .post("/v1/jobs/import-contacts?channel=c", CSV, body.clone())
        .await;
    assert_eq!(answer.status, 202);
    let chunks = chunks(&gateway, "import-contacts", 200).await;
    let rows: String = chunks
        .iter()
        .map(|chunk| value(chunk).strip_prefix("name,email\n").expect("a header"))
        .collect();
    assert_eq!(chunks.len(), 200);
    assert!(
        "name,email\n".to_owned() + &rows == body,
        "the rows are not those of the file"
    );
    gateway.stop().await;
}

#[tokio::test]
async fn jobs_posted_at_once_are_each_there_once() {
    let gateway = Gateway::start().await;
    let jobs = (0..60).map(|job| {
        let gateway = &gateway;
        async move {
            let body = format!("name\nrow of {job}\n");
            let answer = gateway
                .post(&format!("/v1/jobs/import-contacts?channel=c{job}"), CSV, body)
                .await;
            assert_eq!(answer.status, 202);
            answer.header("location").expect("a place").to_owned()
        }
    });
    let places: BTreeSet<String> = join_all(jobs).await.into_iter().collect();
    assert_eq!(places.len(), 60);
    let chunks = chunks(&gateway, "import-contacts", 60).await;
    let rows: BTreeSet<&str> = chunks.iter().map(value).collect();
    assert_eq!((chunks.len(), rows.len()), (60, 60));
    let registered: BTreeSet<String> = registrations(&gateway, 60)
        .await
        .into_iter()
        .map(|(job, _)| format!("/v1/jobs/{job}"))
        .collect();
    assert_eq!(registered, places);
    gateway.stop().await;
}

#[tokio::test]
async fn a_job_of_a_topic_that_is_gone_fails_alone() {
    let gateway = Gateway::start_with(|config| {
        let job_type = JobTypeConfig::new("gone", BodyFormat::Csv);
        config.jobs.types.insert("gone".to_owned(), job_type);
        config.jobs.lanes = 1;
    })
    .await;
    gateway
        .log
        .delete_topic(&gateway.job_topic("gone"))
        .await
        .expect("the topic");
    let jobs = (0..20).map(|job| {
        let gateway = &gateway;
        let job_type = ["import-contacts", "gone"][job % 2];
        async move {
            gateway
                .post(&format!("/v1/jobs/{job_type}?channel=c"), CSV, "a\n1")
                .await
                .status
                .as_u16()
        }
    });
    let statuses = join_all(jobs).await;
    assert_eq!(statuses, [202, 500].repeat(10));
    assert_eq!(chunks(&gateway, "import-contacts", 10).await.len(), 10);
    assert_eq!(registrations(&gateway, 10).await.len(), 10);
    gateway.stop().await;
}

#[tokio::test]
async fn an_upload_that_stalls_or_breaks_off_leaves_nothing() {
    let gateway = Gateway::start_with(|config| config.http.stall_timeout = Duration::from_millis(100)).await;
    let head = "POST /v1/jobs/import-contacts?channel=c HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/csv\r\n";
    let mut stalled = gateway.connect().await;
    let request = format!("{head}Content-Length: 100\r\n\r\na,b\n1,2\n");
    stalled.write_all(request.as_bytes()).await.expect("a connection");
    let mut answer = String::new();
    tokio::time::timeout(DEADLINE, stalled.read_to_string(&mut answer))
        .await
        .expect("an answer in time")
        .expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    let mut broken_off = gateway.connect().await;
    broken_off.write_all(request.as_bytes()).await.expect("a connection");
    drop(broken_off);
    gateway.post("/v1/jobs/import-contacts?channel=c", CSV, "a\n1").await;
    assert_eq!(registrations(&gateway, 1).await.len(), 1);
    let spool = gateway.folder.path().join("spool");
    assert_eq!(std::fs::read_dir(spool).expect("the spool").count(), 0);
    gateway.stop().await;
}

#[tokio::test]
async fn the_file_of_an_upload_that_breaks_off_goes_with_it() {
    let gateway = Gateway::start().await;
    let spool = gateway.folder.path().join("spool");
    let mut broken_off = gateway.connect().await;
    let head = "POST /v1/jobs/import-contacts?channel=c HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/csv\r\n";
    // More than what stays in memory.
    let request = format!("{head}Content-Length: 1000000\r\n\r\n{}", contacts(15_000));
    broken_off.write_all(request.as_bytes()).await.expect("a connection");
    wait_until("the file is open", || is_open_below(&spool)).await;
    drop(broken_off);
    wait_until("the file is closed", || !is_open_below(&spool)).await;
    assert_eq!(std::fs::read_dir(&spool).expect("the spool").count(), 0);
    assert!(registrations(&gateway, 0).await.is_empty());
    gateway.stop().await;
}

async fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(DEADLINE, waiting)
        .await
        .unwrap_or_else(|_| panic!("not in time: {what}"));
}

/// Whether this process has a file open that is or was in a folder. Such a file has no name: only the list of open files tells.
fn is_open_below(folder: &Path) -> bool {
    let files = std::fs::read_dir("/proc/self/fd").expect("the open files");
    // One that is closed while they are listed has no link any more.
    let mut open = files.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok());
    open.any(|file| file.starts_with(folder))
}

#[tokio::test]
async fn a_body_of_unannounced_length_is_taken_up_to_the_limit() {
    let gateway = Gateway::start_with(|config| {
        let job_type = config.jobs.types.get_mut("import-contacts").expect("the default");
        job_type.max_body_bytes = 20;
    })
    .await;
    for (size, status) in [(20, "202"), (21, "413")] {
        let body = format!("a\n{}\n", "x".repeat(size - 3));
        let request = format!(
            "POST /v1/jobs/import-contacts?channel=c HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/csv\r\n\
             Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n{size:x}\r\n{body}\r\n0\r\n\r\n"
        );
        let mut stream = gateway.connect().await;
        stream.write_all(request.as_bytes()).await.expect("a connection");
        let mut answer = String::new();
        tokio::time::timeout(DEADLINE, stream.read_to_string(&mut answer))
            .await
            .expect("an answer in time")
            .expect("an answer");
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
    }
    assert_eq!(registrations(&gateway, 1).await.len(), 1);
    gateway.stop().await;
}
