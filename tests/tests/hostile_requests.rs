//! Clients that mean no good, or have bugs: they are refused, cut off or borne, and nobody else notices.

use std::net::SocketAddr;
use std::time::Duration;

use barnabas_tests::http::{self, Answer};
use barnabas_tests::job::{self, Job, is_end, try_submit};
use barnabas_tests::on_both_logs;
use barnabas_tests::raw::{SOON, exchange, status_of};
use barnabas_tests::site::{Engine, Gateway, Importer, Site, addresses, contacts_csv, is_ready, jobs_path};
use barnabas_tests::subscriber::{Follower, Subscriber, Transport, events_path};
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use hyper::{Method, StatusCode};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

on_both_logs!(
    what_is_wrong_with_a_submission_is_told,
    a_body_that_stalls_or_breaks_off_is_given_up_and_leaves_nothing,
    fifty_megabytes_are_imported_in_bounded_memory_and_disturb_nobody,
);

const MIB: u64 = 1024 * 1024;

fn small_gateway(site: &mut Site) -> Gateway {
    site.set("BARNABAS_HTTP_HEADER_TIMEOUT_MS", 1000);
    site.set("BARNABAS_HTTP_STALL_TIMEOUT_MS", 1000);
    site.gateway("gateway")
}

async fn post_job(to: SocketAddr, content_type: &str, body: impl Into<Bytes>) -> Answer {
    http::post(to, &jobs_path("c"), content_type, body)
        .await
        .expect("an answer")
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_that_are_slow_huge_many_or_garbage_are_refused() {
    let mut site = Site::new(Engine::Embedded);
    let gateway = small_gateway(&mut site);
    let to = gateway.address();
    let long = format!(
        "GET / HTTP/1.1\r\nHost: localhost\r\nX: {}\r\n\r\n",
        "x".repeat(64 * 1024)
    );
    let many = format!("GET / HTTP/1.1\r\nHost: localhost\r\n{}\r\n", "a: b\r\n".repeat(200));
    let path = format!("GET /{} HTTP/1.1\r\nHost: localhost\r\n\r\n", "x".repeat(64 * 1024));
    for head in [long, many, path] {
        let status = status_of(&exchange(to, head.as_bytes()).await);
        assert!((400..500).contains(&status), "{status}: {}…", &head[..40]);
    }
    for garbage in [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".as_slice(),
        b"\0\0\0\0\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        b"POST /v1/jobs/import-contacts?channel=c HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/jobs/import-contacts?channel=c HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"POST /v1/jobs/import-contacts?channel=c HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Type: text/csv\r\n\r\nZZ\r\n",
    ] {
        let status = status_of(&exchange(to, garbage).await);
        assert!(status == 0 || (400..600).contains(&status), "{status}: {:?}", String::from_utf8_lossy(garbage));
    }
    // Slow heads, many at a time: each is cut off although a byte comes now and then.
    let slow = (0..50).map(|_| async move {
        let mut stream = TcpStream::connect(to).await.expect("a connection");
        for byte in b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ".iter().cycle() {
            tokio::time::sleep(Duration::from_millis(100)).await;
            if stream.write_all(&[*byte]).await.is_err() {
                return;
            }
        }
    });
    let all = futures_util::future::join_all(slow);
    tokio::time::timeout(SOON, all).await.expect("slow heads are cut off");
    assert!(is_ready(to));
}

