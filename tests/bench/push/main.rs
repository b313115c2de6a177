//! Measures what pushing costs, beside a bare epoll loop that writes the same bytes: `cargo run --release -p barnabas-tests --bin
//! bench-push [-- --kafka HOST:PORT]`.
//!
//! ```text
//! publisher ── POST ──▶ gateway | bare loop ──▶ 1000 subscribers        processes: this one, the gateway, the bare loop
//! ```
//! The gateway is the release binary in a process of its own (`cargo build --release -p barnabas` first). All share the machine, so
//! gateway and loop take turns, and what counts is the median of the rounds: CPU of the server's process for each event delivered,
//! the time from a POST to its event on a WebSocket, and memory of a connection that is idle.

mod client;
mod raw;

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use barnabas_tests::process::{Process, program};
use tempfile::TempDir;
use tokio::io::AsyncReadExt as _;

use self::client::{Crowd, Publisher, Transport, open};

const ROUNDS: usize = 5;
const ROUND_TIME: Duration = Duration::from_secs(3);
const IDLE_CONNECTIONS: usize = 8000;
const LATENCY_EVENTS: usize = 500;
const LATENCY_PACE: Duration = Duration::from_millis(20);
/// Linux counts CPU time in these for programs, whatever the kernel's own tick is.
const TICKS_PER_SECOND: f64 = 100.0;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let brokers = match arguments.as_slice() {
        [] => None,
        ["--kafka", brokers] => Some(*brokers),
        ["bare", web_socket, sse] => {
            let frames = raw::Frames {
                web_socket: fs::read(web_socket)?,
                sse: fs::read(sse)?,
            };
            return Ok(raw::serve(&frames)?);
        }
        _ => return Err("usage: bench-push [--kafka HOST:PORT]".into()),
    };
    let folder = tempfile::tempdir()?;
    let gateway = Server::gateway(&folder, brokers).await?;
    let bare = Server::bare(&folder, &gateway).await?;
    println!(
        "engine: {}",
        brokers.map_or("embedded".to_owned(), |brokers| format!("Kafka at {brokers}"))
    );
    for (transport, subscribers, events_per_second) in [
        (Transport::WebSocket, 1000, 50),
        (Transport::WebSocket, 100, 500),
        (Transport::Sse, 1000, 50),
    ] {
        delivery(&gateway, &bare, transport, subscribers, events_per_second).await?;
    }
    for server in [&gateway, &bare] {
        println!("POST to WebSocket, {}: {}", server.name, latency(server).await?);
    }
    // Each in a process of its own: what was freed before would be used again.
    drop(gateway);
    for transport in [Transport::WebSocket, Transport::Sse] {
        let folder = tempfile::tempdir()?;
        let gateway = Server::gateway(&folder, brokers).await?;
        let fresh = Server::bare(&folder, &gateway).await?;
        let (kib, floor) = (idle_kib(&gateway, transport).await?, idle_kib(&fresh, transport).await?);
        println!("idle {transport:?}: {kib:.1} KiB each, bare loop {floor:.1} KiB");
    }
    Ok(())
}

/// CPU for each delivery, gateway and bare loop in turns.
async fn delivery(
    gateway: &Server,
    bare: &Server,
    transport: Transport,
    subscribers: usize,
    events_per_second: u32,
) -> Result<()> {
    let channel = format!("fan-out-{transport:?}-{subscribers}");
    let mut costs = Vec::new();
    let crowds = [
        Crowd::open(gateway.address, transport, subscribers, |_| channel.clone()).await?,
        Crowd::open(bare.address, transport, subscribers, |_| channel.clone()).await?,
    ];
    let mut publishers = [
        Publisher::connect(gateway.address, &channel).await?,
        Publisher::connect(bare.address, &channel).await?,
    ];
    for _ in 0..ROUNDS {
        let mut round = [0.0; 2];
        for (i, server) in [gateway, bare].into_iter().enumerate() {
            let (cpu_before, received_before) = (server.cpu_seconds()?, crowds[i].received());
            let posted = publish(&mut publishers[i], events_per_second).await?;
            let deliveries = posted * subscribers as u64;
            crowds[i].wait_for(received_before + deliveries).await?;
            round[i] = (server.cpu_seconds()? - cpu_before) * 1e6 / deliveries as f64;
        }
        costs.push(round);
    }
    // The bare loop writes to everybody it has: these must not be among them in the next case.
    drop(crowds);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let ratio = median(costs.iter().map(|[gateway, bare]| gateway / bare));
    println!(
        "{subscribers} {transport:?} × {events_per_second}/s: {ratio:.2} × the bare loop; CPU for each delivery {:.1} µs, bare loop {:.1} µs",
        median(costs.iter().map(|[gateway, _]| *gateway)),
        median(costs.iter().map(|[_, bare]| *bare)),
    );
    Ok(())
}

