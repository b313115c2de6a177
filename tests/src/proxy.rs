//! A TCP proxy that fails as networks fail: between a client and one gateway, or several in turn.
//!
//! What it does can be changed at any time. A change of [`Weather`] holds for open connections from their next bytes on, except
//! where it says otherwise.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::kafka::free_ports;

/// Bytes that are moved at a time.
const PIECE_BYTES: usize = 16 * 1024;
/// Bytes of a request's head at most.
const HEAD_BYTES: usize = 64 * 1024;

/// How the network is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weather {
    /// Everything passes.
    Clear,
    /// Each piece comes so much later.
    Slow(Duration),
    /// At most so many bytes in a second, in each direction of each connection.
    Narrow(u32),
    /// Nothing passes and nothing is said; connections stay open, new ones are accepted. What was held back passes afterwards.
    Silent,
    /// As `Silent`, and the gateway sees its side closed while the client's stays open: a cut that only one side notices.
    HalfOpen,
    /// New connections are refused. Open ones go on.
    Refusing,
    /// Requests for an upgrade arrive without it, as behind a proxy that knows no WebSockets. Seen at a connection's first request.
    UpgradeStripped,
    /// Requests for an upgrade are never answered. Everything else passes. Seen at a connection's first request.
    UpgradeSwallowed,
}

/// A listening proxy. It ends, with all its connections, when dropped.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    weather: watch::Sender<Weather>,
    shared: Arc<Shared>,
    stopping: CancellationToken,
    tasks: TaskTracker,
}

#[derive(Debug)]
struct Shared {
    upstreams: Vec<SocketAddr>,
    next: AtomicUsize,
    accepted: AtomicUsize,
    /// Cancelled, and replaced, when all connections are reset.
    reset: Mutex<CancellationToken>,
}

impl Proxy {
    /// Listens on a free port and passes connections to the upstreams in turn.
    ///
    /// # Panics
    /// If there is no upstream, or nothing can be listened on.
    pub async fn start(upstreams: impl IntoIterator<Item = SocketAddr>) -> Self {
        let upstreams: Vec<SocketAddr> = upstreams.into_iter().collect();
        assert!(!upstreams.is_empty(), "a proxy needs somewhere to pass connections to");
        let [port] = free_ports();
        let proxy = Self {
            address: SocketAddr::from(([127, 0, 0, 1], port)),
            weather: watch::Sender::new(Weather::Clear),
            shared: Arc::new(Shared {
                upstreams,
                next: AtomicUsize::new(0),
                accepted: AtomicUsize::new(0),
                reset: Mutex::default(),
            }),
            stopping: CancellationToken::new(),
            tasks: TaskTracker::new(),
        };
        let listener = listen(proxy.address);
        proxy.tasks.spawn(accept(
            listener,
            proxy.address,
            proxy.weather.subscribe(),
            Arc::clone(&proxy.shared),
            proxy.stopping.clone(),
            proxy.tasks.clone(),
        ));
        proxy
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes how the network is, from now on.
    pub fn set(&self, weather: Weather) {
        self.weather.send_replace(weather);
    }

    /// Breaks all open connections off, both sides of them, with a TCP reset.
    pub fn reset(&self) {
        let mut reset = self.shared.reset.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *reset).cancel();
    }

    /// How many connections it has accepted so far.
    pub fn accepted(&self) -> usize {
        self.shared.accepted.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stopping.cancel();
        self.tasks.close();
    }
}

fn listen(address: SocketAddr) -> TcpListener {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_reuseaddr(true).expect("an option every socket has");
    socket.bind(address).expect("the proxy's port is free");
    socket.listen(1024).expect("a bound socket can listen")
}

