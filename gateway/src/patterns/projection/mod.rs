//! Consume and project: a service keeps the part of another's events that it needs in its own database, and serves reads from there.
//!
//! ```text
//! topics ══▶ group member ─▶ Projector: event ─▶ upserts, deletes ══ one transaction: rows + next offsets ══▶ {view}_g1 ◀── {view} ◀── readers
//!                                    └ cannot be projected ══▶ {topic}.{group}.dlt
//! ```
//! The database says where to go on. The group shares the partitions out among the instances, and shows the lag; what it has committed counts
//! for nothing.
//!
//! A projection of a higher [`ProjectionSettings::version`] builds its view beside the live one, into tables of a *generation* of its own.
//! Once it is nowhere behind, the name of the view is given to it, in one transaction, and the old tables are dropped.
//!
//! Invariant: the rows of a generation are what its events say up to the offsets that stand beside them, and no instance writes rows for
//! offsets that another has passed.

mod database;
mod follower;
mod generations;
mod view;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

pub use self::database::{Database, DatabaseError};
pub use self::view::{Change, ColumnType, ViewSpec};

use self::follower::{Ended, Follower};
use self::generations::{Generation, Generations};
use super::consumer::Cause;
use super::dead_letter::{self, KEEP_DEAD_LETTERS, dead_letter_topic};
use super::retry::BackOff;
use super::{Error, LOOK_EVERY, MISSED_LOOKS};
use crate::log::{self, Log, Producer, ProducerSettings, Record, TopicDescription, TopicSpec};

/// First and longest wait before what failed is tried again.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Requests of the handle that may wait. When the queue is full the next one waits.
const REQUESTS: usize = 4;

/// What a view keeps of events. Both functions are pure: the same event gives the same changes. Whatever they do wrong, a panic included,
/// makes a dead letter of that event, and of no other.
pub trait Projector: Send + Sync + 'static {
    /// An event.
    type Event: DeserializeOwned;
    /// A row. Its fields are the columns of the view.
    type Row: Serialize;

    /// What the event does to the view; nothing is no change.
    ///
    /// # Errors
    /// The event cannot be projected, now or ever.
    fn project(&self, event: Self::Event) -> Result<Vec<Change<Self::Row>>, Cause>;

    /// Reads the event of a record: its value as JSON.
    ///
    /// # Errors
    /// The record is no event.
    fn decode(&self, record: &Record) -> Result<Self::Event, Cause> {
        let value = record.value.as_deref().ok_or("the record has no value")?;
        Ok(serde_json::from_slice(value)?)
    }
}

/// What is projected, and where to.
#[derive(Clone, Debug)]
pub struct ProjectionSettings {
    /// The group: it names the dead letters (`{topic}.{group}.dlt`) and, with the number of the generation (`{group}.g1`), the consumer
    /// group in which instances share the partitions.
    pub group: String,
    /// The topics whose events are projected. Events of one partition are projected in order; those of different ones in any.
    pub topics: Vec<String>,
    /// The view.
    pub view: ViewSpec,
    /// The version of the projection. Raise it when the [`Projector`], the view or the topics change: the view is then built anew beside the
    /// live one. An instance of a lower version than that of the live view ends with [`Error::Superseded`]. Default 1.
    pub version: u32,
    /// After it the partitions of an instance that cannot be heard go to another. Default 10 s.
    pub session_timeout: Duration,
}

impl ProjectionSettings {
    /// A projection of `topics` into `view`, everything else at its default.
    pub fn new(group: impl Into<String>, topics: impl IntoIterator<Item = impl Into<String>>, view: ViewSpec) -> Self {
        Self {
            group: group.into(),
            topics: topics.into_iter().map(Into::into).collect(),
            view,
            version: 1,
            session_timeout: Duration::from_secs(10),
        }
    }

    /// The topics that the projection needs beside those it projects: its dead letters, kept for four weeks, and those by which operators
    /// look at them and discard them. They have to exist when it starts; [`Log::plan_topics`] and [`Log::apply_topics`] make them.
    ///
    /// # Errors
    /// [`Error::Log`] for a topic that does not exist.
    pub async fn topics(&self, log: &Log) -> Result<Vec<TopicSpec>, Error> {
        let mut specs = dead_letter::settling(&self.group, KEEP_DEAD_LETTERS).to_vec();
        for topic in &self.topics {
            let topic = log.describe_topic(topic).await?;
            specs.push(dead_letter::letters(&topic, &self.group, KEEP_DEAD_LETTERS));
        }
        Ok(specs)
    }
}

/// A running projection. Dropped, it stops as [`Projection::shutdown`] does, without anybody waiting for it.
#[derive(Debug)]
pub struct Projection {
    rebuilds: mpsc::Sender<oneshot::Sender<i64>>,
    /// The generation that readers see, once it is one of this version.
    live: watch::Receiver<Option<i64>>,
    stopping: CancellationToken,
    runner: JoinHandle<Result<(), Error>>,
}

