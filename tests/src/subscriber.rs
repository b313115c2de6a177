//! Clients of the three transports that record what they are told, token by token.
//!
//! A [`Subscriber`] is one connection (or, for long-poll, one row of polls) to one channel. It tells in one form, [`Push`], what
//! each transport says in its own. [`Follower`] is a client as browsers have it: it comes back with its last token, to the same
//! transport or to another, until it has seen what it waits for.

use std::collections::HashSet;
use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::{Method, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;

use crate::http::{self, Broken};

/// The WebSocket subprotocol.
pub const SUBPROTOCOL: &str = "barnabas.v1.json";
/// What a long-poll waits for an event.
const POLL_WAIT_S: u64 = 5;
/// A connection that says nothing for so long is given up: three heartbeats.
const SILENCE: Duration = Duration::from_secs(50);
/// A test that waits longer for its next event, or a follower for its last, has failed.
pub const EVENT_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a follower waits before it comes back.
const BACK_OFF: Duration = Duration::from_millis(100);

/// How to subscribe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// `GET /v1/ws`.
    WebSocket,
    /// Server-Sent Events.
    Sse,
    /// `GET …?after=TOKEN&wait=…`, again and again.
    LongPoll,
}

/// All of them.
pub const TRANSPORTS: [Transport; 3] = [Transport::WebSocket, Transport::Sse, Transport::LongPoll];

/// An event as a browser gets it.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Event {
    /// Its channel.
    pub channel: String,
    /// Where to go on after it.
    pub token: String,
    /// Unique in its source.
    pub id: String,
    /// What happened.
    #[serde(rename = "type")]
    pub event_type: String,
    /// When, RFC 3339.
    pub time: String,
    /// What it is about; the job's id.
    #[serde(default)]
    pub subject: Option<String>,
    /// The payload.
    #[serde(default)]
    pub data: Value,
}

/// Something a subscriber is told.
#[derive(Clone, Debug)]
pub enum Push {
    /// It is subscribed; the token is where it stands.
    Subscribed(String),
    /// An event of its channel.
    Event(Event),
    /// Something was missed.
    Gap(Value),
    /// It is told to go, and when to come back.
    Bye(Value),
    /// The connection has ended; why, in words.
    End(String),
}

/// A subscription to one channel, on one transport. It ends when dropped.
#[derive(Debug)]
pub struct Subscriber {
    pushes: mpsc::UnboundedReceiver<Push>,
    task: JoinHandle<()>,
}

impl Subscriber {
    /// Subscribes to a channel, from now on or after a token. What goes wrong is told as [`Push::End`].
    pub fn start(to: SocketAddr, transport: Transport, channel: &str, after: Option<&str>) -> Self {
        let (sender, pushes) = mpsc::unbounded_channel();
        let (channel, after) = (channel.to_owned(), after.map(str::to_owned));
        let task = tokio::spawn(async move {
            let ended = match transport {
                Transport::WebSocket => web_socket(to, &channel, after, &sender).await,
                Transport::Sse => sse(to, &channel, after, &sender).await,
                Transport::LongPoll => long_poll(to, &channel, after, &sender).await,
            };
            let why = ended.unwrap_or_else(|error| error.to_string());
            // Nobody listens any more: the subscriber was dropped.
            let _ = sender.send(Push::End(why));
        });
        Self { pushes, task }
    }

    /// Subscribes and waits until that is confirmed. Returns the token of the moment too.
    ///
    /// # Panics
    /// If it is not.
    pub async fn join(to: SocketAddr, transport: Transport, channel: &str) -> (Self, String) {
        let mut subscriber = Self::start(to, transport, channel, None);
        match subscriber.next().await {
            Push::Subscribed(token) => (subscriber, token),
            other => panic!("{transport:?} on {channel}: {other:?} instead of a subscription"),
        }
    }

