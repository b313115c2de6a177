//! WebSocket: many channels on one connection, commands from the client, frames by name; `GET /v1/ws`.
//!
//! The socket is taken over from hyper after the upgrade. The feed writes to it directly, through the connection's outbox; the
//! task here reads what the client says, writes what a full socket left over, and pings. A client that reads nothing answers
//! no ping and is closed by that, one that goes on asking all the same by what it leaves unread; until then it costs no more than
//! its outbox.

mod commands;
#[cfg(feature = "conformance")]
mod echo;

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig, WebSocketContext};
use tokio_tungstenite::tungstenite::{Error as WebSocketError, Message};

use self::commands::{Command, read_commands};
use super::ask::read_start;
use super::close::Close;
use super::{greeting, join_all, retry_ms};
use crate::server::channel_name::check_channel_name;
use crate::server::events::publish_one;
use crate::server::feed::{Format, Subscribed, web_socket_text};
use crate::server::outbox::{Limits, Outbox};
use crate::server::{App, ConnectionPermit, Error};

/// The subprotocol that is spoken.
const SUBPROTOCOL: &str = "barnabas.v1.json";
/// What a connection's read buffer holds.
const READ_BUFFER_BYTES: usize = 2048;
/// How much the kernel may hold for a client that does not read; it counts beside the outbox.
const SEND_BUFFER_BYTES: usize = 128 * 1024;
/// How long a closing connection has to take the close frame and to answer it.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// What is done to a connection before it is served.
type Prepare = fn(Connection) -> Connection;

/// Answers the handshake and serves commands.
pub(super) async fn upgrade(State(app): State<App>, request: axum::extract::Request) -> Result<Response, Error> {
    accept(app, request, |connection| connection)
}

/// As [`upgrade`], but what the client says is said back to it.
#[cfg(feature = "conformance")]
pub(super) async fn upgrade_to_echo(
    State(app): State<App>,
    request: axum::extract::Request,
) -> Result<Response, Error> {
    accept(app, request, Connection::echoing)
}

/// Answers the handshake (RFC 6455, section 4.2) and takes the socket over.
fn accept(app: App, mut request: axum::extract::Request, prepare: Prepare) -> Result<Response, Error> {
    let accept = check_handshake(request.headers())?;
    let protocol = choose_protocol(request.headers())?;
    let permit = request.extensions().get::<ConnectionPermit>().cloned();
    let on_upgrade = request.extensions_mut().remove::<OnUpgrade>();
    let on_upgrade =
        on_upgrade.ok_or_else(|| Error::bad_request("not-upgradable", "this connection cannot be upgraded"))?;
    app.tasks.spawn(run(app.clone(), on_upgrade, permit, prepare));
    let mut response = StatusCode::SWITCHING_PROTOCOLS.into_response();
    let headers = response.headers_mut();
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    if let Some(protocol) = protocol {
        headers.insert(header::SEC_WEBSOCKET_PROTOCOL, protocol);
    }
    Ok(response)
}

/// The value of `Sec-WebSocket-Accept`.
fn check_handshake(headers: &HeaderMap) -> Result<HeaderValue, Error> {
    let has = |name: &HeaderName, token: &str| {
        let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
        values
            .flat_map(|value| value.split(','))
            .any(|part| part.trim().eq_ignore_ascii_case(token))
    };
    if !has(&header::CONNECTION, "upgrade") || !has(&header::UPGRADE, "websocket") {
        let detail = "this is a WebSocket: Connection: upgrade and Upgrade: websocket are needed";
        return Err(Error::refused(StatusCode::UPGRADE_REQUIRED, "upgrade-required", detail));
    }
    if !has(&header::SEC_WEBSOCKET_VERSION, "13") {
        return Err(Error::bad_request(
            "websocket-version",
            "Sec-WebSocket-Version must be 13",
        ));
    }
    let key = headers.get(header::SEC_WEBSOCKET_KEY);
    let key = key.ok_or_else(|| Error::bad_request("websocket-key", "Sec-WebSocket-Key is missing"))?;
    HeaderValue::from_str(&derive_accept_key(key.as_bytes())).map_err(Error::internal)
}

