//! The gateway: accepts jobs and events over HTTP, and pushes what happens to browsers by channel.
//!
//! [`Server::start`] makes the topics, warms the producers and listens; [`Server::serve`] answers until it is told to stop.
//! Every handler reaches everything through [`App`].

mod admin;
mod assets;
mod body;
mod channel_name;
pub mod config;
mod data_dir;
mod error;
pub mod event;
mod events;
mod feed;
mod health;
mod http;
mod idempotency;
pub mod job_state;
pub mod job_store;
pub mod job_view;
mod jobs;
mod origin;
mod outbox;
pub mod program;
mod schedules;
pub mod token;
mod topic_events;
mod trace;
mod transport;

use std::io;
use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::Arc;

use ::http::HeaderName;
use axum::Router;
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::log::{self, Log, Producer, ProducerSettings, TopicDescription};
use crate::patterns::schedule::Scheduler;
pub use admin::Admin;
pub use config::{Config, ConfigError};
pub use data_dir::DataDir;
pub use error::Error;
pub use feed::Feed;
pub(crate) use http::ConnectionPermit;
pub use idempotency::Idempotency;
use job_view::{JobView, JobViewError};
pub use jobs::Jobs;
use jobs::LaneContext;
pub use program::Program;
pub use schedules::Schedules;
pub use topic_events::TopicEvents;

/// What every handler can reach. Clones are cheap.
#[derive(Clone, Debug)]
pub struct App(Arc<AppParts>);

/// The parts of [`App`].
#[derive(Debug)]
pub struct AppParts {
    /// The settings.
    pub config: Config,
    /// The data folder, and who this node is.
    pub data: DataDir,
    /// The event log.
    pub log: Log,
    /// The producer for everything that needs no transaction, acks = all.
    pub producer: Producer,
    /// The topics that are open for posting.
    pub topic_events: TopicEvents,
    /// The topic of events on their way to browsers.
    pub notifications: TopicDescription,
    /// Pushes events to subscribers.
    pub feed: Feed,
    /// Takes jobs in.
    pub jobs: Jobs,
    /// Does requests that may be repeated.
    pub idempotency: Idempotency,
    /// What operators are shown.
    pub admin: Admin,
    /// The states of jobs; `None` when this node leaves them to others.
    pub job_view: Option<JobView>,
    /// Takes schedules in; `None` when no topic is open for posting.
    pub schedules: Option<Schedules>,
    /// Cancelled when the gateway is told to stop: streams tell their clients to come back, loops end.
    pub stopping: CancellationToken,
    /// Tasks that outlive the request that began them. All of them end soon after `stopping`.
    pub tasks: TaskTracker,
}

/// The header that carries a resume token in answers.
pub(crate) const TOKEN_HEADER: HeaderName = HeaderName::from_static("barnabas-token");

impl Deref for App {
    type Target = AppParts;

    fn deref(&self) -> &AppParts {
        &self.0
    }
}

