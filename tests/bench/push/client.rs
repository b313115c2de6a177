//! Subscribers and a publisher that cost as little as they can: bytes over plain sockets, events counted and not read.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::Result;

/// A header of the bare loop, which greets nobody.
pub const BARE: &[u8] = b"server: bare\r\n";

/// Connections that are being opened at a time.
const OPENING: usize = 64;
/// How long everything may take that should take no time.
const DEADLINE: Duration = Duration::from_secs(20);

/// How a subscriber is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    WebSocket,
    Sse,
}

/// A crowd of subscribers.
pub struct Crowd {
    received: Arc<AtomicU64>,
    /// Reads; ends when it is dropped.
    _readers: JoinSet<()>,
}

impl Crowd {
    /// Opens `count` connections, each with a subscription of the channel that `channel` says.
    pub async fn open(
        to: SocketAddr,
        transport: Transport,
        count: usize,
        channel: impl Fn(usize) -> String,
    ) -> Result<Self> {
        let received = Arc::new(AtomicU64::new(0));
        let mut readers = JoinSet::new();
        let mut opening = JoinSet::new();
        for index in 0..count {
            if opening.len() == OPENING {
                Self::add(&mut readers, &received, transport, opening.join_next().await)?;
            }
            opening.spawn(open(to, transport, channel(index)));
        }
        while let Some(opened) = opening.join_next().await {
            Self::add(&mut readers, &received, transport, Some(opened))?;
        }
        Ok(Self {
            received,
            _readers: readers,
        })
    }

    fn add(
        readers: &mut JoinSet<()>,
        received: &Arc<AtomicU64>,
        transport: Transport,
        opened: Option<std::result::Result<Result<TcpStream>, tokio::task::JoinError>>,
    ) -> Result<()> {
        let stream = opened.ok_or("nothing is being opened")???;
        readers.spawn(count_events(stream, transport, Arc::clone(received)));
        Ok(())
    }

    /// Events that all of them have received.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Waits until so many have been received.
    pub async fn wait_for(&self, events: u64) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        while self.received() < events {
            if Instant::now() > deadline {
                return Err(format!("{} events of {events} came", self.received()).into());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }
}

/// Opens a connection and subscribes. What comes next on it is an event.
pub async fn open(to: SocketAddr, transport: Transport, channel: String) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    let request = match transport {
        Transport::WebSocket => {
            "GET /v1/ws HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
             sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
                .to_owned()
        }
        Transport::Sse => format!(
            "GET /v1/channels/{channel}/events HTTP/1.1\r\nhost: localhost\r\naccept: text/event-stream\r\n\r\n"
        ),
    };
    stream.write_all(request.as_bytes()).await?;
    let mut seen = Vec::new();
    read_until(&mut stream, &mut seen, b"\r\n\r\n").await?;
    if contains(&seen, BARE) {
        return Ok(stream);
    }
    match transport {
        Transport::WebSocket => {
            let subscribe = format!(r#"{{"id":2,"subscribe":{{"channel":"{channel}"}}}}"#);
            for command in [r#"{"id":1,"connect":{}}"#, &subscribe] {
                stream.write_all(&masked(command)).await?;
            }
            read_until(&mut stream, &mut seen, b"\"subscribed\"").await?;
            // The frame's end may come a little later.
            read_until(&mut stream, &mut seen, b"}}").await?;
        }
        Transport::Sse => read_until(&mut stream, &mut seen, b"\n\n").await?,
    }
    Ok(stream)
}

/// A text frame as clients send it; the mask is zero.
fn masked(text: &str) -> Vec<u8> {
    let mut frame = vec![0x81, 0x80 | text.len() as u8, 0, 0, 0, 0];
    frame.extend_from_slice(text.as_bytes());
    frame
}

async fn read_until(stream: &mut TcpStream, seen: &mut Vec<u8>, end: &[u8]) -> Result<()> {
    while !contains(seen, end) {
        if tokio::time::timeout(DEADLINE, stream.read_buf(seen)).await?? == 0 {
            return Err(format!("closed after {}", String::from_utf8_lossy(seen)).into());
        }
    }
    Ok(())
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

async fn count_events(mut stream: TcpStream, transport: Transport, received: Arc<AtomicU64>) {
    let mut counter = Counter::new(transport);
    let mut buffer = [0; 8 * 1024];
    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
        received.fetch_add(counter.count(&buffer[..length]), Ordering::Relaxed);
    }
}

/// Finds where events begin in what comes in pieces.
struct Counter {
    transport: Transport,
    /// Of a WebSocket: the beginning of a frame's header, and payload that is still to come.
    header: Vec<u8>,
    payload: usize,
    /// Of an event stream: how much of [`Counter::MARK`] has been seen.
    matched: usize,
}

impl Counter {
    const MARK: &[u8] = b"event: event\n";

    fn new(transport: Transport) -> Self {
        Self {
            transport,
            header: Vec::with_capacity(10),
            payload: 0,
            matched: 0,
        }
    }

    fn count(&mut self, bytes: &[u8]) -> u64 {
        match self.transport {
            Transport::WebSocket => self.count_frames(bytes),
            Transport::Sse => bytes.iter().map(|byte| self.step(*byte)).sum(),
        }
    }

    fn count_frames(&mut self, mut bytes: &[u8]) -> u64 {
        let mut frames = 0;
        while !bytes.is_empty() {
            let skipped = self.payload.min(bytes.len());
            self.payload -= skipped;
            bytes = &bytes[skipped..];
            let Some((first, rest)) = bytes.split_first() else {
                break;
            };
            self.header.push(*first);
            bytes = rest;
            let length = match self.header.as_slice() {
                [_, length @ 0..126] => usize::from(*length),
                [_, 126, high, low] => usize::from(u16::from_be_bytes([*high, *low])),
                _ => continue,
            };
            frames += u64::from(self.header[0] == 0x81);
            self.header.clear();
            self.payload = length;
        }
        frames
    }

    fn step(&mut self, byte: u8) -> u64 {
        self.matched = match byte == Self::MARK[self.matched] {
            true => self.matched + 1,
            false => usize::from(byte == Self::MARK[0]),
        };
        if self.matched < Self::MARK.len() {
            return 0;
        }
        self.matched = 0;
        1
    }
}

/// Posts events over one connection.
pub struct Publisher {
    stream: TcpStream,
    request: Vec<u8>,
    answer: Vec<u8>,
}

impl Publisher {
    pub async fn connect(to: SocketAddr, channel: &str) -> Result<Self> {
        let stream = TcpStream::connect(to).await?;
        stream.set_nodelay(true)?;
        let body = r#"{"type":"tick","data":{"text":"something of the usual size, such as a job's progress"}}"#;
        let request = format!(
            "POST /v1/channels/{channel}/events HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        Ok(Self {
            stream,
            request: request.into_bytes(),
            answer: Vec::new(),
        })
    }

    /// Posts an event; it is answered when this returns.
    pub async fn post(&mut self) -> Result<()> {
        self.stream.write_all(&self.request).await?;
        self.answer.clear();
        read_until(&mut self.stream, &mut self.answer, b"\r\n\r\n").await?;
        match self.answer.starts_with(b"HTTP/1.1 202") {
            true => Ok(()),
            false => Err(String::from_utf8_lossy(&self.answer).into_owned().into()),
        }
    }
}