async fn accept(
    listener: TcpListener,
    address: SocketAddr,
    mut weather: watch::Receiver<Weather>,
    shared: Arc<Shared>,
    stopping: CancellationToken,
    tasks: TaskTracker,
) {
    let mut listener = Some(listener);
    loop {
        let refusing = *weather.borrow_and_update() == Weather::Refusing;
        if refusing {
            listener = None;
        } else if listener.is_none() {
            listener = Some(listen(address));
        }
        let next = async {
            match &listener {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = stopping.cancelled() => return,
            // The proxy is being dropped: `stopping` comes next.
            changed = weather.changed() => if changed.is_err() { return },
            accepted = next => {
                let Ok((client, _)) = accepted else { continue };
                shared.accepted.fetch_add(1, Ordering::Relaxed);
                let turn = shared.next.fetch_add(1, Ordering::Relaxed);
                let upstream = shared.upstreams[turn % shared.upstreams.len()];
                let reset = shared.reset.lock().unwrap_or_else(PoisonError::into_inner).clone();
                tasks.spawn(connection(client, upstream, weather.clone(), reset, stopping.clone()));
            }
        }
    }
}

async fn connection(
    mut client: TcpStream,
    upstream: SocketAddr,
    mut weather: watch::Receiver<Weather>,
    reset: CancellationToken,
    stopping: CancellationToken,
) {
    let broken = async {
        tokio::select! {
            () = stopping.cancelled() => {}
            () = reset.cancelled() => {}
        }
    };
    let now = *weather.borrow_and_update();
    tokio::select! {
        () = broken => {}
        // An error is the end of a connection by one of its sides, which the other learns by the drop below.
        _ = pass_both(&mut client, upstream, now, weather) => return,
    }
    reset_on_close(&client);
}

/// Passes bytes both ways until both sides have closed. Dropped before that, it resets the gateway's side.
async fn pass_both(
    client: &mut TcpStream,
    upstream: SocketAddr,
    now: Weather,
    weather: watch::Receiver<Weather>,
) -> io::Result<()> {
    let mut head = Vec::new();
    if matches!(now, Weather::UpgradeStripped | Weather::UpgradeSwallowed) {
        head = read_head(client).await?;
    }
    if asks_for_upgrade(&head) {
        match now {
            Weather::UpgradeSwallowed => std::future::pending().await,
            _ => head = without_upgrade(&head),
        }
    }
    let mut gateway = ResetOnDrop(Some(TcpStream::connect(upstream).await?));
    let stream = gateway.0.as_mut().expect("it was just put in");
    stream.set_nodelay(true)?;
    client.set_nodelay(true)?;
    stream.write_all(&head).await?;
    let (client_reads, client_writes) = client.split();
    let (gateway_reads, gateway_writes) = stream.split();
    let both = async {
        tokio::try_join!(
            pass(client_reads, gateway_writes, weather.clone()),
            pass(gateway_reads, client_writes, weather.clone()),
        )
    };
    let half_open = async {
        let mut weather = weather.clone();
        // An error says that the proxy is being dropped, and the connection with it.
        let _ = weather.wait_for(|weather| *weather == Weather::HalfOpen).await;
    };
    tokio::select! {
        ended = both => {
            // Closed as its sides have closed it, not reset.
            gateway.0 = None;
            ended.map(|_| ())
        }
        () = half_open => {
            drop(gateway);
            std::future::pending().await
        }
    }
}

/// Passes bytes one way until their end, as the weather allows.
async fn pass(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>, mut weather: watch::Receiver<Weather>) -> io::Result<()> {
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let limit = match *weather.borrow() {
            // A tenth of a second's worth, so that a change is not long in coming.
            Weather::Narrow(rate) => (rate as usize / 10).clamp(1, PIECE_BYTES),
            _ => PIECE_BYTES,
        };
        let count = from.read(&mut piece[..limit]).await?;
        let now = weather
            .wait_for(|weather| !matches!(weather, Weather::Silent | Weather::HalfOpen))
            .await
            .map(|weather| *weather);
        match now {
            Ok(Weather::Slow(delay)) => tokio::time::sleep(delay).await,
            Ok(Weather::Narrow(rate)) => {
                tokio::time::sleep(Duration::from_secs_f64(count as f64 / f64::from(rate))).await
            }
            Ok(_) => {}
            // The proxy is being dropped, and the connection with it.
            Err(_) => return Ok(()),
        }
        if count == 0 {
            return to.shutdown().await;
        }
        to.write_all(&piece[..count]).await?;
    }
}

/// The bytes up to the end of a request's head, and what came with them.
async fn read_head(client: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") && head.len() < HEAD_BYTES {
        if client.read_buf(&mut head).await? == 0 {
            break;
        }
    }
    Ok(head)
}

fn asks_for_upgrade(head: &[u8]) -> bool {
    head_lines(head).any(is_upgrade)
}

fn without_upgrade(head: &[u8]) -> Vec<u8> {
    head_lines(head)
        .filter(|line| !is_upgrade(line))
        .flatten()
        .copied()
        .collect()
}

/// The lines of a head, each with its end; what follows the head is a line too.
fn head_lines(head: &[u8]) -> impl Iterator<Item = &[u8]> {
    head.split_inclusive(|byte| *byte == b'\n')
}

fn is_upgrade(line: &[u8]) -> bool {
    let line = String::from_utf8_lossy(line).to_ascii_lowercase();
    line.starts_with("upgrade:") || line.starts_with("connection:") && line.contains("upgrade")
}

/// A connection that its other end sees reset when this is dropped.
struct ResetOnDrop(Option<TcpStream>);