/// Ours among those that are offered; none when none is offered.
fn choose_protocol(headers: &HeaderMap) -> Result<Option<HeaderValue>, Error> {
    let mut offered = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter().peekable();
    if offered.peek().is_none() {
        return Ok(None);
    }
    let mut offered = offered
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','));
    match offered.any(|protocol| protocol.trim() == SUBPROTOCOL) {
        true => Ok(Some(HeaderValue::from_static(SUBPROTOCOL))),
        false => Err(Error::bad_request(
            "websocket-protocol",
            format!("the subprotocol is {SUBPROTOCOL}"),
        )),
    }
}

async fn run(app: App, on_upgrade: OnUpgrade, permit: Option<ConnectionPermit>, prepare: Prepare) {
    let (socket, read) = match on_upgrade
        .await
        .map_err(|error| error.to_string())
        .and_then(take_socket)
    {
        Ok(taken) => taken,
        Err(error) => {
            tracing::debug!(%error, "an upgrade came to nothing: {error}");
            return;
        }
    };
    let close = Box::pin(prepare(Connection::new(app, socket, read)).run()).await;
    tracing::debug!(close = close.map_or(0, |close| close.code), "a WebSocket has ended");
    drop(permit);
}

/// The socket itself, and what hyper has read beyond the handshake.
fn take_socket(upgraded: Upgraded) -> Result<(TcpStream, Bytes), String> {
    let parts = upgraded
        .downcast::<TokioIo<TcpStream>>()
        .map_err(|_| "not a plain socket".to_owned())?;
    let socket = parts.io.into_inner();
    if let Err(error) = socket2::SockRef::from(&socket).set_send_buffer_size(SEND_BUFFER_BYTES) {
        tracing::debug!(%error, "the send buffer stays as it is: {error}");
    }
    Ok((socket, parts.read_buf))
}

/// One client.
struct Connection {
    app: App,
    socket: Arc<TcpStream>,
    outbox: Arc<Outbox>,
    protocol: WebSocketContext,
    subscribed: HashMap<String, Subscribed>,
    has_connected: bool,
    allowance: Allowance,
    /// When something is due: the first command, a ping, or the answer to one.
    deadline: Instant,
    awaits_pong: bool,
    #[cfg(feature = "conformance")]
    echoes: bool,
}