/// The gateway could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {cause}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The data folder cannot be used.
    #[error("BARNABAS_DATA_DIR: {0}")]
    Data(#[source] io::Error),
    /// The log cannot be used, or its topics are not as they have to be.
    #[error(transparent)]
    Log(#[from] log::Error),
    /// The job view's file cannot be used.
    #[error(transparent)]
    JobView(#[from] JobViewError),
}

/// A gateway that is ready and listens; connections wait until it serves.
#[derive(Debug)]
pub struct Server {
    app: App,
    /// Dropped when no more requests come: what works for requests may end then.
    working: DropGuard,
    listener: TcpListener,
    address: SocketAddr,
}

/// Starts a gateway on an open log and serves until `stopping`; returns when everything is drained. The log stays open.
///
/// # Errors
/// Those of [`Server::start`].
pub async fn run(config: Config, log: Log, stopping: CancellationToken) -> Result<(), StartError> {
    Server::start(config, log, stopping).await?.serve().await;
    Ok(())
}

impl Server {
    /// Listens, makes the topics as they should be, and readies all that a first request needs.
    ///
    /// # Errors
    /// The address cannot be listened on, or the log not used.
    pub async fn start(config: Config, log: Log, stopping: CancellationToken) -> Result<Self, StartError> {
        let wanted = config.listen.address;
        let listen_error = |cause| StartError::Listen { address: wanted, cause };
        let listener = TcpListener::bind(wanted).await.map_err(listen_error)?;
        let address = listener.local_addr().map_err(listen_error)?;
        let data = DataDir::open(&config.data.dir).map_err(StartError::Data)?;
        make_topics(&config, &log).await?;
        let notifications = log.describe_topic(&config.topics.notifications()).await?;
        let producer = log.producer(ProducerSettings::default()).await?;
        let topic_events = TopicEvents::start(&config.events, &log, &producer).await?;
        let tasks = TaskTracker::new();
        let drained = CancellationToken::new();
        let working = drained.clone().drop_guard();
        let context = LaneContext {
            log: log.clone(),
            topics: config.topics.clone(),
            notifications: notifications.clone(),
            drained,
        };
        let idempotency = Idempotency::start(&config, &data, context.clone(), &producer, &tasks).await?;
        let jobs = Jobs::start(&config, &data, context, &tasks).await?;
        let feed = Feed::start(log.clone(), &notifications, &config.push, &tasks, stopping.clone()).await?;
        let job_view = match config.jobs.view {
            true => {
                let states = log.describe_topic(&config.topics.jobs()).await?;
                Some(JobView::open(&data.path, &states)?)
            }
            false => None,
        };
        let scheduler = || Scheduler::new(log.clone(), &config.topics.schedules(), producer.clone());
        let schedules = config.has_schedules().then(|| Schedules::new(scheduler()));
        let app = App(Arc::new(AppParts {
            config,
            data,
            log,
            producer,
            topic_events,
            notifications,
            feed,
            jobs,
            idempotency,
            admin: Admin::default(),
            job_view,
            schedules,
            stopping,
            tasks,
        }));
        Ok(Self {
            app,
            working,
            listener,
            address,
        })
    }

    /// The address that is listened on, with the port that was found for port 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers requests until told to stop, then drains: no new connections, the open ones end, then the tasks, each within the
    /// grace period.
    pub async fn serve(self) {
        tracing::info!(address = %self.address, "listening on http://{}", self.address);
        let Self {
            app, working, listener, ..
        } = self;
        app.tasks.spawn(own_jobs(app.clone()));
        app.tasks.spawn(admin::run_live(app.clone()));
        if let Some(view) = app.job_view.clone() {
            app.tasks
                .spawn(view.run(app.log.clone(), app.config.topics.jobs(), app.stopping.clone()));
        }
        if app.schedules.is_some() && app.config.schedules.fire {
            app.tasks.spawn(schedules::fire(app.clone()));
        }
        http::serve(listener, router(&app), &app.config.http, app.stopping.clone()).await;
        drop(working);
        app.tasks.close();
        if tokio::time::timeout(app.config.http.shutdown_grace, app.tasks.wait())
            .await
            .is_err()
        {
            tracing::warn!("{} tasks did not end in time", app.tasks.len());
        }
    }
}

/// Runs the job store. Without it no job would ever end, so when it cannot go on the gateway stops.
async fn own_jobs(app: App) {
    let store = job_store::run(app.log.clone(), app.config.topics.clone(), app.stopping.clone());
    if let Err(error) = store.await {
        tracing::error!(%error, "the job store cannot go on, the gateway stops: {error}");
        app.stopping.cancel();
    }
}

/// Plans the topics and carries the plan out, saying each change.
async fn make_topics(config: &Config, log: &Log) -> log::Result<()> {
    let plan = log.plan_topics(&config.topic_specs()).await?;
    for change in &plan.changes {
        tracing::info!(%change, "topics: {change}");
    }
    log.apply_topics(&plan).await
}

fn router(app: &App) -> Router {
    let origins = Arc::new(origin::Origins::new(&app.config.listen));
    Router::new()
        .merge(admin::routes())
        .merge(health::routes())
        .merge(events::routes())
        .merge(topic_events::routes())
        .merge(schedules::routes())
        .merge(jobs::routes())
        .merge(job_view::routes())
        .merge(transport::routes())
        .merge(assets::routes(&app.config.web))
        .layer(axum::middleware::map_response(error::name_refusals))
        .layer(axum::middleware::from_fn_with_state(origins, origin::check))
        .with_state(app.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_are_posted_and_looked_up_under_one_path() {
        // It panics when two routes contradict each other.
        let _: Router<App> = Router::new().merge(jobs::routes()).merge(job_view::routes());
    }
}
