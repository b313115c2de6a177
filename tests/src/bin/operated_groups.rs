//! A gateway, and beside it two consumer groups that get into trouble when told to: what the page of operators is tested with.
//!
//! It says the gateway's address on its first line, then a line `{"handled":KEY,"value":TEXT}` for each record that was handled. Each
//! line of its standard input is one record in JSON (see [`Told`]), or `{"heal":true}`, after which nothing fails any more. It ends with
//! its standard input.
//!
//! Records of topic `renewals` go to group `billing`, where a value that begins with `poison` blocks its key for an hour and one that
//! begins with `hopeless` becomes a dead letter. Those of `reminders` go to group `mail`, where `poison` waits ten minutes on a retry topic.
//! Those of `plans`, a table, nobody consumes. Events can be scheduled for topic `offers`. The projection `view` of `entries` does not run;
//! what it could not project would stand on the topic of its dead letters.

use std::io::BufRead as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use barnabas::log::{Log, Producer, ProducerRecord, ProducerSettings, Record, TopicSpec};
use barnabas::patterns::consumer::{ConsumerBuilder, ConsumerHandle, Context, Handler, HandlerError, ProcessingOrder};
use barnabas::patterns::projection::{ProjectionSettings, ViewSpec};
use barnabas::patterns::retry::{BackOff, RetryPolicy, RetryTopics};
use barnabas::patterns::table;
use barnabas::server::config::OpenTopic;
use barnabas::server::program::Failure;
use barnabas::server::{Config, Program, Server};
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

const HOUR: Duration = Duration::from_secs(3600);
const TEN_MINUTES: Duration = Duration::from_secs(600);

/// A line of the standard input.
#[derive(Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum Told {
    Heal {
        #[serde(rename = "heal")]
        _heal: bool,
    },
    Text {
        topic: String,
        key: String,
        value: String,
    },
    Bytes {
        topic: String,
        key: String,
        bytes: Vec<u8>,
    },
}

struct Patient {
    is_ill: Arc<AtomicBool>,
}

impl Handler for Patient {
    async fn handle(&self, _: &mut Context, record: &Record) -> Result<(), HandlerError> {
        let value = String::from_utf8_lossy(record.value.as_deref().unwrap_or_default());
        if self.is_ill.load(Ordering::SeqCst) {
            if value.contains("poison") {
                return Err(HandlerError::retriable("the card is declined"));
            }
            if value.contains("hopeless") {
                return Err(HandlerError::non_retriable("there is no such card"));
            }
        }
        let key = String::from_utf8_lossy(record.key.as_deref().unwrap_or_default());
        println!("{}", serde_json::json!({ "handled": key, "value": value }));
        Ok(())
    }
}

fn main() -> ExitCode {
    let program = Program {
        name: "operated-groups",
        purpose: "consumer groups in trouble, for the tests of the page of operators",
        more_help: "",
    };
    program.run_example(&[], |config, _, stopping| run(config, stopping))
}

async fn run(mut config: Config, stopping: CancellationToken) -> Result<(), Failure> {
    let log = config.open_log().await?;
    let prefix = config.topics.prefix.clone();
    let name = |name: &str| format!("{prefix}.{name}");
    let is_ill = Arc::new(AtomicBool::new(true));
    let billing = RetryPolicy::Blocking(BackOff::fixed(HOUR));
    let mail = RetryPolicy::NonBlocking(RetryTopics::new([TEN_MINUTES]));
    let consumers = [
        start(&log, &name("renewals"), &name("billing"), billing, &is_ill).await?,
        start(&log, &name("reminders"), &name("mail"), mail, &is_ill).await?,
    ];
    let offers = name("offers");
    let entries = TopicSpec::new(name("entries"), 1);
    make_topics(
        &log,
        &[table::topic(name("plans"), 2), TopicSpec::new(&offers, 1), entries],
    )
    .await?;
    let projection = ProjectionSettings::new(name("view"), [name("entries")], ViewSpec::new("entries"));
    make_topics(&log, &projection.topics(&log).await?).await?;
    config.events.topics.push(OpenTopic::new(offers));
    let server = Server::start(config, log.clone(), stopping.clone()).await?;
    println!("http://{}", server.address());
    let producer = log.producer(ProducerSettings::default()).await?;
    let listening = async {
        let ended = tokio::select! {
            () = stopping.cancelled() => Ok(()),
            ended = listen(&producer, &prefix, &is_ill) => ended,
        };
        stopping.cancel();
        ended
    };
    let ((), ended) = tokio::join!(server.serve(), listening);
    for consumer in consumers {
        consumer.shutdown().await?;
    }
    log.close().await;
    ended
}

async fn start(
    log: &Log,
    topic: &str,
    group: &str,
    retry: RetryPolicy,
    is_ill: &Arc<AtomicBool>,
) -> Result<ConsumerHandle, Failure> {
    let builder = ConsumerBuilder::new(group, [topic])
        .order(ProcessingOrder::Key)
        .retry(retry)
        .commit_interval(Duration::from_millis(50));
    make_topics(log, &[TopicSpec::new(topic, 2)]).await?;
    make_topics(log, &builder.topics(log).await?).await?;
    let is_ill = is_ill.clone();
    Ok(builder.start(log, Patient { is_ill }).await?)
}

async fn make_topics(log: &Log, wanted: &[TopicSpec]) -> Result<(), Failure> {
    let plan = log.plan_topics(wanted).await?;
    Ok(log.apply_topics(&plan).await?)
}

/// Does what it is told until there is nobody left to tell it.
async fn listen(producer: &Producer, prefix: &str, is_ill: &AtomicBool) -> Result<(), Failure> {
    let mut lines = stdin_lines();
    while let Some(line) = lines.recv().await {
        let (topic, key, value) = match serde_json::from_str(&line)? {
            Told::Heal { .. } => {
                is_ill.store(false, Ordering::SeqCst);
                continue;
            }
            Told::Text { topic, key, value } => (topic, key, value.into_bytes()),
            Told::Bytes { topic, key, bytes } => (topic, key, bytes),
        };
        let record = ProducerRecord::to(format!("{prefix}.{topic}").as_str())
            .key(key)
            .value(value);
        producer.append(record).await?;
    }
    Ok(())
}

/// The lines of the standard input, by a thread of their own: it may wait for one while everything else ends.
fn stdin_lines() -> mpsc::Receiver<String> {
    let (sender, lines) = mpsc::channel(64);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    lines
}