impl Projection {
    /// Begins to project, in tasks of the current tokio runtime. A database that is away is waited for.
    ///
    /// # Errors
    /// [`Error::Setting`] for a view that no database would take; [`Error::MissingTopics`] for topics that do not exist, and
    /// [`Error::PartitionCounts`] for dead letters with fewer partitions than their topic; [`Error::Log`].
    pub async fn start<P: Projector>(
        log: &Log,
        database: Database,
        settings: ProjectionSettings,
        projector: P,
    ) -> Result<Self, Error> {
        settings.view.check()?;
        let topics = described(log, &settings).await?;
        let producer = log.producer(ProducerSettings::default()).await?;
        let generations = Generations::new(database, settings.view.clone(), settings.version, topics.values());
        let (rebuilds, requests) = mpsc::channel(REQUESTS);
        let (told, live) = watch::channel(None);
        let stopping = CancellationToken::new();
        let shared = Arc::new(Shared {
            log: log.clone(),
            producer,
            settings,
            projector,
            generations,
            topics,
            live: told,
            stopping: stopping.clone(),
        });
        Ok(Self {
            rebuilds,
            live,
            stopping,
            runner: tokio::spawn(run(shared, requests)),
        })
    }

    /// Drops a view with all its generations, and what is known of them. Nothing may project into it meanwhile, or it comes again.
    ///
    /// # Errors
    /// The database cannot be reached, or refuses: as for the name of something that is no view.
    pub async fn remove(database: &Database, view: &str) -> Result<(), Error> {
        let view = ViewSpec::new(view);
        view.check_name(view.name())?;
        Ok(Generations::new(database.clone(), view, 0, []).remove().await?)
    }

    /// Waits until readers see a view of this version. One that is new by then is complete up to where its topics ended when its building
    /// began, or further; one that was there before is as it was left, and is being brought up to date.
    ///
    /// # Errors
    /// [`log::Error::Closed`] when the projection has ended; [`Projection::ended`] says why.
    pub async fn ready(&self) -> log::Result<()> {
        self.until_live(0).await
    }

    /// Builds the view anew beside the live one, from the first event that is kept, and returns when readers see it.
    ///
    /// # Errors
    /// [`log::Error::Closed`] when the projection has ended.
    pub async fn rebuild(&self) -> log::Result<()> {
        let (reply, answer) = oneshot::channel();
        self.rebuilds.send(reply).await.map_err(|_| log::Error::Closed)?;
        let generation = answer.await.map_err(|_| log::Error::Closed)?;
        self.until_live(generation).await
    }

    async fn until_live(&self, generation: i64) -> log::Result<()> {
        let mut live = self.live.clone();
        let is_there = |live: &Option<i64>| live.is_some_and(|live| live >= generation);
        live.wait_for(is_there).await.map_err(|_| log::Error::Closed)?;
        Ok(())
    }

    /// Finishes the transaction that is under way and leaves the group.
    ///
    /// # Errors
    /// What had ended the projection before.
    pub async fn shutdown(self) -> Result<(), Error> {
        self.stopping.cancel();
        self.ended().await
    }

    /// Waits until the projection has ended.
    ///
    /// # Errors
    /// [`Error::Superseded`] when the view is of a newer version; [`Error::Setting`] when the version has to be raised; [`Error::Log`] when
    /// the log refused in a way that trying again does not help, such as [`log::Error::OffsetOutOfRange`] for events that retention has
    /// taken before they were projected.
    pub async fn ended(mut self) -> Result<(), Error> {
        match (&mut self.runner).await {
            Ok(ended) => ended,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            // Only the end of the runtime cancels the task.
            Err(_) => Err(log::Error::Closed.into()),
        }
    }
}

impl Drop for Projection {
    fn drop(&mut self) {
        self.stopping.cancel();
    }
}

/// What the tasks of a projection share.
struct Shared<P> {
    log: Log,
    producer: Producer,
    settings: ProjectionSettings,
    projector: P,
    generations: Generations,
    topics: BTreeMap<String, TopicDescription>,
    live: watch::Sender<Option<i64>>,
    stopping: CancellationToken,
}

impl<P> Shared<P> {
    /// Waits after so many failures, the last of them `error`, which passes by itself. False: the projection stops.
    ///
    /// # Errors
    /// The error, if it does not pass by itself.
    async fn wait(&self, failed: u32, error: Error) -> Result<bool, Error> {
        let is_passing = matches!(error, Error::Database(_)) || error.is_retriable();
        if !is_passing {
            return Err(error);
        }
        let view = self.settings.view.name();
        tracing::warn!(view, failed, %error, "the view {view} waits: {error}");
        let back_off = BackOff::exponential(BACK_OFF.0, 2.0, BACK_OFF.1).infinite().jitter(0.2);
        tokio::select! {
            () = self.stopping.cancelled() => Ok(false),
            () = tokio::time::sleep(back_off.delay(failed).unwrap_or(BACK_OFF.1)) => Ok(true),
        }
    }
}

