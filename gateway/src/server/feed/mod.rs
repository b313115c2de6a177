//! The feed: reads the notifications of this node's subscribers from the log, in no group, and pushes them.
//!
//! ```text
//! log ══ one reader, partitions on demand ══▶ dispatch ──▶ channels ──▶ live subscriptions ──▶ outboxes
//!                                                │                                              ▲
//!                                                └──▶ history ──▶ replay ──▶ those behind ──────┘
//! ```
//! A node reads only partitions for which it has subscribers, so its cost grows with them and not with the world's traffic.
//! Each partition has one sequence (the log's) and one task that follows it, so a channel's events are pushed in order.

mod channels;
mod frame;
mod history;
mod partition;
mod replay;
mod subscription;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::json;
use tokio::sync::{MutexGuard, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

#[cfg(feature = "conformance")]
pub(crate) use frame::web_socket_frame;
pub(crate) use frame::{Format, Frame, sse_id, sse_message, web_socket_text};
pub(crate) use partition::{Interested, Partition};
pub(crate) use subscription::{Cover, Subscription};

use self::channels::Channels;
use self::subscription::Burst;
use super::config::PushConfig;
use super::event::Event;
use super::outbox::Outbox;
use super::token::Token;
use crate::log::{
    self, Batch, Log, NextOffset, Reader, Record, StartAt, TopicDescription, TopicId, TopicPartition, partition_for_key,
};

/// Requests that wait for the feed's task. When the queue is full, who subscribes waits.
const WAITING_REQUESTS: usize = 64;
/// How long a partition is fed after its last subscriber has gone, and how often that is looked at.
const LINGER: Duration = Duration::from_secs(30);
/// How long is waited after the log could not be read.
const RETRY: Duration = Duration::from_millis(500);
/// `last=1` looks at so many records before the end at most.
const LAST_SCAN_RECORDS: i64 = 20_000;

/// A handle to the feed; clones share it. A part of [`super::App`].
#[derive(Clone, Debug)]
pub struct Feed(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    log: Log,
    topic: Arc<str>,
    topic_id: TopicId,
    partitions: Vec<Arc<Partition>>,
    channels: Channels,
    requests: mpsc::Sender<Activate>,
    stopping: CancellationToken,
}

/// Feed this partition, and say when it is fed.
#[derive(Debug)]
struct Activate {
    partition: Arc<Partition>,
    reply: oneshot::Sender<log::Result<()>>,
}

/// Where a subscription starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// With what comes from now on.
    Now,
    /// After what a token says was seen.
    After(Token),
    /// With the first event that is not older than a time, in milliseconds since the Unix epoch.
    Since(i64),
    /// With the first that is kept.
    Earliest,
    /// With the latest that there is.
    Last,
}

/// A channel of which it is known where its subscription starts.
#[derive(Debug)]
pub(crate) struct Ready {
    channel: Arc<str>,
    interested: Interested,
    next: i64,
    /// Whether it goes on exactly where a token left off.
    pub(crate) resumed: bool,
    /// For [`Start::Last`]: whether there was one within reach.
    pub(crate) found: Option<bool>,
    /// Why it cannot.
    pub(crate) gap: Option<Gap>,
}

/// Events between two places that a client has missed, or may have.
#[derive(Debug)]
pub(crate) struct Gap {
    /// The token that it came with.
    pub(crate) from: String,
    /// Where it goes on.
    pub(crate) to: String,
    /// `retention`: the events are no longer kept. `topic-recreated`: the token is of a topic that had this name before, or of
    /// another service. `foreign-token`: it is of other channels. `ahead-of-log`: the log has lost what the token has seen.
    pub(crate) reason: &'static str,
}

/// A running subscription. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Subscribed {
    subscription: Arc<Subscription>,
    feed: Feed,
    _interested: Interested,
}

impl Drop for Subscribed {
    fn drop(&mut self) {
        self.feed.0.channels.remove(&self.subscription);
        self.subscription.end();
    }
}

impl Subscribed {
    /// Whether it has caught up with the feed.
    pub(crate) fn is_live(&self) -> bool {
        self.subscription.is_live()
    }
}

/// Holds partitions still: while the guards live nothing is pushed of them, so that subscriptions of one client begin or end
/// at one place of each. In the order of their numbers, so that two clients never wait for each other.
pub(crate) async fn hold_still<'a>(partitions: impl Iterator<Item = &'a Arc<Partition>>) -> Vec<MutexGuard<'a, ()>> {
    let partitions: BTreeMap<i32, &Arc<Partition>> =
        partitions.map(|partition| (partition.number, partition)).collect();
    let mut guards = Vec::with_capacity(partitions.len());
    for partition in partitions.into_values() {
        guards.push(partition.pushing.lock().await);
    }
    guards
}