async fn what_is_wrong_with_a_submission_is_told(engine: Engine) {
    let mut site = Site::new(engine);
    site.set("BARNABAS_EVENTS_MAX_BODY_BYTES", 1000);
    let gateway = small_gateway(&mut site);
    let to = gateway.address();
    let good = "name,email\nK.,k@example.org\n";
    for (content_type, body, status, code) in [
        (
            "text/csv",
            Bytes::from_static(b"name,email\nK\xff\xfe,k@example.org\n"),
            422,
            "not-utf-8",
        ),
        (
            "text/csv",
            Bytes::from_static(b"name,email\n\"K,k@example.org\n"),
            422,
            "unbalanced-quote",
        ),
        ("application/json", good.into(), 415, "content-type"),
        ("", good.into(), 415, "content-type"),
        ("text/csv; charset=iso-8859-1", good.into(), 415, "charset"),
        ("text/csv; charset=\"", good.into(), 415, "charset"),
    ] {
        let answer = post_job(to, content_type, body).await;
        assert_eq!(
            (answer.status.as_u16(), answer.code().as_str()),
            (status, code),
            "{answer:?}"
        );
        assert_eq!(answer.header("content-type"), "application/problem+json");
    }
    for (path, status, code) in [
        ("/v1/jobs/import-contacts".to_owned(), 400, "bad-query"),
        ("/v1/jobs/import-contacts?channel=".to_owned(), 400, "bad-channel"),
        ("/v1/jobs/import-contacts?channel=a%2Fb".to_owned(), 400, "bad-channel"),
        ("/v1/jobs/import-contacts?channel=%00".to_owned(), 400, "bad-channel"),
        ("/v1/jobs/import-contacts?channel=%ff%fe".to_owned(), 400, "bad-channel"),
        (
            format!("/v1/jobs/import-contacts?channel={}", "x".repeat(129)),
            400,
            "bad-channel",
        ),
        (
            "/v1/jobs/import-contacts?channel=a&channel=b".to_owned(),
            400,
            "bad-query",
        ),
        (
            "/v1/jobs/import-contacts?channel=a&chunks=1".to_owned(),
            400,
            "bad-query",
        ),
        ("/v1/jobs/no-such-type?channel=a".to_owned(), 404, "unknown-job-type"),
        ("/v1/jobs/..%2f..%2fetc?channel=a".to_owned(), 404, "unknown-job-type"),
        ("/v1/jobs/%ff?channel=a".to_owned(), 400, "bad-path"),
    ] {
        let answer = http::post(to, &path, "text/csv", good).await.expect("an answer");
        assert_eq!(
            (answer.status.as_u16(), answer.code().as_str()),
            (status, code),
            "{path}: {answer:?}"
        );
    }
    for (channel, body, status) in [
        ("c", "{".to_owned(), 400),
        ("c", "[]".to_owned(), 400),
        ("c", "null".to_owned(), 400),
        ("c", r#"{"type":7}"#.to_owned(), 400),
        ("c", r#"{"type":"t","colour":"red"}"#.to_owned(), 400),
        ("c", r#"{"type":""}"#.to_owned(), 400),
        ("c", r#"{"type":"a\nb\u0000"}"#.to_owned(), 400),
        ("c", "[".repeat(900), 400),
        ("c", format!(r#"{{"type":"t","data":"{}"}}"#, "x".repeat(2000)), 413),
        ("a%20b", r#"{"type":"t"}"#.to_owned(), 400),
        ("%F0%9F%90%9E", r#"{"type":"t"}"#.to_owned(), 400),
    ] {
        let answer = http::post(to, &events_path(channel), "application/json", body.clone())
            .await
            .expect("an answer");
        assert_eq!(answer.status.as_u16(), status, "{channel} {body}: {answer:?}");
        assert!(!answer.code().is_empty(), "{answer:?}");
    }
    // None of them was half taken: nothing stands on the log.
    assert!(site.records(&site.chunks_topic()).is_empty());
    assert!(site.records(&site.notifications_topic()).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_path_answers_strange_methods_and_names_with_a_problem() {
    let mut site = Site::new(Engine::Embedded);
    site.set("BARNABAS_PUSH_POLL_WAIT_S", 1);
    let gateway = small_gateway(&mut site);
    for path in [
        "/",
        "/v1",
        "/v1/ws",
        "/v1/jobs/import-contacts?channel=c",
        "/v1/jobs/not-an-id",
        "/v1/jobs/%00",
        "/v1/channels/c/events",
        "/v1/channels//events",
        "/v1/channels/a%2Fb/events",
        "/v1/channels/c/events?after=&wait=-1",
        "/v1/channels/c/events?wait=99999999999999",
        "/v1/channels/c/events?since=yesterday",
        "/v1/events",
        "/v1/events?channel=",
        "/v1/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/..%2f..%2fCargo.toml",
        "/healthz/ready",
        "//",
        "/?",
        "/%",
    ] {
        for method in [
            "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW",
        ] {
            let request = http::request(Method::from_bytes(method.as_bytes()).expect("a token"), path)
                .header("accept", "application/json")
                .body(http::whole(""))
                .expect("a request");
            let answer = tokio::time::timeout(Duration::from_secs(40), http::send(gateway.address(), request))
                .await
                .unwrap_or_else(|_| panic!("{method} {path} was not answered"))
                .expect("an answer");
            assert!(!answer.status.is_server_error(), "{method} {path}: {answer:?}");
            if answer.status.is_client_error() && method != "HEAD" {
                assert!(!answer.code().is_empty(), "{method} {path}: {answer:?}");
            }
        }
    }
}

async fn a_body_that_stalls_or_breaks_off_is_given_up_and_leaves_nothing(engine: Engine) {
    let mut site = Site::new(engine);
    let gateway = small_gateway(&mut site);
    let head = "POST /v1/jobs/import-contacts?channel=c HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/csv\r\nContent-Length: 1000\r\n\r\nname,";
    let answer = exchange(gateway.address(), head.as_bytes()).await;
    assert_eq!(status_of(&answer), 408, "{}", String::from_utf8_lossy(&answer));
    let mut broken = TcpStream::connect(gateway.address()).await.expect("a connection");
    broken.write_all(head.as_bytes()).await.expect("it is sent");
    drop(broken);
    let taken = try_submit(gateway.address(), "c", contacts_csv("k", 1))
        .await
        .expect("an answer");
    assert_eq!(taken.status, StatusCode::ACCEPTED);
    assert_eq!(site.records(&site.chunks_topic()).len(), 1);
}

async fn fifty_megabytes_are_imported_in_bounded_memory_and_disturb_nobody(engine: Engine) {
    let mut site = Site::new(engine);
    site.set("BARNABAS_HTTP_STALL_TIMEOUT_MS", 1000);
    let (gateway, importer) = site.gateway_and_importer();
    let to = gateway.address();
    let (mut quiet, _) = Subscriber::join(to, Transport::WebSocket, "quiet").await;
    // So that everything that is made at the first import is there.
    let warm = job::submit(to, "quiet", contacts_csv("warm", 1000)).await;
    job::assert_completed(&quiet.events_until(is_end).await, &warm.id, 1000, 0);
    let row = format!("\"K.\",k@example.org,,{}\n", "0".repeat(978));
    let piece = Bytes::from(row.repeat(100));
    let pieces = 50 * MIB as usize / piece.len();
    let rows = (pieces * 100) as u64;
    let body = stream::once(async { Bytes::from_static(b"name,email,phone,note\n") })
        .chain(stream::iter((0..pieces).map(move |_| piece.clone())));
    let processes: Vec<_> = std::iter::once(gateway.process())
        .chain(importer.as_ref().map(Importer::process))
        .collect();
    let before: Vec<u64> = processes.iter().map(|process| process.memory_bytes()).collect();
    processes.iter().for_each(|process| process.forget_peak_memory());
    let request = http::request(Method::POST, &jobs_path("big"))
        .header("content-type", "text/csv")
        .body(http::pieces(body))
        .expect("a request");
    let big = Job::of(&http::send(to, request).await.expect("an answer"));
    // Others go on meanwhile, each with all of its events and none of the large one's.
    let small = job::submit(to, "quiet", contacts_csv("small", 100)).await;
    job::assert_completed(&quiet.events_until(is_end).await, &small.id, 100, 0);
    let mut follower = Follower::new(to, &[Transport::Sse], "big", Some(&big.token));
    follower.until(is_end).await;
    job::assert_completed(follower.unbroken(), &big.id, rows, 0);
    // An importer reads 16 MiB ahead in each of its workers, and as much waits there. On the embedded log one process is both.
    let alone = processes.len() > 1;
    for (number, (process, before)) in processes.iter().zip(before).enumerate() {
        let grown = process.peak_memory_bytes().saturating_sub(before);
        let bound = if number == 0 && alone { 64 * MIB } else { 128 * MIB };
        assert!(grown < bound, "{process:?} grew by {} MiB", grown / MIB);
    }
    let mut contacts = addresses("small", 100);
    contacts.extend(addresses("warm", 1000));
    contacts.push("k@example.org".to_owned());
    contacts.sort();
    assert_eq!(site.contacts(), contacts);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_above_the_limit_is_refused_before_it_is_read() {
    let mut site = Site::new(Engine::Embedded);
    let gateway = small_gateway(&mut site);
    let head = format!(
        "POST /v1/jobs/import-contacts?channel=c HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/csv\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n",
        300 * MIB
    );
    let mut stream = TcpStream::connect(gateway.address()).await.expect("a connection");
    stream.write_all(head.as_bytes()).await.expect("it is sent");
    let mut answer = [0; 12];
    tokio::time::timeout(SOON, stream.read_exact(&mut answer))
        .await
        .expect("soon")
        .expect("an answer");
    assert_eq!(&answer, b"HTTP/1.1 413");
}
