//! Measures the contacts import end to end: `cargo run --release -p barnabas-tests --bin bench-import [-- [--rows N] [--kafka HOST:PORT]]`.
//!
//! ```text
//! generated CSV ── POST ──▶ contacts-import (gateway, log, importer in one process) ──▶ SQLite
//!                                └── Server-Sent Events and WebSocket: until job.completed
//! ```
//! The program is the release binary (`cargo build --release -p barnabas-examples` first), on the embedded log in a temporary
//! folder or on the brokers given; client and program share the machine. `bench-import generate N` writes the CSV to standard output
//! instead.

mod contacts;

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use barnabas_tests::http;
use barnabas_tests::job::is_end;
use barnabas_tests::process::{Process, program};
use barnabas_tests::site::{JOB_TYPE, is_ready, jobs_path};
use barnabas_tests::subscriber::{Event, Push, Subscriber, Transport};
use bytes::BytesMut;
use hyper::Method;
use tokio::io::AsyncReadExt as _;

const ROWS: u64 = 1_000_000;
const CHANNEL: &str = "bench";
const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes of the file that are sent at once.
const PIECE_BYTES: usize = 128 * 1024;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

struct Arguments {
    rows: u64,
    brokers: Option<String>,
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [command, rows] = arguments.as_slice()
        && command == "generate"
    {
        contacts::write_csv(&mut BufWriter::new(std::io::stdout().lock()), rows.parse()?)?;
        return Ok(());
    }
    let arguments = Arguments::parse(arguments)?;
    let folder = tempfile::tempdir()?;
    let csv = folder.path().join("contacts.csv");
    let mut file = BufWriter::new(File::create(&csv)?);
    let rejected = contacts::write_csv(&mut file, arguments.rows)?;
    file.flush()?;
    drop(file);
    let size_mib = mib(std::fs::metadata(&csv)?.len());
    println!("{} rows, {rejected} of them bad, {size_mib:.1} MiB", arguments.rows);
    import(&arguments, folder.path(), &csv, rejected).await
}

impl Arguments {
    fn parse(arguments: Vec<String>) -> Result<Self> {
        let mut parsed = Self {
            rows: ROWS,
            brokers: None,
        };
        let mut arguments = arguments.into_iter();
        while let Some(name) = arguments.next() {
            match (name.as_str(), arguments.next()) {
                ("--rows", Some(rows)) => parsed.rows = rows.parse()?,
                ("--kafka", Some(brokers)) => parsed.brokers = Some(brokers),
                _ => {
                    return Err(
                        "usage: bench-import [--rows N] [--kafka HOST:PORT], or bench-import generate N".into(),
                    );
                }
            }
        }
        Ok(parsed)
    }
}

async fn import(arguments: &Arguments, folder: &Path, csv: &Path, rejected: u64) -> Result<()> {
    let (process, address) = start(arguments.brokers.as_deref(), folder).await?;
    let idle = process.memory_bytes();
    process.forget_peak_memory();
    let (mut sse, _) = Subscriber::join(address, Transport::Sse, CHANNEL).await;
    let (web_socket, _) = Subscriber::join(address, Transport::WebSocket, CHANNEL).await;
    let cpu_before = cpu_time(process.pid())?;

    let begin = Instant::now();
    let posted = tokio::spawn(post(address, csv.to_owned()));
    let told = listen(&mut sse).await?;
    let elapsed = begin.elapsed();
    let (job, taken_in) = posted.await??;
    let cpu = cpu_time(process.pid())? - cpu_before;

    let events: Vec<Event> = told.iter().map(|(event, _)| event.clone()).collect();
    check_end(&events[events.len() - 1], &job, arguments.rows - rejected, rejected)?;
    let engine = arguments.brokers.as_ref().map_or("embedded log", |_| "Kafka");
    let per_second = |rows: u64, time: Duration| rows as f64 / time.as_secs_f64();
    println!(
        "{engine}: {:.0} rows/s, {:.1} s to job.completed ({:.1} s of them to the 202)",
        per_second(arguments.rows, elapsed),
        elapsed.as_secs_f64(),
        taken_in.as_secs_f64(),
    );
    println!(
        "memory: peak {:.0} MiB, {:.0} MiB before; processor time {:.1} s",
        mib(process.peak_memory_bytes()),
        mib(idle),
        cpu.as_secs_f64(),
    );
    let progress = events.iter().filter(|event| event.event_type == "job.progress").count();
    let consumed = events.iter().position(|event| event.event_type == "job.consumed");
    let told = &told[consumed.ok_or("no job.consumed")?..];
    let longest = told.windows(2).max_by_key(|two| two[1].1 - two[0].1).ok_or("no end")?;
    println!(
        "events: {progress} of progress, longest pause from job.consumed to job.completed {} ms, after {} of {} chunks",
        (longest[1].1 - longest[0].1).as_millis(),
        longest[0].0.data["chunks"]["done"],
        longest[0].0.data["chunks"]["total"],
    );
    drop((sse, web_socket));
    process.stop();
    Ok(())
}