/// Ends subscriptions of one client together. Returns for each its partition and the offset up to which everything was pushed.
pub(crate) async fn end_all(subscribed: &[Subscribed]) -> Vec<(i32, i64)> {
    let _still = hold_still(subscribed.iter().map(|one| &one.subscription.partition)).await;
    let end = |one: &Subscribed| (one.subscription.partition.number, one.subscription.end());
    subscribed.iter().map(end).collect()
}

impl Ready {
    /// The token of where it starts.
    pub(crate) fn token(&self, feed: &Feed) -> Token {
        let (partition, next) = self.position();
        Token::at(feed.topic_id(), partition, NextOffset(next))
    }

    /// The partition and offset of where it starts.
    pub(crate) fn position(&self) -> (i32, i64) {
        (self.interested.0.number, self.next)
    }

    /// The partition.
    pub(crate) fn partition(&self) -> &Arc<Partition> {
        &self.interested.0
    }

    /// The channel.
    pub(crate) fn channel(&self) -> &str {
        &self.channel
    }
}

impl Feed {
    /// Starts the feed of a topic; nothing is read before somebody subscribes.
    ///
    /// # Errors
    /// The log cannot be read.
    pub(super) async fn start(
        log: Log,
        topic: &TopicDescription,
        config: &PushConfig,
        tasks: &TaskTracker,
        stopping: CancellationToken,
    ) -> log::Result<Self> {
        let reader = log.reader(&topic.name).await?;
        let (requests, queue) = mpsc::channel(WAITING_REQUESTS);
        let partitions = (0..topic.partitions).map(|number| Arc::new(Partition::new(number, config.history_bytes)));
        let feed = Self(Arc::new(Shared {
            log,
            topic: topic.name.as_str().into(),
            topic_id: topic.id,
            partitions: partitions.collect(),
            channels: Channels::default(),
            requests,
            stopping,
        }));
        for partition in &feed.0.partitions {
            tasks.spawn(replay::run(feed.clone(), partition.clone()));
        }
        tasks.spawn(feed.clone().run(reader, queue));
        Ok(feed)
    }

    /// The token of a place in the topic.
    pub(crate) fn token_at(&self, partition: i32, next_offset: i64) -> Token {
        Token::at(self.0.topic_id, partition, NextOffset(next_offset))
    }

    /// Finds out where a subscription of a channel starts, and has its partition fed.
    ///
    /// # Errors
    /// The log cannot be read.
    pub(crate) async fn resolve(&self, channel: &str, start: Start) -> log::Result<Ready> {
        let number = partition_for_key(channel.as_bytes(), self.0.partitions.len() as i32);
        let partition = self.0.partitions[number.unsigned_abs() as usize].clone();
        let interested = partition.interested();
        if !partition.is_fed() {
            let (reply, answer) = oneshot::channel();
            let activate = Activate {
                partition: partition.clone(),
                reply,
            };
            self.0.requests.send(activate).await.map_err(|_| log::Error::Closed)?;
            answer.await.map_err(|_| log::Error::Closed)??;
        }
        let now = partition.dispatched();
        if now < 0 {
            return Err(log::Error::Unavailable(format!("partition {number} is not fed")));
        }
        let place = TopicPartition::new(self.0.topic.clone(), number);
        let mut ready = Ready {
            channel: channel.into(),
            interested,
            next: now,
            resumed: false,
            found: None,
            gap: None,
        };
        match start {
            Start::Now => {}
            Start::Earliest => ready.next = self.0.log.offset(&place, StartAt::Start).await?,
            Start::Since(time_ms) => ready.next = self.0.log.offset(&place, StartAt::TimeMs(time_ms)).await?,
            Start::Last => {
                let last = self.last_event(channel, &partition).await?;
                ready.found = Some(last.is_some());
                ready.next = last.unwrap_or(now);
            }
            Start::After(token) => {
                let gap = |reason| {
                    let to = self.token_at(number, now).to_string();
                    Some(Gap {
                        from: token.to_string(),
                        to,
                        reason,
                    })
                };
                match token.position(number).map(|NextOffset(next)| next) {
                    _ if !token.is_of(self.0.topic_id) => ready.gap = gap("topic-recreated"),
                    None => ready.gap = gap("foreign-token"),
                    Some(next) if next > now && next > self.0.log.offset(&place, StartAt::End).await? => {
                        ready.gap = gap("ahead-of-log");
                    }
                    Some(next) => {
                        ready.next = next;
                        ready.resumed = true;
                        let start = if next < now {
                            self.start_of(&partition, &place, next).await?
                        } else {
                            next
                        };
                        if next < start {
                            let (from, to) = (token.to_string(), self.token_at(number, start).to_string());
                            ready.gap = Some(Gap {
                                from,
                                to,
                                reason: "retention",
                            });
                            (ready.next, ready.resumed) = (start, false);
                        }
                    }
                }
            }
        }
        Ok(ready)
    }

