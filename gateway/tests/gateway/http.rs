//! Connections, origins, health and the page.

use std::time::Duration;

use barnabas::server::Server;
use http::Method;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_util::sync::CancellationToken;

use super::support::{DEADLINE, Gateway};

/// What comes on a raw connection until the gateway closes it.
async fn until_closed(gateway: &Gateway, request: &str) -> String {
    let mut stream = gateway.connect().await;
    stream.write_all(request.as_bytes()).await.expect("a connection");
    let mut answer = Vec::new();
    tokio::time::timeout(DEADLINE, stream.read_to_end(&mut answer))
        .await
        .expect("an end in time")
        .expect("an orderly end");
    String::from_utf8(answer).expect("text")
}

#[tokio::test]
async fn a_gateway_that_answers_is_alive_and_ready() {
    let gateway = Gateway::start().await;
    for path in ["/healthz/live", "/healthz/ready"] {
        assert_eq!(gateway.get(path, &[]).await.status, 200, "{path}");
    }
    gateway.stop().await;
}

#[tokio::test]
async fn a_head_that_does_not_come_or_is_too_large_ends_the_connection() {
    let gateway = Gateway::start_with(|config| config.http.header_timeout = Duration::from_millis(100)).await;
    assert_eq!(
        until_closed(&gateway, "GET /healthz/live HTTP/1.1\r\nHost: loc").await,
        ""
    );
    let many: String = (0..65).map(|n| format!("x-{n}: 1\r\n")).collect();
    let large = format!("x: {}\r\n", "x".repeat(16 * 1024));
    for fields in [many, large] {
        let request = format!("GET /healthz/live HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n");
        let answer = until_closed(&gateway, &request).await;
        assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
    }
    gateway.stop().await;
}

#[tokio::test]
async fn pages_of_other_sites_can_change_nothing() {
    let gateway = Gateway::start_with(|config| {
        config.listen.allowed_origins = vec!["https://app.example.org".to_owned()];
    })
    .await;
    let event = r#"{"type":"t"}"#;
    let post = async |origin: &str| {
        let headers = [("content-type", "application/json"), ("origin", origin)];
        gateway.post("/v1/channels/c/events", &headers, event).await
    };
    let foreign = post("https://evil.example").await;
    assert_eq!(foreign.problem(), (403, "origin-not-allowed".to_owned(), None));
    assert_eq!(foreign.header("access-control-allow-origin"), None);
    assert_eq!(post(&format!("http://{}", gateway.address)).await.status, 202);
    let allowed = post("https://app.example.org").await;
    assert_eq!(allowed.status, 202);
    assert_eq!(
        allowed.header("access-control-allow-origin"),
        Some("https://app.example.org")
    );

    let upgrade = [
        ("origin", "https://evil.example"),
        ("upgrade", "websocket"),
        ("connection", "upgrade"),
    ];
    assert_eq!(gateway.get("/v1/ws", &upgrade).await.status, 403);
    let rebound = [("host", "evil.example:8080"), ("origin", "http://evil.example:8080")];
    assert_eq!(
        gateway.get("/healthz/live", &rebound).await.problem().1,
        "host-not-allowed"
    );

    let preflight = [
        ("origin", "https://app.example.org"),
        ("access-control-request-method", "POST"),
    ];
    let preflight = gateway
        .send(Method::OPTIONS, "/v1/channels/c/events", &preflight, "")
        .await;
    assert_eq!(preflight.status, 204);
    assert!(
        preflight
            .header("access-control-allow-methods")
            .is_some_and(|methods| methods.contains("POST"))
    );
    let notifications = gateway.records(&gateway.config.topics.notifications(), 2).await;
    assert_eq!(notifications.iter().map(Vec::len).sum::<usize>(), 2);
    gateway.stop().await;
}