impl Drop for ResetOnDrop {
    fn drop(&mut self) {
        if let Some(stream) = &self.0 {
            reset_on_close(stream);
        }
    }
}

fn reset_on_close(stream: &TcpStream) {
    // A socket that refuses is gone already.
    let _ = stream.set_zero_linger();
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;

    const SOON: Duration = Duration::from_secs(10);
    /// Long enough for a byte that comes in spite of the weather to be seen.
    const WHILE: Duration = Duration::from_millis(200);

    /// A server that answers what it is sent, until the end.
    async fn echo() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.expect("a connection");
                tokio::spawn(async move {
                    let (mut reads, mut writes) = stream.split();
                    tokio::io::copy(&mut reads, &mut writes).await
                });
            }
        });
        address
    }

    async fn soon<T>(what: impl Future<Output = T>) -> T {
        tokio::time::timeout(SOON, what).await.expect("it comes soon")
    }

    async fn say(stream: &mut TcpStream, text: &str) -> io::Result<String> {
        stream.write_all(text.as_bytes()).await?;
        let mut answer = vec![0; text.len()];
        stream.read_exact(&mut answer).await?;
        Ok(String::from_utf8(answer).expect("text"))
    }

    #[tokio::test]
    async fn silence_holds_bytes_back_and_lets_them_go_afterwards() {
        let proxy = Proxy::start([echo().await]).await;
        let mut client = TcpStream::connect(proxy.address()).await.expect("a connection");
        assert_eq!(soon(say(&mut client, "one")).await.expect("an answer"), "one");
        proxy.set(Weather::Silent);
        assert!(tokio::time::timeout(WHILE, say(&mut client, "two")).await.is_err());
        proxy.set(Weather::Clear);
        let mut held = [0; 3];
        soon(client.read_exact(&mut held)).await.expect("what was held back");
        assert_eq!(&held, b"two");
    }

    #[tokio::test]
    async fn a_reset_is_seen_as_one_and_new_connections_pass() {
        let proxy = Proxy::start([echo().await]).await;
        let mut client = TcpStream::connect(proxy.address()).await.expect("a connection");
        soon(say(&mut client, "one")).await.expect("an answer");
        proxy.reset();
        let error = soon(client.read_u8()).await.expect_err("a reset");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        let mut client = TcpStream::connect(proxy.address()).await.expect("a connection");
        soon(say(&mut client, "two")).await.expect("an answer");
        assert_eq!(proxy.accepted(), 2);
    }

    #[tokio::test]
    async fn refused_connections_are_taken_again_on_the_same_port() {
        let proxy = Proxy::start([echo().await]).await;
        proxy.set(Weather::Refusing);
        soon(async { while TcpStream::connect(proxy.address()).await.is_ok() {} }).await;
        proxy.set(Weather::Clear);
        soon(async { while TcpStream::connect(proxy.address()).await.is_err() {} }).await;
    }

    #[tokio::test]
    async fn half_open_closes_the_side_of_the_gateway_only() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let proxy = Proxy::start([listener.local_addr().expect("an address")]).await;
        let mut client = TcpStream::connect(proxy.address()).await.expect("a connection");
        client.write_all(b"one").await.expect("it is sent");
        let (mut gateway, _) = soon(listener.accept()).await.expect("a connection");
        soon(gateway.read_exact(&mut [0; 3])).await.expect("it comes");
        proxy.set(Weather::HalfOpen);
        soon(gateway.read_u8()).await.expect_err("its side is closed");
        assert!(tokio::time::timeout(WHILE, client.read_u8()).await.is_err());
    }

    #[tokio::test]
    async fn an_upgrade_is_stripped_or_swallowed_and_nothing_else() {
        let proxy = Proxy::start([echo().await]).await;
        let plain = "GET / HTTP/1.1\r\nHost: h\r\n\r\n";
        let upgrade = "GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
        proxy.set(Weather::UpgradeStripped);
        let mut client = TcpStream::connect(proxy.address()).await.expect("a connection");
        client.write_all(upgrade.as_bytes()).await.expect("it is sent");
        let mut arrived = vec![0; plain.len()];
        soon(client.read_exact(&mut arrived)).await.expect("the rest arrives");
        assert_eq!(arrived, plain.as_bytes());

        proxy.set(Weather::UpgradeSwallowed);
        let mut client = TcpStream::connect(proxy.address()).await.expect("a connection");
        assert!(tokio::time::timeout(WHILE, say(&mut client, upgrade)).await.is_err());
        let mut client = TcpStream::connect(proxy.address()).await.expect("a connection");
        assert_eq!(soon(say(&mut client, plain)).await.expect("an answer"), plain);
    }
}
