//! Consume and project: which apps are installed where, in a database of one's own, from the events of the service that installs them.
//!
//! ```text
//! app-events ══▶ projection ── one transaction: rows + offsets ──▶ installed_apps ◀── GET /sites/{site}/apps, /apps/{app}
//!                   └ an event that nobody can read ══▶ dead letters
//! ```
//! The story ends with what it promises: the view is the fold of the events, made here a second time from the log. Meanwhile the
//! projection is changed, and its view built anew beside the one that is read.

mod api;
mod projector;
mod store;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use barnabas::log::{Producer, ProducerRecord, ProducerSettings, Record, TopicSpec};
use barnabas::patterns::Error;
use barnabas::patterns::dead_letter::dead_letter_topic;
use barnabas::patterns::projection::Projection;
use barnabas::server::program::Failure;
use http_body_util::{BodyExt as _, Empty};
use hyper::Request;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

pub use self::api::Api;
pub use self::projector::{AppEvent, InstalledApp, InstalledApps, VIEW};
pub use self::store::Store;

use crate::scene::Scene;

const SITES: [&str; 8] = ["berlin", "cairo", "hanoi", "lima", "lisbon", "oslo", "quito", "turin"];
const APPS: [&str; 6] = ["board", "chat", "files", "mail", "tracker", "wiki"];

/// Events of each of the three parts of the story.
const EVENTS: u32 = 1000;

/// Between two events that go on happening with `--serve`.
const PACE: Duration = Duration::from_millis(500);

/// Projects, changes the projection while events come, and compares what readers see with the log.
///
/// # Errors
/// The log or the database refuses.
pub async fn run(scene: &Scene, store: &Store) -> Result<Report, Failure> {
    let (events, group) = (scene.name("app-events"), scene.name("app-directory"));
    let mut happening = Happening::start(scene, &events).await?;
    happening.go_on(EVENTS).await?;
    let first = start(scene, store, 1, &group, &events).await?;
    first.ready().await?;
    println!("{EVENTS} events are projected, and readers have the view");

    happening.unreadable().await?;
    happening.go_on(EVENTS).await?;
    let api = Api::start(store.clone()).await?;
    println!(
        "as many again come, and one that nobody can read; {} answers",
        api.address
    );

    println!("the projection is changed: its view is built anew beside the one that is read");
    let second = start(scene, store, 2, &group, &events).await?;
    let (is_ready, happened) = tokio::join!(second.ready(), happening.go_on(EVENTS));
    is_ready?;
    happened?;
    match first.ended().await {
        Err(Error::Superseded { .. }) => println!("readers have the new view, and the old projection has ended"),
        ended => return Err(format!("the old projection ended otherwise: {ended:?}").into()),
    }

    let fold = fold(&scene.read(&events).await?);
    scene.until(async || Ok(sorted(store.all().await?) == fold)).await?;
    let site = SITES[4];
    let report = Report {
        events: happening.number + 1,
        dead_letters: scene.read(&dead_letter_topic(&events, &group)).await?.len(),
        view: sorted(store.all().await?),
        fold,
        site: site.to_owned(),
        answer: apps(api.address, &format!("/sites/{site}/apps")).await?,
    };
    api.stop().await?;
    second.shutdown().await?;
    Ok(report)
}

/// Projects events that go on happening, and serves the view until `stopping`.
///
/// # Errors
/// The log or the database refuses.
pub async fn serve(scene: &Scene, store: &Store, stopping: CancellationToken) -> Result<(), Failure> {
    let (events, group) = (scene.name("app-events"), scene.name("app-directory"));
    let mut happening = Happening::start(scene, &events).await?;
    happening.go_on(EVENTS).await?;
    let projection = start(scene, store, 2, &group, &events).await?;
    projection.ready().await?;
    let api = Api::start(store.clone()).await?;
    println!(
        "Something happens twice in a second. Ask for it, as often as you like:\n\n    curl http://{0}/sites/{1}/apps\n    \
         curl http://{0}/apps/{2}\n",
        api.address, SITES[4], APPS[1]
    );
    let ended = loop {
        tokio::select! {
            () = stopping.cancelled() => break Ok(()),
            () = tokio::time::sleep(PACE) => if let Err(error) = happening.go_on(1).await {
                break Err(error);
            },
        }
    };
    api.stop().await?;
    projection.shutdown().await?;
    ended
}

/// Starts the projection as one of its versions.
async fn start(scene: &Scene, store: &Store, version: u32, group: &str, events: &str) -> Result<Projection, Failure> {
    let projector = InstalledApps { version };
    let settings = projector.settings(group.to_owned(), events.to_owned());
    scene.make(&settings.topics(&scene.log).await?).await?;
    Ok(Projection::start(&scene.log, store.database.clone(), settings, projector).await?)
}