/// Posts at a pace for the time of a round, and says how often.
async fn publish(publisher: &mut Publisher, events_per_second: u32) -> Result<u64> {
    let begin = Instant::now();
    let mut tick = tokio::time::interval(Duration::from_secs(1) / events_per_second);
    let mut posted = 0;
    while begin.elapsed() < ROUND_TIME {
        tick.tick().await;
        publisher.post().await?;
        posted += 1;
    }
    Ok(posted)
}

/// From the POST to the event on a WebSocket, one after the other.
async fn latency(server: &Server) -> Result<String> {
    let mut subscriber = open(server.address, Transport::WebSocket, "latency".to_owned()).await?;
    let mut publisher = Publisher::connect(server.address, "latency").await?;
    let mut tick = tokio::time::interval(LATENCY_PACE);
    let mut times = Vec::with_capacity(LATENCY_EVENTS);
    let mut buffer = [0; 4096];
    for _ in 0..LATENCY_EVENTS {
        tick.tick().await;
        let begin = Instant::now();
        let arrival = async {
            match subscriber.read(&mut buffer).await? {
                0 => Err("the subscriber was closed".into()),
                _ => Result::Ok(begin.elapsed()),
            }
        };
        let (posted, arrived) = tokio::join!(publisher.post(), arrival);
        posted?;
        times.push(arrived?.as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    Ok(format!(
        "p50 {:.2} ms, p99 {:.2} ms, max {:.2} ms",
        at(0.5),
        at(0.99),
        at(1.0)
    ))
}

/// Memory of an idle connection with a channel of its own.
async fn idle_kib(server: &Server, transport: Transport) -> Result<f64> {
    // What the first ones need for all.
    let first = Crowd::open(server.address, transport, 10, |i| format!("first-{i}")).await?;
    let before = server.process.memory_bytes();
    let crowd = Crowd::open(server.address, transport, IDLE_CONNECTIONS, |i| format!("idle-{i}")).await?;
    let after = server.process.memory_bytes();
    drop((first, crowd));
    Ok(after.saturating_sub(before) as f64 / 1024.0 / IDLE_CONNECTIONS as f64)
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A server's process.
struct Server {
    name: &'static str,
    process: Process,
    address: SocketAddr,
}

impl Server {
    async fn gateway(folder: &TempDir, brokers: Option<&str>) -> Result<Self> {
        let mut environment = vec![
            ("BARNABAS_LISTEN".to_owned(), "127.0.0.1:0".to_owned()),
            (
                "BARNABAS_DATA_DIR".to_owned(),
                folder.path().join("data").display().to_string(),
            ),
            // The subscribers here answer none.
            ("BARNABAS_PUSH_PING_MS".to_owned(), "600000".to_owned()),
        ];
        environment.extend(brokers.map(|brokers| ("KAFKA_BROKERS".to_owned(), brokers.to_owned())));
        Self::start("gateway", &program("barnabas"), &[], &environment, folder).await
    }

    /// The bare loop, with the bytes that the gateway sends.
    async fn bare(folder: &TempDir, gateway: &Self) -> Result<Self> {
        let mut arguments = vec!["bare".to_owned()];
        for transport in [Transport::WebSocket, Transport::Sse] {
            let file = folder.path().join(format!("{transport:?}"));
            fs::write(&file, frame(gateway.address, transport).await?)?;
            arguments.push(file.display().to_string());
        }
        Self::start("bare loop", &std::env::current_exe()?, &arguments, &[], folder).await
    }

    async fn start(
        name: &'static str,
        program: &Path,
        arguments: &[String],
        environment: &[(String, String)],
        folder: &TempDir,
    ) -> Result<Self> {
        const DEADLINE: Duration = Duration::from_secs(60);
        let begin = Instant::now();
        let process = Process::start(program, arguments, environment, &folder.path().join(name));
        loop {
            if let Some(address) = address_in(&process.output()) {
                return Ok(Self { name, process, address });
            }
            if begin.elapsed() > DEADLINE {
                return Err(format!("the {name} does not start:\n{}", process.last_output()).into());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// User and system time so far.
    fn cpu_seconds(&self) -> Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process.pid()))?;
        // Behind the name in parentheses; utime and stime are the fields 14 and 15 of the whole line.
        let fields = stat.rsplit_once(')').ok_or("no name")?.1.split_ascii_whitespace();
        let ticks: Vec<f64> = fields
            .skip(11)
            .take(2)
            .map(str::parse)
            .collect::<std::result::Result<_, _>>()?;
        Ok(ticks.iter().sum::<f64>() / TICKS_PER_SECOND)
    }
}

/// The bytes of one event as the gateway sends them.
async fn frame(gateway: SocketAddr, transport: Transport) -> Result<Vec<u8>> {
    let mut subscriber = open(gateway, transport, "frame".to_owned()).await?;
    Publisher::connect(gateway, "frame").await?.post().await?;
    let mut frame = vec![0; 4096];
    let length = subscriber.read(&mut frame).await?;
    frame.truncate(length);
    Ok(frame)
}

fn address_in(output: &str) -> Option<SocketAddr> {
    let (_, rest) = output.split_once("listening on http://")?;
    let (address, _) = rest.split_once([' ', '\n'])?;
    address.parse().ok()
}