#[tokio::test]
async fn what_is_not_there_is_a_problem_with_a_policy() {
    let gateway = Gateway::start().await;
    for method in [Method::GET, Method::POST] {
        let answer = gateway.send(method, "/nothing/here", &[], "").await;
        assert_eq!(answer.problem(), (404, "not-found".to_owned(), None));
        assert!(
            answer
                .header("content-security-policy")
                .is_some_and(|policy| policy.starts_with("default-src 'self'"))
        );
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
    }
    gateway.stop().await;
}

#[tokio::test]
async fn the_page_of_operators_stands_at_an_address_of_its_own() {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../web/public");
    for dir in [None, Some(source.into())] {
        let gateway = Gateway::start_with(|config| config.web.dir = dir).await;
        let moved = gateway.get("/dashboard", &[]).await;
        assert_eq!(
            (moved.status.as_u16(), moved.header("location")),
            (307, Some("/dashboard/"))
        );
        let page = gateway.get("/dashboard/", &[]).await;
        assert_eq!(page.status, 200);
        assert!(page.body.starts_with(b"<!doctype html>"));
        let module = gateway.get("/dashboard/dashboard.js", &[]).await;
        assert!(
            module
                .header("content-type")
                .is_some_and(|as_what| as_what.starts_with("text/javascript"))
        );
        gateway.stop().await;
    }
}

#[tokio::test]
async fn a_page_is_served_from_a_folder_while_it_is_written() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("index.html"), "<!doctype html>").expect("a file");
    let dir = folder.path().to_owned();
    let gateway = Gateway::start_with(|config| config.web.dir = Some(dir)).await;
    let answer = gateway.get("/", &[]).await;
    assert_eq!(
        (answer.status.as_u16(), &answer.body[..]),
        (200, &b"<!doctype html>"[..])
    );
    assert_eq!(answer.header("content-type"), Some("text/html"));
    assert_eq!(answer.header("cache-control"), Some("no-cache"));
    gateway.stop().await;
}

#[tokio::test]
async fn stopping_ends_idle_connections_and_accepts_no_more() {
    let gateway = Gateway::start_with(|config| {
        config.http.header_timeout = 10 * DEADLINE;
        config.http.shutdown_grace = 10 * DEADLINE;
    })
    .await;
    let mut idle = gateway.connect().await;
    idle.write_all(b"GET /healthz/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .await
        .expect("a connection");
    let mut answer = [0; 15];
    idle.read_exact(&mut answer).await.expect("an answer");
    let address = gateway.address;
    gateway.stop().await;
    let mut rest = Vec::new();
    tokio::time::timeout(DEADLINE, idle.read_to_end(&mut rest))
        .await
        .expect("an end")
        .expect("an orderly end");
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn stopping_cuts_off_who_does_not_end_in_time() {
    let gateway = Gateway::start_with(|config| {
        config.http.stall_timeout = 10 * DEADLINE;
        config.http.shutdown_grace = Duration::from_millis(100);
    })
    .await;
    let mut stalled = gateway.connect().await;
    let request = "POST /v1/jobs/import-contacts?channel=c HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/csv\r\n\
                   Expect: 100-continue\r\nContent-Length: 100\r\n\r\n";
    stalled.write_all(request.as_bytes()).await.expect("a connection");
    // It is being read from.
    let mut go_on = [0; 21];
    stalled.read_exact(&mut go_on).await.expect("100 Continue");
    assert!(go_on.starts_with(b"HTTP/1.1 100"));
    gateway.stop().await;
    let mut rest = [0; 1000];
    while tokio::time::timeout(DEADLINE, stalled.read(&mut rest))
        .await
        .expect("an end in time")
        .is_ok_and(|read| read > 0)
    {}
}

#[tokio::test]
async fn a_data_folder_serves_one_gateway_at_a_time() {
    let gateway = Gateway::start().await;
    let second = Server::start(gateway.config.clone(), gateway.log.clone(), CancellationToken::new()).await;
    assert_eq!(
        second.expect_err("it is in use").to_string(),
        "BARNABAS_DATA_DIR: another gateway uses it"
    );
    gateway.stop().await;
}