/// Asks anew until there is an answer; `None`: the projection stops before that. The function around it returns what does not pass by itself.
macro_rules! insist {
    ($shared:expr, $ask:expr) => {{
        let mut failed = 0;
        loop {
            match $ask.await {
                Ok(answer) => break Some(answer),
                Err(error) => {
                    failed += 1;
                    if !$shared.wait(failed, Error::from(error)).await? {
                        break None;
                    }
                }
            }
        }
    }};
}
use insist;

/// Has a follower for the generation to project into, and one for each that is built beside it, until `stopping`.
///
/// Tasks live in a `JoinSet` so that dropping this future stops them, as killing the process would.
async fn run<P: Projector>(
    shared: Arc<Shared<P>>,
    mut requests: mpsc::Receiver<oneshot::Sender<i64>>,
) -> Result<(), Error> {
    let mut followers = JoinSet::new();
    // What is no longer live is dropped beside everything else: on PostgreSQL that waits for those who still read it.
    let mut dropping = JoinSet::new();
    let mut live = shared.live.subscribe();
    loop {
        if followers.is_empty() {
            match insist!(shared, shared.generations.find()) {
                Some(generation) => drop(followers.spawn(follow(shared.clone(), generation))),
                None => return Ok(()),
            }
        }
        tokio::select! {
            Some(reply) = requests.recv() => {
                let Some(generation) = insist!(shared, shared.generations.create()) else {
                    return Ok(());
                };
                followers.spawn(follow(shared.clone(), generation));
                // Who does not wait for it any more may still want it.
                let _ = reply.send(generation.number);
            }
            Some(ended) = followers.join_next() => match ended {
                Ok(Ok(Ended::Superseded)) => {}
                Ok(Ok(Ended::Stopped)) => {
                    while let Some(ended) = followers.join_next().await {
                        ended.map_err(|_| log::Error::Closed)??;
                    }
                    return Ok(());
                }
                Ok(Err(error)) => return Err(error),
                Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                Err(_) => return Err(log::Error::Closed.into()),
            },
            Ok(()) = live.changed() => {
                let generation = *live.borrow_and_update();
                dropping.spawn(drop_before(shared.clone(), generation.unwrap_or(0)));
            }
            Some(_) = dropping.join_next() => {}
        }
    }
}

async fn follow<P: Projector>(shared: Arc<Shared<P>>, generation: Generation) -> Result<Ended, Error> {
    Follower::new(shared, generation).run().await
}

/// Drops the generations before one. What could not be dropped is dropped after the next start.
async fn drop_before<P: Projector>(shared: Arc<Shared<P>>, generation: i64) {
    if let Err(error) = shared.generations.drop_before(generation).await {
        let view = shared.settings.view.name();
        tracing::warn!(view, %error, "an old generation of {view} could not be dropped: {error}");
    }
}

/// The consumer group of a projection's generation.
fn generation_group(projection: &str, generation: i64) -> String {
    format!("{projection}.g{generation}")
}

/// The projection of which a consumer group of this name would be a generation; `None`: of none.
pub fn projection_of_group(group: &str) -> Option<&str> {
    let (projection, generation) = group.rsplit_once(".g")?;
    generation.parse::<i64>().is_ok().then_some(projection)
}

/// The topics, which have to exist with those of their dead letters.
async fn described(log: &Log, settings: &ProjectionSettings) -> Result<BTreeMap<String, TopicDescription>, Error> {
    let mut looks = 0;
    loop {
        match look(log, settings).await {
            Err(Error::MissingTopics(_)) if looks < MISSED_LOOKS => looks += 1,
            looked => return looked,
        }
        sleep(LOOK_EVERY).await;
    }
}

async fn look(log: &Log, settings: &ProjectionSettings) -> Result<BTreeMap<String, TopicDescription>, Error> {
    let (mut topics, mut missing) = (BTreeMap::new(), Vec::new());
    for topic in &settings.topics {
        let letters = dead_letter_topic(topic, &settings.group);
        let mut found = Vec::new();
        for name in [topic, &letters] {
            match log.describe_topic(name).await {
                Ok(topic) => found.push(topic),
                Err(log::Error::UnknownTopic(_)) => missing.push(name.clone()),
                Err(error) => return Err(error.into()),
            }
        }
        let Ok([source, letters]) = <[TopicDescription; 2]>::try_from(found) else {
            continue;
        };
        if letters.partitions < source.partitions {
            return Err(Error::PartitionCounts {
                left: source.name,
                left_partitions: source.partitions,
                right: letters.name,
                right_partitions: letters.partitions,
            });
        }
        topics.insert(topic.clone(), source);
    }
    match missing.is_empty() {
        true if topics.is_empty() => Err(Error::Setting {
            setting: "topics",
            reason: "there is none to project".to_owned(),
        }),
        true => Ok(topics),
        false => Err(Error::MissingTopics(missing)),
    }
}