/// The service that installs apps.
struct Happening {
    producer: Producer,
    topic: String,
    /// Events so far.
    number: u32,
}

impl Happening {
    async fn start(scene: &Scene, topic: &str) -> Result<Self, Failure> {
        scene.make(&[TopicSpec::new(topic, 4)]).await?;
        Ok(Self {
            producer: scene.log.producer(ProducerSettings::default()).await?,
            topic: topic.to_owned(),
            number: 0,
        })
    }

    async fn go_on(&mut self, events: u32) -> Result<(), Failure> {
        let mut deliveries = Vec::new();
        for _ in 0..events {
            let event = event(self.number);
            self.number += 1;
            let record = ProducerRecord::to(self.topic.as_str())
                .key(event.site().to_owned())
                .value(serde_json::to_vec(&event)?);
            deliveries.push(self.producer.send(record).await?);
        }
        for delivery in deliveries {
            delivery.await?;
        }
        Ok(())
    }

    async fn unreadable(&self) -> Result<(), Failure> {
        let record = ProducerRecord::to(self.topic.as_str()).key(SITES[0]).value("<app/>");
        self.producer.append(record).await?;
        Ok(())
    }
}

/// The event with this number: mixed, and the same in each run.
fn event(number: u32) -> AppEvent {
    let mixed = number.wrapping_mul(2_654_435_761) >> 8;
    let pick = |names: &[&str], of: u32| names[of as usize % names.len()].to_owned();
    let (site, app) = (pick(&SITES, mixed), pick(&APPS, mixed / 8));
    let version = format!("{}.{}", number / 300 + 1, number % 300);
    match mixed / 64 % 40 {
        0 => AppEvent::SiteClosed { site },
        1..=7 => AppEvent::Uninstalled { site, app },
        8..=20 => AppEvent::Updated { site, app, version },
        _ => AppEvent::Installed { site, app, version },
    }
}

/// What the events say, without a database.
fn fold(records: &[Record]) -> Vec<InstalledApp> {
    let mut apps = BTreeMap::new();
    for record in records {
        match serde_json::from_slice(record.value.as_deref().unwrap_or_default()) {
            Ok(AppEvent::Installed { site, app, version } | AppEvent::Updated { site, app, version }) => {
                apps.insert((site, app), version);
            }
            Ok(AppEvent::Uninstalled { site, app }) => drop(apps.remove(&(site, app))),
            Ok(AppEvent::SiteClosed { site: closed }) => apps.retain(|(site, _), _| *site != closed),
            Err(_) => {}
        }
    }
    let app = |((site, app), version): ((String, String), String)| InstalledApp {
        major: version.split('.').next().and_then(|major| major.parse().ok()),
        site,
        app,
        version,
    };
    apps.into_iter().map(app).collect()
}

fn sorted(mut apps: Vec<InstalledApp>) -> Vec<InstalledApp> {
    apps.sort();
    apps
}

/// Asks the API.
async fn apps(address: SocketAddr, path: &str) -> Result<Vec<InstalledApp>, Failure> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::get(path).header("host", address.to_string());
    let ask = async {
        let answer = sender.send_request(request.body(Empty::<Bytes>::new())?).await?;
        let body = answer.into_body().collect().await?.to_bytes();
        Ok::<_, Failure>(serde_json::from_slice(&body)?)
    };
    tokio::select! {
        answer = ask => answer,
        ended = connection => Err(format!("the connection ended: {ended:?}").into()),
    }
}

/// What readers see, and what the log says.
#[derive(Clone, Debug)]
pub struct Report {
    /// Events, the unreadable one counted.
    pub events: u32,
    /// Events that could not be projected.
    pub dead_letters: usize,
    /// What stands in the view.
    pub view: Vec<InstalledApp>,
    /// What should.
    pub fold: Vec<InstalledApp>,
    /// A site for which the API was asked.
    pub site: String,
    /// What it answered.
    pub answer: Vec<InstalledApp>,
}

impl Report {
    /// Whether the view is what the events say, with what only the second version knows, and the API answers so.
    pub fn is_right(&self) -> bool {
        let of_site = self.fold.iter().filter(|app| app.site == self.site);
        let has_majors = self.view.iter().all(|app| app.major.is_some());
        self.view == self.fold && has_majors && of_site.eq(&self.answer) && self.dead_letters >= 1
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { events, view, site, .. } = self;
        writeln!(
            f,
            "\n{events} events, {} apps installed; at GET /sites/{site}/apps:",
            view.len()
        )?;
        for app in &self.answer {
            writeln!(f, "  {app}")?;
        }
        let verdict = match self.is_right() {
            true => "The view is what the events say",
            false => "The view is NOT what the events say",
        };
        write!(
            f,
            "{verdict}, with the major versions that only the changed projection knows. The unreadable event is a dead letter, \
             {} times: once for each view that was built.",
            self.dead_letters
        )
    }
}
