//! Feeds the subscriptions of one partition that are behind, all of them together: one scan serves everybody who waits for
//! that part of the log, so that thousands who come back at once cost one read.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::partition::Partition;
use super::subscription::Subscription;
use super::{Feed, Gap, decode_frame};
use crate::log::{self, Batch, Reader, StartAt};

/// How long the reader is kept when nobody is behind.
const READER_LINGER: Duration = Duration::from_secs(30);
/// How long is waited after the log could not be read.
const RETRY: Duration = Duration::from_millis(500);

/// Runs until the gateway stops.
pub(super) async fn run(feed: Feed, partition: Arc<Partition>) {
    let stopping = feed.stopping().clone();
    let replay = Replay {
        feed,
        partition,
        reader: None,
    };
    tokio::select! {
        () = stopping.cancelled() => {}
        () = replay.run() => {}
    }
}

struct Replay {
    feed: Feed,
    partition: Arc<Partition>,
    /// Reads the log, and the offset at which it stands.
    reader: Option<(Reader, i64)>,
}

impl Replay {
    async fn run(mut self) {
        loop {
            let behind = {
                let _still = self.partition.pushing.lock().await;
                self.partition.still_behind()
            };
            let from = behind.iter().filter_map(|subscription| subscription.wants()).min();
            let Some(from) = from else {
                let changed = self.partition.behind_changed.notified();
                if tokio::time::timeout(READER_LINGER, changed).await.is_err() {
                    self.reader = None;
                }
                continue;
            };
            match self.page(from).await {
                Ok(page) => {
                    let _still = self.partition.pushing.lock().await;
                    self.serve(&behind, from, &page);
                }
                Err(log::Error::OffsetOutOfRange { start, .. }) => self.skip(&behind, start),
                Err(error) => {
                    tracing::warn!(%error, partition = self.partition.number, "replay: {error}");
                    self.reader = None;
                    tokio::time::sleep(RETRY).await;
                }
            }
            tokio::task::yield_now().await;
        }
    }

    /// The records from `from` on, as far as one read goes.
    async fn page(&mut self, from: i64) -> log::Result<Arc<Batch>> {
        if let Some(page) = self.partition.history().page(from) {
            return Ok(page);
        }
        let number = self.partition.number;
        let (mut reader, at) = match self.reader.take() {
            Some(reader) => reader,
            None => (self.feed.log().reader(self.feed.topic()).await?, -1),
        };
        if at != from {
            reader.assign(number, StartAt::Offset(from)).await?;
        }
        loop {
            let batch = reader.next().await?;
            // An empty one says only that the end was reached.
            if batch.next_offset.0 > from {
                self.reader = Some((reader, batch.next_offset.0));
                return Ok(Arc::new(batch));
            }
        }
    }

    /// Gives a page to all who are behind somewhere in it. In the order of the log across channels: a client that follows several
    /// and has room for less than the page gets the beginning of each, and can go on from one place.
    fn serve(&self, behind: &[Arc<Subscription>], from: i64, page: &Batch) {
        let next = page.next_offset.0;
        let mut waiting: HashMap<&str, Vec<&Arc<Subscription>>> = HashMap::new();
        for subscription in behind {
            if subscription
                .wants()
                .is_some_and(|wanted| (from..next).contains(&wanted))
            {
                waiting.entry(&subscription.channel).or_default().push(subscription);
            }
        }
        for record in page.records.iter().filter(|record| record.offset >= from) {
            let channel = record.key.as_deref().and_then(|key| std::str::from_utf8(key).ok());
            if let Some(subscriptions) = channel.and_then(|channel| waiting.get_mut(channel))
                && let Some(frame) = decode_frame(self.feed.topic_id(), self.partition.number, record)
            {
                // Who has no room for an event gets none of those after it either.
                subscriptions.retain(|subscription| subscription.replay(&frame));
            }
        }
        for subscription in waiting.into_values().flatten() {
            subscription.replayed_to(next);
        }
    }

    /// Retention has taken what is before `start`.
    fn skip(&self, behind: &[Arc<Subscription>], start: i64) {
        let token = |offset| self.feed.token_at(self.partition.number, offset).to_string();
        for subscription in behind {
            subscription.skip_to(start, |from| Gap {
                from: token(from),
                to: token(start),
                reason: "retention",
            });
        }
    }
}
