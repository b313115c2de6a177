//! Measures how a gateway takes in jobs and events: `cargo run --release -p barnabas-tests --bin bench-jobs [-- [--kafka HOST:PORT] [--only CASE]]`.
//!
//! The gateway is the release binary in a process of its own (`cargo build --release -p barnabas` first), on the embedded log in a
//! temporary folder or on the brokers given; client and gateway share the machine. Four cases, each with a gateway of its own:
//! `small`, many small jobs; `keyed`, the same, each with an `Idempotency-Key`; `beside`, small jobs and events while one large file is taken in, three times; `memory`, what a 1 GiB
//! file costs.

use std::borrow::Cow;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;

const SMALL_JOB_CLIENTS: usize = 200;
const SMALL_JOB_ROWS: usize = 20;
/// Not counted: a broker that was just started compiles its code meanwhile.
const WARM_UP: Duration = Duration::from_secs(5);
const SMALL_JOB_TIME: Duration = Duration::from_secs(20);
const LARGE_BYTES: u64 = 256 * 1024 * 1024;
const LARGE_UPLOADS: u64 = 3;
const HUGE_BYTES: u64 = 1024 * 1024 * 1024;
/// How often each client beside the large upload posts.
const BESIDE_EVERY: Duration = Duration::from_millis(20);
const BESIDE_CLIENTS: usize = 4;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

#[tokio::main]
async fn main() -> Result<()> {
    let (mut brokers, mut only) = (None, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        match (name.as_str(), arguments.next()) {
            ("--kafka", Some(value)) => brokers = Some(value),
            ("--only", Some(value)) => only = Some(value),
            _ => return Err("usage: bench-jobs [--kafka HOST:PORT] [--only small|keyed|beside|memory]".into()),
        }
    }
    println!("log: {}", if brokers.is_some() { "Kafka" } else { "embedded" });
    for case in ["small", "keyed", "beside", "memory"] {
        if only.as_ref().is_some_and(|only| only != case) {
            continue;
        }
        let gateway = Gateway::start(brokers.as_deref()).await?;
        match case {
            "small" => small_jobs(&gateway, "small jobs", |request| Cow::Borrowed(request)).await?,
            "keyed" => small_jobs(&gateway, "small jobs with keys", with_key).await?,
            "beside" => beside_a_large_upload(&gateway).await?,
            _ => memory(&gateway).await?,
        }
        gateway.stop().await?;
    }
    Ok(())
}

/// 200 clients post jobs of 20 rows as fast as they are answered, each request as `next` makes it of the client's own.
async fn small_jobs(gateway: &Gateway, what: &str, next: fn(&[u8]) -> Cow<'_, [u8]>) -> Result<()> {
    let begin = Instant::now() + WARM_UP;
    let clients: Vec<_> = (0..SMALL_JOB_CLIENTS)
        .map(|client| {
            let (address, request) = (gateway.address, job_request(&format!("bench-{client}")));
            tokio::spawn(async move {
                let mut client = Client::connect(address).await?;
                while Instant::now() < begin {
                    client.post(&next(&request)).await?;
                }
                let mut latencies = Vec::new();
                while begin.elapsed() < SMALL_JOB_TIME {
                    latencies.push(client.post(&next(&request)).await?);
                }
                Result::Ok(latencies)
            })
        })
        .collect();
    let mut latencies = Vec::new();
    for client in clients {
        latencies.extend(client.await??);
    }
    let per_second = latencies.len() as f64 / begin.elapsed().as_secs_f64();
    println!(
        "{what}, {SMALL_JOB_CLIENTS} clients: {per_second:.0} jobs/s, {}",
        percentiles(latencies)
    );
    Ok(())
}

