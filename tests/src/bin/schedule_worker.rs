//! Owns schedules, and fires what is due, until it is killed: `schedule-worker NAME MAX_PENDING kafka BROKERS` or
//! `schedule-worker NAME MAX_PENDING embedded FOLDER`.

use std::process::ExitCode;
use std::time::Duration;

use barnabas::log::Log;
use barnabas::log::embedded::EmbeddedSettings;
use barnabas::log::kafka::KafkaSettings;
use barnabas::patterns::schedule::{self, SchedulerSettings};
use barnabas_tests::worker;
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> ExitCode {
    worker::log_to_stdout("info");
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, max_pending, engine, at] = arguments.as_slice() else {
        eprintln!("usage: schedule-worker NAME MAX_PENDING kafka|embedded BROKERS|FOLDER");
        return ExitCode::from(64);
    };
    let log = match engine.as_str() {
        "kafka" => Log::connect_kafka(KafkaSettings::new(at)).await,
        _ => Log::open_embedded(EmbeddedSettings::new(at)).await,
    };
    let run = async {
        let settings = SchedulerSettings {
            max_pending: max_pending.parse()?,
            session_timeout: Duration::from_secs(2),
            ..SchedulerSettings::new(name)
        };
        schedule::run(log?, settings, CancellationToken::new()).await?;
        Ok::<(), Box<dyn std::error::Error>>(())
    };
    worker::ended("schedule-worker", run.await)
}