    /// The offset that a reader who wants `next` can start from.
    async fn start_of(&self, partition: &Partition, place: &TopicPartition, next: i64) -> log::Result<i64> {
        if partition.history().holds(next) {
            return Ok(next);
        }
        self.0.log.offset(place, StartAt::Start).await
    }

    /// Begins to push. What the transport has to say before the first event must be in the outbox by now.
    pub(crate) fn join(
        &self,
        ready: Ready,
        outbox: Arc<Outbox>,
        format: Format,
        cover: Option<(Arc<Cover>, usize)>,
    ) -> Subscribed {
        let Ready {
            channel,
            interested,
            next,
            ..
        } = ready;
        let partition = interested.0.clone();
        let subscription = Arc::new(Subscription::new(
            channel,
            partition.clone(),
            next,
            outbox,
            format,
            cover,
        ));
        // Known to the feed first: from here on it is either found live by a batch or kept behind.
        self.0.channels.insert(subscription.clone());
        if !subscription.try_go_live() {
            partition.fall_behind(subscription.clone());
        }
        Subscribed {
            subscription,
            feed: self.clone(),
            _interested: interested,
        }
    }

    fn log(&self) -> &Log {
        &self.0.log
    }

    fn topic(&self) -> &str {
        &self.0.topic
    }

    /// The identity of the topic, as tokens name it.
    pub(crate) fn topic_id(&self) -> TopicId {
        self.0.topic_id
    }

    fn stopping(&self) -> &CancellationToken {
        &self.0.stopping
    }

    /// The offset of a channel's latest event, within memory or a bounded way back in the log.
    async fn last_event(&self, channel: &str, partition: &Partition) -> log::Result<Option<i64>> {
        if let Some(offset) = partition.history().last_of(channel.as_bytes()) {
            return Ok(Some(offset));
        }
        let place = TopicPartition::new(self.0.topic.clone(), partition.number);
        let (start, end) = (self.0.log.offset(&place, StartAt::Start).await?, partition.dispatched());
        let mut next = start.max(end - LAST_SCAN_RECORDS);
        let mut last = None;
        if next < end {
            let mut reader = self.0.log.reader(&self.0.topic).await?;
            reader.assign(partition.number, StartAt::Offset(next)).await?;
            while next < end {
                let batch = reader.next().await?;
                let of_channel = batch
                    .records
                    .iter()
                    .rev()
                    .find(|record| record.key.as_deref() == Some(channel.as_bytes()));
                last = of_channel.map(|record| record.offset).or(last);
                next = batch.next_offset.0;
            }
        }
        Ok(last)
    }

    /// Follows the log until the gateway stops.
    async fn run(self, mut reader: Reader, mut requests: mpsc::Receiver<Activate>) {
        let mut tick = tokio::time::interval(LINGER);
        loop {
            tokio::select! {
                () = self.0.stopping.cancelled() => return,
                Some(Activate { partition, reply }) = requests.recv() => {
                    // Who asked may have gone.
                    let _ = reply.send(activate(&mut reader, &partition).await);
                }
                _ = tick.tick() => {
                    for partition in &self.0.partitions {
                        if partition.let_go(LINGER) && reader.unassign(partition.number).await.is_err() {
                            return;
                        }
                    }
                }
                batch = reader.next() => match batch {
                    Ok(batch) => self.dispatch(batch).await,
                    Err(error) => self.recover(&mut reader, error).await,
                }
            }
        }
    }

