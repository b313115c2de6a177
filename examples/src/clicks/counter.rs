//! The counter: the consumer that makes commands of events, and the window store that counts them.

use std::time::Duration;

use barnabas::log::{ProducerRecord, Record};
use barnabas::patterns::atomic_store::{AtomicStore, AtomicStoreSettings, command_record};
use barnabas::patterns::consumer::{
    ConsumerBuilder, ConsumerHandle, Context, DeliveryGuarantee, Handler, HandlerError,
};
use barnabas::patterns::window::{WindowValue, Windowed, Windows};
use barnabas::server::event::Event;
use barnabas::server::program::Failure;
use serde_json::value::to_raw_value;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{GRACE, Happened, MINUTE_MS, Names, TYPES};
use crate::scene::{Process, Scene};

/// What a killed counter has owned is its successor's so much later, the least that Kafka allows.
const SESSION: Duration = Duration::from_secs(6);

/// A running counter, in a process of its own so to speak. Dropped, it is killed.
pub(super) struct Counter {
    // Dropped before the consumer, whose own end would be a graceful one.
    _process: Process,
    consumer: ConsumerHandle,
    store: JoinHandle<Result<(), barnabas::patterns::Error>>,
    stopping: CancellationToken,
}

impl Counter {
    pub(super) async fn start(scene: &Scene, names: &Names, idle: Duration) -> Result<Self, Failure> {
        let builder = ConsumerBuilder::new(&names.group, [&names.events])
            .guarantee(DeliveryGuarantee::ExactlyOnce)
            .session_timeout(SESSION);
        scene.make(&builder.topics(&scene.log).await?).await?;
        let process = Process::start()?;
        let commands = Commands {
            store: names.store.clone(),
        };
        let log = scene.log.clone();
        let consumer = process
            .spawn(async move { builder.start(&log, commands).await })
            .await??;
        let stopping = CancellationToken::new();
        let settings = AtomicStoreSettings {
            session_timeout: SESSION,
            ..AtomicStoreSettings::new(&names.store)
        };
        let store = AtomicStore::run(scene.log.clone(), settings, minutes(names, idle), stopping.clone());
        Ok(Self {
            consumer,
            store: process.spawn(store),
            _process: process,
            stopping,
        })
    }

    /// Ends it where it stands.
    pub(super) fn kill(self) {
        drop(self);
    }

    /// Lets it finish what is in hand.
    pub(super) async fn stop(self) -> Result<(), Failure> {
        self.consumer.shutdown().await?;
        self.stopping.cancel();
        Ok(self.store.await??)
    }

    /// Waits for an end that nobody has asked for.
    pub(super) async fn ended(self) -> Result<(), Failure> {
        Ok(self.store.await??)
    }
}

/// Makes a command of each event, keyed by its type.
struct Commands {
    store: String,
}

impl Handler for Commands {
    async fn handle(&self, context: &mut Context, record: &Record) -> Result<(), HandlerError> {
        let event_type = record.headers.last_str("ce_type").unwrap_or_default();
        if !TYPES.contains(&event_type) {
            return Err(HandlerError::non_retriable(format!("{event_type:?} is not counted")));
        }
        let value = record.value.as_deref().unwrap_or_default();
        let mut happened: Happened = serde_json::from_slice(value).map_err(HandlerError::non_retriable)?;
        // A visitor's clock may be wrong, or lie: nothing has happened after it was sent.
        happened.at_ms = happened.at_ms.min(record.timestamp_ms);
        let command = command_record(&self.store, event_type, &happened);
        context.send(command.map_err(HandlerError::non_retriable)?);
        Ok(())
    }
}

/// Counts per minute. A minute is told to the page each second while it grows, and to the topic of minutes when it is closed.
fn minutes(names: &Names, idle: Duration) -> Windowed<Happened, u64> {
    let minutes = Windows::tumbling(Duration::from_millis(MINUTE_MS as u64)).grace(GRACE);
    let (notifications, channel) = (names.notifications.clone(), names.events.clone());
    let results = names.minutes.clone();
    Windowed::new(
        minutes,
        |happened: &Happened| happened.at_ms,
        |count: &mut u64, _| *count += 1,
    )
    .idle(idle)
    .on_update(Duration::from_secs(1), move |minute| {
        tell(&notifications, &channel, &minute)
    })
    .on_close(move |minute| {
        let json = serde_json::to_vec(&minute).expect("numbers and text are JSON");
        ProducerRecord::to(results.as_str())
            .key(minute.key.to_owned())
            .value(json)
    })
}

fn tell(notifications: &str, channel: &str, minute: &WindowValue<'_, u64>) -> ProducerRecord {
    let mut event = Event::new(channel, "minute");
    event.data = to_raw_value(minute).ok();
    event.into_record(notifications)
}