/// Small jobs and events, each client at a fixed pace, alone and then while a large file is taken in.
async fn beside_a_large_upload(gateway: &Gateway) -> Result<()> {
    let alone = beside(gateway, tokio::time::sleep(Duration::from_secs(5))).await?;
    println!("alone: small jobs {}; events {}", alone.0, alone.1);
    let begin = Instant::now();
    let (jobs, events) = beside(gateway, async {
        for _ in 0..LARGE_UPLOADS {
            if let Err(error) = upload(gateway.address, LARGE_BYTES).await {
                println!("the large upload failed: {error}");
            }
        }
    })
    .await?;
    let mib_per_second = ((LARGE_UPLOADS * LARGE_BYTES) >> 20) as f64 / begin.elapsed().as_secs_f64();
    println!("beside 256 MiB ({mib_per_second:.0} MiB/s): small jobs {jobs}; events {events}");
    Ok(())
}

async fn beside(gateway: &Gateway, work: impl Future<Output = ()>) -> Result<(String, String)> {
    let done = CancellationToken::new();
    let paced = |request: Vec<u8>| {
        let (address, done, request) = (gateway.address, done.clone(), Arc::new(request));
        let clients: Vec<_> = (0..BESIDE_CLIENTS)
            .map(|_| tokio::spawn(post_at_a_pace(address, Arc::clone(&request), done.clone())))
            .collect();
        async move {
            let mut latencies = Vec::new();
            for client in clients {
                latencies.extend(client.await??);
            }
            Result::Ok(percentiles(latencies))
        }
    };
    let (jobs, events) = (paced(job_request("bench")), paced(event_request()));
    work.await;
    done.cancel();
    Ok((jobs.await?, events.await?))
}

async fn post_at_a_pace(address: SocketAddr, request: Arc<Vec<u8>>, done: CancellationToken) -> Result<Vec<Duration>> {
    let mut client = Client::connect(address).await?;
    let mut latencies = Vec::new();
    let mut tick = tokio::time::interval(BESIDE_EVERY);
    while !done.is_cancelled() {
        tick.tick().await;
        latencies.push(client.post(&request).await?);
    }
    Ok(latencies)
}

async fn memory(gateway: &Gateway) -> Result<()> {
    let idle = gateway.memory_kib("VmRSS:")?;
    std::fs::write(format!("/proc/{}/clear_refs", gateway.pid), "5")?;
    let begin = Instant::now();
    upload(gateway.address, HUGE_BYTES).await?;
    let peak = gateway.memory_kib("VmHWM:")?;
    println!(
        "1 GiB upload: {:.1} s, peak {} MiB over idle ({} MiB)",
        begin.elapsed().as_secs_f64(),
        peak.saturating_sub(idle) / 1024,
        idle / 1024
    );
    Ok(())
}

/// Posts a CSV of about so many bytes.
async fn upload(address: SocketAddr, size_bytes: u64) -> Result<()> {
    let header = b"name,email,phone\n";
    let rows = rows(5000);
    let repeats = size_bytes / rows.len() as u64;
    let length = header.len() as u64 + repeats * rows.len() as u64;
    let mut client = Client::connect(address).await?;
    let head = format!(
        "POST /v1/jobs/import-contacts?channel=large HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/csv\r\n\
         Content-Length: {length}\r\n\r\n"
    );
    client.stream.write_all(head.as_bytes()).await?;
    client.stream.write_all(header).await?;
    for _ in 0..repeats {
        client.stream.write_all(rows.as_bytes()).await?;
    }
    client.answer().await
}

fn rows(count: usize) -> String {
    (0..count)
        .map(|row| {
            format!(
                "Person Number {row},person.number{row}@example.org,+44 20 7946 {:04}\n",
                row % 10_000
            )
        })
        .collect()
}

fn job_request(channel: &str) -> Vec<u8> {
    let body = format!("name,email,phone\n{}", rows(SMALL_JOB_ROWS));
    request(
        &format!("/v1/jobs/import-contacts?channel={channel}"),
        "text/csv",
        &body,
    )
}

fn event_request() -> Vec<u8> {
    let body = r#"{"type":"bench","data":{"text":"some text of about one hundred bytes, as a small event may have it, no more"}}"#;
    request("/v1/channels/bench/events", "application/json", body)
}

fn request(path: &str, media_type: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {media_type}\r\nContent-Length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}