    /// What it is told next; after the end, the end again.
    ///
    /// # Panics
    /// If that is nothing for [`EVENT_TIMEOUT`].
    pub async fn next(&mut self) -> Push {
        match tokio::time::timeout(EVENT_TIMEOUT, self.pushes.recv()).await {
            Ok(Some(push)) => push,
            Ok(None) => Push::End("it has ended before".to_owned()),
            Err(_) => panic!("nothing was told for {EVENT_TIMEOUT:?}"),
        }
    }

    /// The next event. Confirmations are passed over.
    ///
    /// # Panics
    /// If a gap, a farewell or the end comes instead, or nothing.
    pub async fn event(&mut self) -> Event {
        loop {
            match self.next().await {
                Push::Event(event) => return event,
                Push::Subscribed(_) => {}
                other => panic!("{other:?} instead of an event"),
            }
        }
    }

    /// The events up to the first for which `last` holds, and that one.
    ///
    /// # Panics
    /// As [`Subscriber::event`].
    pub async fn events_until(&mut self, mut last: impl FnMut(&Event) -> bool) -> Vec<Event> {
        let mut events = Vec::new();
        loop {
            events.push(self.event().await);
            if last(&events[events.len() - 1]) {
                return events;
            }
        }
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A client that comes back: after each end it subscribes again with its last token, on the next of its transports.
#[derive(Debug)]
pub struct Follower {
    to: SocketAddr,
    transports: Vec<Transport>,
    channel: String,
    token: Option<String>,
    /// Everything that it was told, in order, without the ends.
    pub events: Vec<Event>,
    /// The gaps that it was told of.
    pub gaps: Vec<Value>,
    /// How often it subscribed.
    pub connections: usize,
    subscriber: Option<Subscriber>,
}

impl Follower {
    /// A client of a channel that takes the transports in turn. It connects when it is first waited for.
    pub fn new(to: SocketAddr, transports: &[Transport], channel: &str, after: Option<&str>) -> Self {
        assert!(!transports.is_empty(), "a follower needs a transport");
        Self {
            to,
            transports: transports.to_owned(),
            channel: channel.to_owned(),
            token: after.map(str::to_owned),
            events: Vec::new(),
            gaps: Vec::new(),
            connections: 0,
            subscriber: None,
        }
    }

    /// Subscribes and waits until that is confirmed.
    pub async fn join(&mut self) {
        while self.token.is_none() {
            self.step().await;
        }
    }

    /// Ends the present connection; the next is made with the next transport when it is waited for again.
    pub fn disconnect(&mut self) {
        self.subscriber = None;
    }

    /// Follows until an event for which `last` holds, whatever happens to the connection, and returns that event.
    ///
    /// # Panics
    /// If it has not come after [`EVENT_TIMEOUT`].
    pub async fn until(&mut self, last: impl FnMut(&Event) -> bool) -> Event {
        let found = tokio::time::timeout(EVENT_TIMEOUT, self.find(last)).await;
        found.unwrap_or_else(|_| panic!("the last event did not come in {EVENT_TIMEOUT:?}: {self:#?}"))
    }

    async fn find(&mut self, mut last: impl FnMut(&Event) -> bool) -> Event {
        loop {
            if let Some(event) = self.step().await
                && last(&event)
            {
                return event;
            }
        }
    }

    async fn step(&mut self) -> Option<Event> {
        let transport = self.transports[self.connections % self.transports.len()];
        if self.subscriber.is_none() {
            self.connections += 1;
        }
        let subscriber = self
            .subscriber
            .get_or_insert_with(|| Subscriber::start(self.to, transport, &self.channel, self.token.as_deref()));
        match subscriber.next().await {
            Push::Subscribed(token) => self.token = Some(token),
            Push::Event(event) => {
                self.token = Some(event.token.clone());
                self.events.push(event.clone());
                return Some(event);
            }
            Push::Gap(gap) => self.gaps.push(gap),
            Push::Bye(_) => {}
            Push::End(_) => {
                self.subscriber = None;
                tokio::time::sleep(BACK_OFF).await;
            }
        }
        None
    }

    /// The events, having checked that each came once, none of another channel, and that no gap was said.
    ///
    /// # Panics
    /// If not.
    pub fn unbroken(&self) -> &[Event] {
        let mut tokens = HashSet::new();
        for event in &self.events {
            assert_eq!(event.channel, self.channel, "an event of another channel: {event:?}");
            assert!(tokens.insert(&event.token), "told twice: {event:?}\n{:#?}", self.events);
        }
        assert!(self.gaps.is_empty(), "{:?}", self.gaps);
        &self.events
    }
}

type Told = mpsc::UnboundedSender<Push>;

fn tell(told: &Told, push: Push) {
    // Nobody listens any more: the subscriber was dropped, and this task is being ended.
    let _ = told.send(push);
}

/// Waits for what a connection says next, and gives a silent one up.
async fn heard<T>(next: impl Future<Output = T>) -> Result<T, Broken> {
    tokio::time::timeout(SILENCE, next)
        .await
        .map_err(|_| format!("silent for {SILENCE:?}").into())
}

async fn web_socket(to: SocketAddr, channel: &str, after: Option<String>, told: &Told) -> Result<String, Broken> {
    let mut request = format!("ws://{to}/v1/ws").into_client_request()?;
    request
        .headers_mut()
        .insert("sec-websocket-protocol", SUBPROTOCOL.parse()?);
    let stream = heard(tokio::net::TcpStream::connect(to)).await??;
    let (mut socket, _) = heard(tokio_tungstenite::client_async(request, stream)).await??;
    let mut subscribe = json!({"channel": channel});
    if let Some(after) = after {
        subscribe["after"] = after.into();
    }
    for command in [
        json!({"id": 1, "connect": {}}),
        json!({"id": 2, "subscribe": subscribe}),
    ] {
        socket.send(Message::text(command.to_string())).await?;
    }
    while let Some(message) = heard(socket.next()).await? {
        match message? {
            Message::Text(frames) => {
                for frame in frames.as_str().lines() {
                    let frame: Value = serde_json::from_str(frame)?;
                    if frame.as_object().is_some_and(serde_json::Map::is_empty) {
                        socket.send(Message::text("{}")).await?;
                    } else if let Some(push) = web_socket_push(frame)? {
                        tell(told, push);
                    }
                }
            }
            Message::Close(frame) => return Ok(closed(frame)),
            _ => {}
        }
    }
    Ok("closed without a close frame".to_owned())
}

fn web_socket_push(mut frame: Value) -> Result<Option<Push>, Broken> {
    if let Some(event) = frame.get_mut("event") {
        return Ok(Some(Push::Event(serde_json::from_value(event.take())?)));
    }
    if let Some(gap) = frame.get_mut("gap") {
        return Ok(Some(Push::Gap(gap.take())));
    }
    if let Some(bye) = frame.get_mut("bye") {
        return Ok(Some(Push::Bye(bye.take())));
    }
    if let Some(subscribed) = frame.get("subscribed") {
        let token = subscribed["token"].as_str().ok_or("subscribed without a token")?;
        return Ok(Some(Push::Subscribed(token.to_owned())));
    }
    match frame.get("connected") {
        Some(_) => Ok(None),
        None => Err(format!("unexpected frame {frame}").into()),
    }
}

fn closed(frame: Option<CloseFrame>) -> String {
    match frame {
        Some(frame) => format!("{} {}", u16::from(frame.code), frame.reason),
        None => "closed without a code".to_owned(),
    }
}

/// The path of a channel's events.
pub fn events_path(channel: &str) -> String {
    format!("/v1/channels/{channel}/events")
}

async fn sse(to: SocketAddr, channel: &str, after: Option<String>, told: &Told) -> Result<String, Broken> {
    let mut request = http::request(Method::GET, &events_path(channel)).header("accept", "text/event-stream");
    if let Some(after) = after {
        request = request.header("last-event-id", after);
    }
    let answer = heard(http::open(to, request.body(http::whole(""))?)).await??;
    if answer.status() != StatusCode::OK {
        return Ok(format!("SSE was answered {}", answer.status()));
    }
    let mut lines = Lines::of(answer.into_body());
    let mut message = SseMessage::default();
    while let Some(line) = heard(lines.next()).await?? {
        if !line.is_empty() {
            message.push(&line);
            continue;
        }
        match std::mem::take(&mut message).into_push()? {
            Some(Push::Bye(bye)) => tell(told, Push::Bye(bye)),
            Some(push) => tell(told, push),
            None => {}
        }
    }
    Ok("the stream ended".to_owned())
}

/// One message of an event stream, as its lines come in.
#[derive(Debug, Default)]
struct SseMessage {
    id: Option<String>,
    event: String,
    data: Vec<String>,
}

impl SseMessage {
    fn push(&mut self, line: &str) {
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "id" => self.id = Some(value.to_owned()),
            "event" => value.clone_into(&mut self.event),
            "data" => self.data.push(value.to_owned()),
            // Comments are heartbeats; `retry` is for browsers.
            _ => {}
        }
    }

    fn into_push(self) -> Result<Option<Push>, Broken> {
        let data = self.data.join("\n");
        match self.event.as_str() {
            "" if data.is_empty() => Ok(None),
            "hello" => Ok(Some(Push::Subscribed(self.id.ok_or("a hello without an id")?))),
            "event" => {
                let event: Event = serde_json::from_str(&data)?;
                if self.id.as_deref() != Some(event.token.as_str()) {
                    return Err(format!("the id {:?} is not the token of {event:?}", self.id).into());
                }
                Ok(Some(Push::Event(event)))
            }
            "gap" => Ok(Some(Push::Gap(serde_json::from_str(&data)?))),
            "bye" => Ok(Some(Push::Bye(serde_json::from_str(&data)?))),
            other => Err(format!("unexpected event {other:?} of an event stream: {data}").into()),
        }
    }
}

/// A body, line by line.
struct Lines {
    body: Incoming,
    buffer: Vec<u8>,
}

impl Lines {
    fn of(body: Incoming) -> Self {
        let buffer = Vec::new();
        Self { body, buffer }
    }