    /// Pushes a batch to all who listen and are live.
    async fn dispatch(&self, batch: Batch) {
        let partition = self.0.partitions[batch.partition.partition.unsigned_abs() as usize].clone();
        if !partition.is_fed() || batch.next_offset.0 <= partition.dispatched() {
            return;
        }
        let _pushing = partition.pushing.lock().await;
        let (from, next) = (partition.dispatched(), batch.next_offset.0);
        let batch = Arc::new(batch);
        partition.history().push(batch.clone());
        // From here on who is not live takes it from the history; see `subscription`.
        partition.publish_dispatched(next);
        for (channel, frames) in self.frames_by_channel(&batch) {
            let burst = Burst::new(frames, from, next);
            for (i, segment) in self.0.channels.snapshot(channel).into_iter().enumerate() {
                if i > 0 {
                    // Thousands of writes in one go would hold up every other request.
                    tokio::task::yield_now().await;
                }
                segment.iter().for_each(|subscription| subscription.deliver(&burst));
            }
        }
        partition.publish_completed(next);
    }

    /// The batch's events of channels that somebody listens to.
    fn frames_by_channel<'a>(&self, batch: &'a Batch) -> Vec<(&'a str, Vec<Frame>)> {
        let mut order: Vec<(&str, Vec<Frame>)> = Vec::new();
        let mut known: HashMap<&str, usize> = HashMap::new();
        for record in &batch.records {
            let Some(channel) = record.key.as_deref().and_then(|key| std::str::from_utf8(key).ok()) else {
                continue;
            };
            if !known.contains_key(channel) && !self.0.channels.contains(channel) {
                continue;
            }
            let index = *known.entry(channel).or_insert_with(|| {
                order.push((channel, Vec::new()));
                order.len() - 1
            });
            order[index]
                .1
                .extend(decode_frame(self.0.topic_id, batch.partition.partition, record));
        }
        order
    }

    async fn recover(&self, reader: &mut Reader, error: log::Error) {
        match error {
            // Retention has overtaken the feed itself. Its clients are sent away; coming back they are told what they missed.
            log::Error::OffsetOutOfRange {
                partition: TopicPartition { partition: number, .. },
                ..
            } => {
                tracing::error!(
                    partition = number,
                    "retention has overtaken the feed: its clients must come back"
                );
                let partition = &self.0.partitions[number.unsigned_abs() as usize];
                // Held, so that nobody goes live between the place where these end and the one where the feed goes on.
                let _still = partition.pushing.lock().await;
                self.0.channels.close_all(number);
                if let Err(error) = activate_anew(reader, partition).await {
                    // Who subscribes next has it tried again, and is told if that fails.
                    partition.publish_not_fed();
                    tracing::error!(%error, "partition {number} cannot be fed: {error}");
                }
            }
            log::Error::UnknownTopic(_) | log::Error::Closed => {
                tracing::error!(%error, "notifications cannot be read any more, the gateway stops: {error}");
                self.0.stopping.cancel();
            }
            error => {
                tracing::warn!(%error, "notifications cannot be read now: {error}");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

async fn activate(reader: &mut Reader, partition: &Partition) -> log::Result<()> {
    match partition.is_fed() {
        true => Ok(()),
        false => activate_anew(reader, partition).await,
    }
}

async fn activate_anew(reader: &mut Reader, partition: &Partition) -> log::Result<()> {
    let end = reader.assign(partition.number, StartAt::End).await?;
    partition.history().restart(end);
    partition.publish_completed(end);
    partition.publish_dispatched(end);
    Ok(())
}

/// The record's event as transports write it; `None`, with a warning, for one that is no event.
fn decode_frame(topic_id: TopicId, partition: i32, record: &Record) -> Option<Frame> {
    match Event::from_record(record, || format!("{partition}-{}", record.offset)) {
        Ok(event) => {
            let token = Token::at(topic_id, partition, NextOffset(record.offset + 1)).to_string();
            Some(Frame::new(record.offset, token, &event))
        }
        Err(error) => {
            tracing::warn!(%error, partition, offset = record.offset, "a record is passed over: {error}");
            None
        }
    }
}

impl Gap {
    /// The gap as a transport writes it. On an event stream it has the id of where the client goes on, if that is the place of all
    /// that the stream carries (`is_whole`).
    pub(crate) fn write(&self, channel: &str, format: Format, is_whole: bool) -> Bytes {
        let json = json!({"channel": channel, "from": self.from, "to": self.to, "reason": self.reason});
        match format {
            Format::WebSocket => web_socket_text(json!({"gap": json}).to_string().as_bytes()),
            Format::Sse => sse_message("gap", is_whole.then_some(&self.to), json.to_string().as_bytes()),
            Format::Json => json!({"gap": json}).to_string().into(),
        }
    }
}