/// The request with a new key.
fn with_key(request: &[u8]) -> Cow<'_, [u8]> {
    let line = request
        .windows(2)
        .position(|bytes| bytes == b"\r\n")
        .map_or(0, |at| at + 2);
    let key = format!("Idempotency-Key: {:032x}\r\n", rand::random::<u128>());
    [&request[..line], key.as_bytes(), &request[line..]].concat().into()
}

fn percentiles(mut latencies: Vec<Duration>) -> String {
    latencies.sort();
    let at = |part: f64| {
        let index = (latencies.len() as f64 * part) as usize;
        latencies
            .get(index.min(latencies.len().saturating_sub(1)))
            .map_or(0.0, |latency| latency.as_secs_f64() * 1000.0)
    };
    format!(
        "p50 {:.1} ms, p99 {:.1} ms, max {:.1} ms of {}",
        at(0.5),
        at(0.99),
        at(1.0),
        latencies.len()
    )
}

/// One connection that posts.
struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    async fn connect(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// Posts, and returns how long the answer took.
    async fn post(&mut self, request: &[u8]) -> Result<Duration> {
        let begin = Instant::now();
        self.stream.write_all(request).await?;
        self.answer().await?;
        Ok(begin.elapsed())
    }

    /// Reads an answer, which must be 202.
    async fn answer(&mut self) -> Result<()> {
        let mut head = String::new();
        let mut length = 0;
        while !head.ends_with("\r\n\r\n") {
            let begin = head.len();
            if self.stream.read_line(&mut head).await? == 0 {
                return Err(format!("the gateway closed after {head:?}").into());
            }
            if let Some(value) = head[begin..].to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse()?;
            }
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).await?;
        if head.starts_with("HTTP/1.1 202") {
            return Ok(());
        }
        Err(format!("{head}{}", String::from_utf8_lossy(&body)).into())
    }
}

/// The gateway's process.
struct Gateway {
    process: Child,
    pid: u32,
    address: SocketAddr,
    _folder: TempDir,
}

impl Gateway {
    async fn start(brokers: Option<&str>) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let config = folder.path().join("barnabas.toml");
        // Other gateways have used the brokers before.
        let prefix = format!("bench{:016x}", rand::random::<u64>());
        std::fs::write(
            &config,
            format!(
                "[topics]\nprefix = \"{prefix}\"\n\n[job_types.import-contacts]\nformat = \"csv\"\n\
                 topic = \"{prefix}.import-contacts\"\nmax_body_bytes = {}\n",
                2 * HUGE_BYTES
            ),
        )?;
        let mut command = Command::new(binary()?);
        command
            .args(["--listen", "127.0.0.1:0", "--config"])
            .arg(config)
            .arg("--data-dir")
            .arg(folder.path().join("data"))
            .env_remove("KAFKA_BROKERS")
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        if let Some(brokers) = brokers {
            command.env("KAFKA_BROKERS", brokers);
        }
        let mut process = command.spawn()?;
        let pid = process.id().ok_or("the gateway has ended")?;
        let mut lines = BufReader::new(process.stderr.take().ok_or("no standard error")?).lines();
        let address = loop {
            let line = lines.next_line().await?.ok_or("the gateway did not start")?;
            if let Some((_, address)) = line.split_once("listening on http://") {
                let end = address
                    .find(|c: char| c != '.' && c != ':' && !c.is_ascii_digit())
                    .unwrap_or(address.len());
                break address[..end].parse()?;
            }
            eprintln!("{line}");
        };
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                eprintln!("{line}");
            }
        });
        Ok(Self {
            process,
            pid,
            address,
            _folder: folder,
        })
    }

    /// A line of `/proc/PID/status`.
    fn memory_kib(&self, name: &str) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .ok_or("no such line")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }

    async fn stop(mut self) -> Result<()> {
        // Its data is thrown away, and its last words are about connections.
        self.process.kill().await?;
        Ok(())
    }
}

/// The gateway's binary, which lies beside this one.
fn binary() -> io::Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name("barnabas");
    if path.exists() {
        return Ok(path);
    }
    Err(io::Error::other(format!(
        "{} is missing: cargo build --release -p barnabas",
        path.display()
    )))
}
