//! Runs one consumer as its argument says, a [`WorkerSettings`] in JSON, until SIGTERM, and adds a line to its ledger for each call
//! of the handler, each failure and each completion. The ledger is the tests' own: nothing in it comes from the library's counters.

mod clock;

use std::fs::File;
use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use barnabas::log::{ProducerRecord, Record};
use barnabas::patterns::consumer::{Context, Handler, HandlerError};
use barnabas_tests::consumer::{FaultKind, Line, WorkerSettings};
use tokio::signal::unix::{SignalKind, signal};

use self::clock::now_ms;

/// A consumer that has ended by itself is noticed after it.
const LOOK_STEP: Duration = Duration::from_millis(200);

struct Worker {
    settings: WorkerSettings,
    ledger: File,
}

impl Worker {
    /// One write, so that lines of several processes do not mix.
    fn note(&self, what: &str, context: &Context, record: &Record, number: u64) {
        let key = record.key.as_deref().unwrap_or_default();
        let line = Line {
            what: what.to_owned(),
            pid: std::process::id(),
            slot: self.settings.slot.clone(),
            topic: context.partition().topic.to_string(),
            partition: context.partition().partition,
            offset: record.offset,
            timestamp_ms: record.timestamp_ms,
            key: String::from_utf8_lossy(key).into_owned(),
            number,
            attempt: context.attempt(),
            at_ms: clock::machine_ms(),
        };
        let mut line = serde_json::to_string(&line).expect("a line is JSON");
        line.push('\n');
        (&self.ledger)
            .write_all(line.as_bytes())
            .expect("the ledger can be written");
    }
}

impl Handler for Worker {
    async fn handle(&self, context: &mut Context, record: &Record) -> Result<(), HandlerError> {
        let value = record.value.as_deref().unwrap_or_default();
        let number = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
        let number: u64 = number.ok_or_else(|| HandlerError::non_retriable("not a number"))?;
        self.note("call", context, record, number);
        if let Some(output) = &self.settings.output {
            let mut sent = ProducerRecord::to(output.as_str());
            sent.key.clone_from(&record.key);
            sent.value.clone_from(&record.value);
            let by = format!("{} {}", self.settings.slot, std::process::id());
            context.send(sent.header("worker", by));
        }
        if self.settings.work_max_us > 0 {
            let wait = rand::random_range(0..=self.settings.work_max_us);
            tokio::time::sleep(Duration::from_micros(wait)).await;
        }
        let fault = self
            .settings
            .fault(context.partition().partition, number, context.attempt());
        match fault {
            None => {}
            Some(FaultKind::Hang) => std::future::pending().await,
            Some(FaultKind::Abort) => std::process::abort(),
            Some(FaultKind::Fail | FaultKind::Hopeless | FaultKind::Panic) => {
                self.note("failed", context, record, number);
            }
        }
        match fault {
            Some(FaultKind::Fail) => return Err(HandlerError::retriable("told to fail")),
            Some(FaultKind::Hopeless) => return Err(HandlerError::non_retriable("told to fail for good")),
            Some(FaultKind::Panic) => panic!("told to panic"),
            _ => {}
        }
        self.note("done", context, record, number);
        Ok(())
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_ansi(false)
        .with_env_filter("info,barnabas=debug")
        .init();
    let settings = std::env::args().nth(1).map(|json| serde_json::from_str(&json));
    let Some(Ok(settings)) = settings else {
        eprintln!("usage: consumer-worker SETTINGS (as JSON): {settings:?}");
        return ExitCode::from(64);
    };
    let settings: WorkerSettings = settings;
    clock::set_ahead(settings.clock_ahead_ms);
    match run(settings).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{} consumer-worker ended: {error}", now_ms());
            ExitCode::FAILURE
        }
    }
}

async fn run(settings: WorkerSettings) -> Result<(), Box<dyn std::error::Error>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let ledger = File::options().create(true).append(true).open(&settings.ledger)?;
    // A broker that is away for a while is waited for, as a service is started again until it is there.
    let log = loop {
        match settings.open().await {
            Ok(log) => break log,
            Err(error) if error.is_retriable() => eprintln!("{} {error}", now_ms()),
            Err(error) => return Err(error.into()),
        }
    };
    let builder = settings.builder();
    // So is one that goes away while the consumer starts.
    let handle = loop {
        let worker = Worker {
            settings: settings.clone(),
            ledger: ledger.try_clone()?,
        };
        match builder.clone().start(&log, worker).await {
            Ok(handle) => break handle,
            Err(error) if error.is_retriable() => eprintln!("{} {error}", now_ms()),
            Err(error) => return Err(error.into()),
        }
    };
    loop {
        tokio::select! {
            _ = terminate.recv() => break handle.shutdown().await?,
            () = tokio::time::sleep(LOOK_STEP) => if handle.state().await.is_err() {
                break handle.ended().await?;
            },
        }
    }
    log.close().await;
    Ok(())
}