impl Connection {
    fn new(app: App, socket: TcpStream, read: Bytes) -> Self {
        let push = &app.config.push;
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER_BYTES)
            .write_buffer_size(0)
            .max_message_size(Some(push.max_message_bytes))
            .max_frame_size(Some(push.max_message_bytes));
        let socket = Arc::new(socket);
        let limits = Limits {
            bytes: push.backlog_bytes,
            pieces: usize::MAX,
        };
        Self {
            outbox: Arc::new(Outbox::with_socket(limits, socket.clone())),
            socket,
            protocol: WebSocketContext::from_partially_read(read.into(), Role::Server, Some(config)),
            subscribed: HashMap::new(),
            has_connected: false,
            allowance: Allowance::new(push.messages_per_second, push.message_burst),
            deadline: Instant::now() + push.connect_timeout,
            awaits_pong: false,
            #[cfg(feature = "conformance")]
            echoes: false,
            app,
        }
    }

    /// Serves the client to its end. Returns why it was closed; `None` when it is simply gone.
    async fn run(mut self) -> Option<Close> {
        let close = self.serve().await;
        self.subscribed.clear();
        if let Some(close) = close {
            self.outbox.push_farewell(close.frame(retry_ms()));
        }
        self.part().await;
        close
    }

    async fn serve(&mut self) -> Option<Close> {
        // Commands may have come with the handshake.
        if let Err(close) = self.read().await {
            return close;
        }
        loop {
            tokio::select! {
                readable = self.socket.readable() => {
                    readable.ok()?;
                    if let Err(close) = self.read().await {
                        return close;
                    }
                }
                written = write_queued(&self.outbox, &self.socket) => {
                    written.ok()?;
                    if self.outbox.is_closed() {
                        return Some(Close::RESUME);
                    }
                }
                () = sleep_until(self.deadline) => {
                    if let Some(close) = self.overdue() {
                        return Some(close);
                    }
                }
                () = self.app.stopping.cancelled() => {
                    self.say(&json!({"bye": {"code": Close::SHUTDOWN.name, "retry_ms": retry_ms()}}));
                    return Some(Close::SHUTDOWN);
                }
            }
        }
    }

    /// Reads and obeys until there is nothing more to read now.
    async fn read(&mut self) -> Result<(), Option<Close>> {
        loop {
            let mut wire = Wire {
                socket: &self.socket,
                outbox: &self.outbox,
            };
            match self.protocol.read(&mut wire) {
                Ok(message) => {
                    self.obey(message).await?;
                    if self.outbox.is_flooded() {
                        return Err(Some(Close::NOT_READING));
                    }
                }
                Err(WebSocketError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(Close::of(&error)),
            }
        }
    }

    async fn obey(&mut self, message: Message) -> Result<(), Option<Close>> {
        if !self.allowance.take() {
            return Err(Some(Close::TOO_MANY_MESSAGES));
        }
        #[cfg(feature = "conformance")]
        if self.echoes {
            self.echo(&message);
            return Ok(());
        }
        let text = match message {
            Message::Text(text) => text,
            Message::Binary(_) => return Err(Some(Close::TEXT_ONLY)),
            // tungstenite answers pings and the close frame with the next read, which after a close ends the connection.
            Message::Ping(_) | Message::Pong(_) | Message::Close(_) | Message::Frame(_) => return Ok(()),
        };
        for command in read_commands(&text) {
            let Ok((id, command)) = command else {
                return Err(Some(Close::BAD_MESSAGE));
            };
            match command {
                Command::Pong => self.pong(),
                Command::Connect => self.connect(id),
                _ if !self.has_connected => return Err(Some(Close::NEVER_CONNECTED)),
                command => {
                    if let Err(error) = self.carry_out(id, command).await {
                        self.refuse(id, error);
                    }
                }
            }
        }
        Ok(())
    }

    fn connect(&mut self, id: Option<u64>) {
        self.has_connected = true;
        self.pong();
        let session = format!("{:016x}", rand::random::<u64>());
        self.answer(
            id,
            "connected",
            json!({"session": session, "ping_s": self.app.config.push.ping.as_secs()}),
        );
    }

    async fn carry_out(&mut self, id: Option<u64>, command: Command) -> Result<(), Error> {
        match command {
            Command::Subscribe(ask) => {
                check_channel_name(&ask.channel)?;
                if self.subscribed.contains_key(&ask.channel) {
                    return Err(Error::bad_request(
                        "subscribed-already",
                        "this channel is subscribed already",
                    ));
                }
                let max_channels = self.app.config.push.max_channels;
                if self.subscribed.len() >= max_channels {
                    let detail = format!("at most {max_channels} channels are served on one connection");
                    return Err(Error::bad_request("too-many-channels", detail));
                }
                let last = ask.last.map(|last| last.to_string());
                let start = read_start(ask.after.as_deref(), ask.since.as_deref(), last.as_deref())?;
                let ready = self.app.feed.resolve(&ask.channel, start).await?;
                self.answer(id, "subscribed", greeting(&ready, &ready.token(&self.app.feed)));
                let joined = join_all(&self.app, vec![ready], &self.outbox, Format::WebSocket, None).await;
                self.subscribed
                    .extend(joined.into_iter().map(|joined| (ask.channel.clone(), joined)));
            }
            Command::Unsubscribe(ask) => {
                self.subscribed.remove(&ask.channel).ok_or_else(|| {
                    Error::bad_request("not-subscribed", "this channel is not subscribed on this connection")
                })?;
                self.answer(id, "unsubscribed", json!({"channel": ask.channel}));
            }
            Command::Publish(publish) => {
                let (channel, plain) = publish.into_parts();
                let token = publish_one(&self.app, &channel, plain).await?;
                self.answer(id, "published", json!({"token": token.to_string()}));
            }
            Command::Refresh => {
                return Err(Error::bad_request(
                    "no-authentication",
                    "nobody has to say who they are here, so nothing expires",
                ));
            }
            Command::Pong | Command::Connect => {}
        }
        Ok(())
    }

    /// Any sign of life in the client's own words puts the next ping off.
    fn pong(&mut self) {
        self.awaits_pong = false;
        self.deadline = Instant::now() + self.app.config.push.ping;
    }

    fn overdue(&mut self) -> Option<Close> {
        if !self.has_connected {
            return Some(Close::NEVER_CONNECTED);
        }
        if self.awaits_pong {
            return Some(Close::NO_PONG);
        }
        self.awaits_pong = true;
        self.deadline = Instant::now() + self.app.config.push.pong_timeout;
        self.say(&json!({}));
        None
    }

    fn answer(&self, id: Option<u64>, name: &str, answer: Value) {
        self.say(&json!({"id": id, name: answer}));
    }

    fn refuse(&self, id: Option<u64>, error: Error) {
        let code = error.code();
        let retry = error.status().is_server_error();
        let message = match &error {
            Error::Refused { detail, .. } | Error::InProgress(detail) | Error::QueueFull(detail) => detail.clone(),
            Error::Unavailable { .. } | Error::Internal(_) => {
                tracing::warn!(%error, "a command failed: {error}");
                "it could not be done now".to_owned()
            }
        };
        self.answer(id, "error", json!({"code": code, "message": message, "retry": retry}));
    }

    fn say(&self, frame: &Value) {
        self.outbox.push_control(web_socket_text(frame.to_string().as_bytes()));
    }

    /// Sends what is left, the close frame last, and gives the client a moment to take it: a socket that is dropped with unread
    /// bytes resets, and the frame would be lost.
    async fn part(&mut self) {
        self.outbox.close();
        let farewell = async {
            write_queued(&self.outbox, &self.socket).await?;
            socket2::SockRef::from(&*self.socket).shutdown(std::net::Shutdown::Write)?;
            read_to_end(&self.socket).await
        };
        match timeout(CLOSE_TIMEOUT, farewell).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "a close frame could not be sent: {error}"),
            Err(_) => tracing::debug!("a close frame was not answered"),
        }
    }
}

