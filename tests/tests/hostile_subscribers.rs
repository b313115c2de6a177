//! Subscribers that mean no good, or have bugs: they are told, closed or borne, and nobody else notices.

use std::net::SocketAddr;
use std::time::Duration;

use barnabas_tests::http;
use barnabas_tests::on_both_logs;
use barnabas_tests::raw::{SOON, read_to_close, status_of};
use barnabas_tests::site::{Engine, Site, is_ready};
use barnabas_tests::subscriber::{Push, Subscriber, TRANSPORTS, Transport, events_path};
use futures_util::{SinkExt as _, StreamExt as _};
use hyper::StatusCode;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

on_both_logs!(sockets_that_do_not_read_cost_little_and_hold_nobody_up);

const MIB: u64 = 1024 * 1024;

/// A connection whose socket takes almost nothing.
async fn narrow_connection(to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(4096).expect("an option every socket has");
    socket.connect(to).await.expect("a connection")
}

/// A subscriber that never reads.
async fn deaf_subscriber(to: SocketAddr, request: &str) -> TcpStream {
    let mut stream = narrow_connection(to).await;
    stream.write_all(request.as_bytes()).await.expect("it is sent");
    stream
}

async fn web_socket(to: SocketAddr, stream: TcpStream) -> WebSocketStream<TcpStream> {
    let mut request = format!("ws://{to}/v1/ws").into_client_request().expect("a request");
    let protocol = "barnabas.v1.json".parse().expect("a value");
    request.headers_mut().insert("sec-websocket-protocol", protocol);
    let (socket, _) = tokio_tungstenite::client_async(request, stream)
        .await
        .expect("an upgrade");
    socket
}

