//! A read model that lives: it replays what has happened, and goes on from there with what comes.
//!
//! The end of the replay is where the live reading starts, so nothing is missed and nothing taken twice.

use std::sync::{Arc, Mutex, PoisonError};

use barnabas::log::{Log, Record, StartAt};
use barnabas::patterns::replay::Replay;
use barnabas::server::program::Failure;
use tokio::task::JoinHandle;

use super::stock::ReadModel;

/// A read model that follows a topic until it is dropped.
#[derive(Debug)]
pub struct Live<M> {
    seen: Arc<Mutex<Seen<M>>>,
    following: JoinHandle<()>,
}

/// What was made of the events so far.
#[derive(Clone, Debug, Default)]
pub struct Seen<M> {
    /// The read model.
    pub model: M,
    /// How many events it has.
    pub events: usize,
    /// The time of the latest, in milliseconds since the Unix epoch.
    pub latest_ms: i64,
}

impl<M: ReadModel> Seen<M> {
    fn take(&mut self, record: &Record) -> serde_json::Result<()> {
        self.model.apply_record(record)?;
        self.events += 1;
        self.latest_ms = self.latest_ms.max(record.timestamp_ms);
        Ok(())
    }
}

impl<M: ReadModel + Clone> Live<M> {
    /// Replays a topic of events, and follows it.
    ///
    /// # Errors
    /// The log refuses, or holds something else.
    pub async fn follow(log: &Log, topic: &str) -> Result<Self, Failure> {
        let mut seen = Seen::default();
        let mut replaying = Replay::topic(topic).open(log).await?;
        while let Some(event) = replaying.next().await? {
            seen.take(&event)?;
        }
        let mut reader = log.reader(topic).await?;
        for (partition, offsets) in replaying.offsets() {
            reader.assign(*partition, StartAt::Offset(offsets.end)).await?;
        }
        let seen = Arc::new(Mutex::new(seen));
        let shared = seen.clone();
        let following = tokio::spawn(async move {
            loop {
                let taken = match reader.next().await {
                    Ok(batch) => {
                        let mut seen = shared.lock().unwrap_or_else(PoisonError::into_inner);
                        batch
                            .records
                            .iter()
                            .try_for_each(|record| seen.take(record))
                            .map_err(Failure::from)
                    }
                    Err(error) => Err(error.into()),
                };
                if let Err(error) = taken {
                    tracing::error!(%error, "the read model stands still: {error}");
                    return;
                }
            }
        });
        Ok(Self { seen, following })
    }

    /// As it is now.
    pub fn seen(&self) -> Seen<M> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl<M> Drop for Live<M> {
    fn drop(&mut self) {
        self.following.abort();
    }
}