/// Waits until something is queued, and writes until nothing is. Cancel safe.
async fn write_queued(outbox: &Outbox, socket: &TcpStream) -> io::Result<()> {
    outbox.waits().await;
    while !outbox.flush()? {
        socket.writable().await?;
    }
    Ok(())
}

/// Reads and forgets what still comes, to the end.
async fn read_to_end(socket: &TcpStream) -> io::Result<()> {
    let mut rest = [0; 1024];
    loop {
        socket.readable().await?;
        match socket.try_read(&mut rest) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// The connection as tungstenite's protocol code reads and writes it. What it writes (pongs, answers to a close) takes the way
/// of everything else.
struct Wire<'a> {
    socket: &'a TcpStream,
    outbox: &'a Outbox,
}

impl Read for Wire<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.socket.try_read(into)
    }
}

impl Write for Wire<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.outbox.push_control(Bytes::copy_from_slice(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How many messages a client may send: so many at once, and so many each second after that (a token bucket).
#[derive(Debug)]
struct Allowance {
    per_second: f64,
    burst: f64,
    left: f64,
    at: Instant,
}

impl Allowance {
    fn new(per_second: u32, burst: u32) -> Self {
        let burst = f64::from(burst);
        Self {
            per_second: f64::from(per_second),
            burst,
            left: burst,
            at: Instant::now(),
        }
    }

    /// Takes one, if there is one.
    fn take(&mut self) -> bool {
        let now = Instant::now();
        let grown = now.duration_since(self.at).as_secs_f64() * self.per_second;
        self.at = now;
        self.left = (self.left + grown).min(self.burst);
        if self.left < 1.0 {
            return false;
        }
        self.left -= 1.0;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_allowance_has_a_burst_and_grows_back() {
        let mut allowance = Allowance::new(20, 40);
        assert_eq!((0..100).filter(|_| allowance.take()).count(), 40);
        tokio::time::advance(Duration::from_millis(500)).await;
        assert_eq!((0..100).filter(|_| allowance.take()).count(), 10);
    }
}