    /// The next line without its end; None at the body's end. A last line that has no end is not one.
    async fn next(&mut self) -> Result<Option<String>, Broken> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                let line = String::from_utf8(line)?;
                return Ok(Some(line.trim_end_matches(['\r', '\n']).to_owned()));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(frame) => {
                    if let Ok(data) = frame?.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
            }
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum PollItem {
    Event(Event),
    Other(Value),
}

#[derive(Deserialize)]
struct PollAnswer {
    events: Vec<PollItem>,
    token: String,
}

async fn long_poll(to: SocketAddr, channel: &str, mut after: Option<String>, told: &Told) -> Result<String, Broken> {
    let mut first = after.is_none();
    loop {
        let mut path = format!("{}?wait={}", events_path(channel), if first { 0 } else { POLL_WAIT_S });
        if let Some(after) = &after {
            path += &format!("&after={after}");
        }
        let request = http::request(Method::GET, &path).header("accept", "application/json");
        let answer = heard(http::send(to, request.body(http::whole(""))?)).await??;
        if answer.status != StatusCode::OK {
            return Ok(format!("a poll was answered {}: {}", answer.status, answer.code()));
        }
        let page: PollAnswer = serde_json::from_slice(&answer.body)?;
        if std::mem::take(&mut first) {
            tell(told, Push::Subscribed(page.token.clone()));
        }
        for item in page.events {
            match item {
                PollItem::Event(event) => tell(told, Push::Event(event)),
                PollItem::Other(gap) => tell(told, Push::Gap(gap)),
            }
        }
        after = Some(page.token);
    }
}