async fn sockets_that_do_not_read_cost_little_and_hold_nobody_up(engine: Engine) {
    const DEAF: usize = 20;
    const EVENTS: usize = 400;
    let site = Site::new(engine);
    let gateway = site.gateway("gateway");
    let to = gateway.address();
    let sse = "GET /v1/channels/loud/events HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n";
    let mut deaf = Vec::new();
    for _ in 0..DEAF {
        deaf.push(deaf_subscriber(to, sse).await);
    }
    let (mut same_channel, _) = Subscriber::join(to, Transport::WebSocket, "loud").await;
    let (mut other_channel, _) = Subscriber::join(to, Transport::Sse, "quiet").await;
    let before = gateway.process().memory_bytes();
    // 32 MiB for each of them: sixty times what a socket holds, and 640 MiB if all were kept for each.
    let event = format!(r#"{{"type":"loud","data":"{}"}}"#, "x".repeat(80 * 1024));
    for number in 0..EVENTS {
        let posted = http::post(to, &events_path("loud"), "application/json", event.clone())
            .await
            .expect("an answer");
        assert_eq!(posted.status, StatusCode::ACCEPTED);
        assert_eq!(same_channel.event().await.event_type, "loud");
        if number % 100 == 0 {
            http::post(to, &events_path("quiet"), "application/json", r#"{"type":"quiet"}"#)
                .await
                .expect("an answer");
            assert_eq!(other_channel.event().await.event_type, "quiet");
        }
    }
    let grown = gateway.process().peak_memory_bytes().saturating_sub(before);
    assert!(grown < 96 * MIB, "it grew by {} MiB", grown / MIB);
    drop(deaf);
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_that_break_the_rules_end_with_the_close_code_for_it() {
    let site = Site::new(Engine::Embedded);
    let gateway = site.gateway("gateway");
    let to = gateway.address();
    for (frame, code) in [
        // Not masked; reserved bits; unknown opcode; a fragmented ping; a lone continuation; text that is not UTF-8.
        (b"\x81\x02{}".as_slice(), 1002),
        (b"\xf1\x82\0\0\0\0{}", 1002),
        (b"\x83\x82\0\0\0\0{}", 1002),
        (b"\x09\x82\0\0\0\0{}", 1002),
        (b"\x80\x82\0\0\0\0{}", 1002),
        (b"\x81\x82\0\0\0\0\xff\xfe", 1007),
        // A length of 1 TiB.
        (b"\x81\xff\0\0\x01\0\0\0\0\0\0\0\0\0", 1009),
    ] {
        let mut stream = TcpStream::connect(to).await.expect("a connection");
        let upgrade = "GET /v1/ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                       Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: barnabas.v1.json\r\n\r\n";
        stream.write_all(upgrade.as_bytes()).await.expect("it is sent");
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.expect("the upgrade is answered"));
        }
        assert_eq!(status_of(&head), 101, "{}", String::from_utf8_lossy(&head));
        stream.write_all(frame).await.expect("it is sent");
        let rest = read_to_close(stream).await;
        let close = rest
            .iter()
            .position(|byte| *byte == 0x88)
            .unwrap_or_else(|| panic!("{frame:?}: no close frame: {rest:?}"));
        let said = u16::from_be_bytes([rest[close + 2], rest[close + 3]]);
        assert_eq!(said, code, "{frame:?}");
    }
    assert!(is_ready(to));
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_that_make_no_sense_are_answered_and_never_crash() {
    let site = Site::new(Engine::Embedded);
    let gateway = site.gateway("gateway");
    let to = gateway.address();
    for command in [
        "",
        "null",
        "[]",
        "7",
        "\"text\"",
        "{\"id\":1}",
        "{\"id\":-1,\"connect\":{}}",
        "{\"id\":1,\"connect\":{},\"subscribe\":{\"channel\":\"c\"}}",
        "{\"id\":1,\"subscribe\":{}}",
        "{\"id\":1,\"subscribe\":{\"channel\":\"a/b\"}}",
        "{\"id\":1,\"subscribe\":{\"channel\":7}}",
        "{\"id\":1,\"subscribe\":{\"channel\":\"c\",\"after\":\"nonsense\"}}",
        "{\"id\":1,\"unsubscribe\":{\"channel\":\"never\"}}",
        "{\"id\":1,\"fly\":{}}",
        "{\"id\":1,\"connect\":{\"colour\":\"red\"}}",
        "{\"id\":99999999999999999999,\"connect\":{}}",
        "{\"id\":1,\"publish\":{\"channel\":\"c\"}}",
        "{{{{",
        "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
    ] {
        let mut socket = web_socket(to, TcpStream::connect(to).await.expect("a connection")).await;
        socket.send(Message::text(command)).await.expect("it is sent");
        // Something is said: an error, an answer, or a close with a reason.
        let said = tokio::time::timeout(SOON, socket.next()).await;
        let said = said.unwrap_or_else(|_| panic!("{command} was met with silence"));
        let said = said
            .expect("something before the end")
            .expect("a frame and no broken connection");
        assert!(
            matches!(said, Message::Text(_) | Message::Close(Some(_))),
            "{command}: {said:?}"
        );
    }
    for transport in TRANSPORTS {
        let subscriber = Subscriber::start(to, transport, "a%20b", None).next().await;
        assert!(
            !matches!(subscriber, Push::Subscribed(_)),
            "{transport:?}: {subscriber:?}"
        );
    }
    assert!(is_ready(to));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_asks_and_never_reads_is_closed() {
    const BACKLOG: usize = 16 * 1024;
    let mut site = Site::new(Engine::Embedded);
    site.set("BARNABAS_PUSH_BACKLOG_BYTES", BACKLOG);
    let gateway = site.gateway("gateway");
    let to = gateway.address();
    let mut socket = web_socket(to, narrow_connection(to).await).await;
    let connect = Message::text("{\"id\":1,\"connect\":{}}");
    socket.send(connect).await.expect("it is sent");
    // 39 messages at once are allowed. Each is answered with 100 KiB, and that is more than may wait.
    let thousand = vec![r#"{"id":1,"unsubscribe":{"channel":"c"}}"#; 1000].join("\n");
    for _ in 0..39 {
        if socket.send(Message::text(thousand.as_str())).await.is_err() {
            break;
        }
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut answers = 0;
    let close = loop {
        let said = tokio::time::timeout(SOON, socket.next()).await.expect("a frame");
        match said.expect("something before the end").expect("a frame") {
            Message::Text(text) => answers += text.len(),
            Message::Close(close) => break close.expect("a code and a reason"),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(u16::from(close.code), 4002, "{}", close.reason);
    assert!(close.reason.contains("retry_ms"), "{}", close.reason);
    // Besides, the kernel holds some, and the answers to the last message are all there.
    assert!(answers < MIB as usize, "{answers} bytes had waited");
    assert!(is_ready(to));
}