/// The program, when it is ready.
async fn start(brokers: Option<&str>, folder: &Path) -> Result<(Process, SocketAddr)> {
    let prefix = format!("bench{:016x}", rand::random::<u64>());
    let settings = folder.join("barnabas.toml");
    let job_type = format!("[job_types.{JOB_TYPE}]\nformat = \"csv\"\ntopic = \"{prefix}.{JOB_TYPE}\"\n");
    std::fs::write(&settings, format!("[topics]\nprefix = \"{prefix}\"\n\n{job_type}"))?;
    let mut environment = vec![
        ("BARNABAS_LISTEN".to_owned(), "127.0.0.1:0".to_owned()),
        ("BARNABAS_CONFIG".to_owned(), settings.display().to_string()),
        (
            "BARNABAS_DATA_DIR".to_owned(),
            folder.join("data").display().to_string(),
        ),
    ];
    environment.extend(brokers.map(|brokers| ("KAFKA_BROKERS".to_owned(), brokers.to_owned())));
    let process = Process::start(&program("contacts-import"), &[], &environment, &folder.join("output"));
    let deadline = Instant::now() + READY_TIMEOUT;
    loop {
        // It says its address on a line of its own.
        let output = process.output();
        let address = output
            .lines()
            .find_map(|line| line.strip_prefix("http://")?.parse().ok());
        match address {
            Some(address) if is_ready(address) => return Ok((process, address)),
            _ if Instant::now() > deadline => return Err(process.last_output().into()),
            _ => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// Uploads the file as fast as it is taken. Returns the job's id and when it was answered.
async fn post(address: SocketAddr, csv: std::path::PathBuf) -> Result<(String, Duration)> {
    let begin = Instant::now();
    let file = tokio::fs::File::open(csv).await?;
    let pieces = futures_util::stream::unfold(file, |mut file| async move {
        let mut piece = BytesMut::with_capacity(PIECE_BYTES);
        // A file that was written a moment ago can be read.
        let read = file.read_buf(&mut piece).await.expect("the file can be read");
        (read > 0).then(|| (piece.freeze(), file))
    });
    let request = http::request(Method::POST, &jobs_path(CHANNEL)).header("content-type", "text/csv");
    let answer = http::send(address, request.body(http::pieces(pieces))?).await?;
    let id = answer.header("location").strip_prefix("/v1/jobs/").map(str::to_owned);
    Ok((id.ok_or_else(|| format!("{answer:?}"))?, begin.elapsed()))
}

/// The events of the job with the moment at which each came, to the last.
async fn listen(subscriber: &mut Subscriber) -> Result<Vec<(Event, Instant)>> {
    let mut told = Vec::new();
    loop {
        match subscriber.next().await {
            Push::Event(event) => {
                let last = is_end(&event);
                told.push((event, Instant::now()));
                if last {
                    return Ok(told);
                }
            }
            Push::Subscribed(_) => {}
            other => return Err(format!("{other:?} instead of an event").into()),
        }
    }
}

/// Whether everything is in, and only what is good.
fn check_end(event: &Event, job: &str, ok: u64, rejected: u64) -> Result<()> {
    let rows = serde_json::json!({"ok": ok, "rejected": rejected, "total": ok + rejected});
    if event.event_type == "job.completed" && event.subject.as_deref() == Some(job) && event.data["rows"] == rows {
        return Ok(());
    }
    Err(format!(
        "{} of {:?} with {}, not {rows}",
        event.event_type, event.subject, event.data["rows"]
    )
    .into())
}

/// Processor time that a process has used, of all its threads.
fn cpu_time(pid: u32) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in parentheses, may have spaces. User and system time are the 14th and 15th fields, in ticks of 10 ms.
    let (_, fields) = stat.rsplit_once(')').ok_or("no such field")?;
    let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
    Ok(Duration::from_millis(ticks.sum::<std::result::Result<u64, _>>()? * 10))
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / (1024.0 * 1024.0)
}
