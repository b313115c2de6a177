//! Tables made from tables: what is said of a country shows in all services at once.
//!
//! ```text
//! Countries ══ countries ══▶ Time Zones ══ time-zones ══▶ Events ══ events
//!  (table)                   (a group, a table)          (a group, a table)
//! ```
//! Countries says which there are and what time their capitals have. Time Zones makes from it how each stands to UTC, Events when the
//! new year begins there. A service has its table in memory; what it makes of a record, and the offset of that, are one transaction. A
//! country that is deleted leaves all three.

mod page;
mod services;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use barnabas::log::Log;
use barnabas::patterns::table::{self, Table, TableSettings};
use barnabas::server::program::Failure;
use rand::seq::SliceRandom as _;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

pub use self::services::{Country, Event, TimeZone, event, time_zone};
use self::services::{Derive, Service};
use crate::scene::{Scene, key};

const PARTITIONS: i32 = 3;

/// Rounds in which the services are started again, each in another order.
const RESTARTS: usize = 3;

/// The countries at the beginning: code, name, time zone, minutes before UTC.
const FIRST: [(&str, &str, &str, i32); 6] = [
    ("DE", "Germany", "Europe/Berlin", 60),
    ("IN", "India", "Asia/Kolkata", 330),
    ("JP", "Japan", "Asia/Tokyo", 540),
    ("KE", "Kenya", "Africa/Nairobi", 180),
    ("PE", "Peru", "America/Lima", -300),
    ("YU", "Yugoslavia", "Europe/Belgrade", 60),
];

/// The three services.
struct World<'a> {
    scene: &'a Scene,
    countries: Table<String, Country>,
    time_zones: Option<Service<TimeZone>>,
    events: Option<Service<Event>>,
}

impl<'a> World<'a> {
    /// Makes the topics, starts the services, and says which countries there are.
    async fn start(scene: &'a Scene) -> Result<Self, Failure> {
        let topic = |name| table::topic(scene.name(name), PARTITIONS);
        scene
            .make(&[topic("countries"), topic("time-zones"), topic("events")])
            .await?;
        let mut world = Self {
            scene,
            countries: open(&scene.log, &scene.name("countries")).await?,
            time_zones: None,
            events: None,
        };
        world.start_time_zones().await?;
        world.start_events().await?;
        for (code, name, zone, minutes) in FIRST {
            world.put(code, name, zone, minutes).await?;
        }
        Ok(world)
    }

    async fn start_time_zones(&mut self) -> Result<(), Failure> {
        let derive: Derive<Country, TimeZone> = time_zone;
        self.time_zones = Some(Service::start(self.scene, "countries", "time-zones", derive).await?);
        Ok(())
    }

    async fn start_events(&mut self) -> Result<(), Failure> {
        let derive: Derive<TimeZone, Event> = event;
        self.events = Some(Service::start(self.scene, "time-zones", "events", derive).await?);
        Ok(())
    }

    /// Stops all three and starts them in the order of these numbers.
    async fn restart(&mut self, order: &[usize]) -> Result<(), Failure> {
        for service in order {
            match service {
                0 => self.countries = open(&self.scene.log, &self.scene.name("countries")).await?,
                1 => {
                    if let Some(service) = self.time_zones.take() {
                        service.stop().await?;
                    }
                    self.start_time_zones().await?;
                }
                _ => {
                    if let Some(service) = self.events.take() {
                        service.stop().await?;
                    }
                    self.start_events().await?;
                }
            }
        }
        Ok(())
    }

    async fn put(&self, code: &str, name: &str, zone: &str, minutes: i32) -> Result<(), Failure> {
        let country = Country {
            name: name.to_owned(),
            zone: zone.to_owned(),
            utc_offset_minutes: minutes,
        };
        self.countries.put(&code.to_owned(), &country).await?;
        Ok(())
    }

    fn time_zones(&self) -> Result<&Table<String, TimeZone>, Failure> {
        Ok(&self.time_zones.as_ref().ok_or("Time Zones is not started")?.table)
    }

    fn events(&self) -> Result<&Table<String, Event>, Failure> {
        Ok(&self.events.as_ref().ok_or("Events is not started")?.table)
    }

    /// Waits until a country is in Time Zones and in Events as it is in Countries, and says how long each took.
    async fn follow(&self, code: &str, country: Option<&Country>) -> Result<[Duration; 2], Failure> {
        let begin = Instant::now();
        let zone = country.map(time_zone);
        reach(self.time_zones()?, code, zone.as_ref()).await?;
        let in_time_zones = begin.elapsed();
        reach(self.events()?, code, zone.as_ref().map(event).as_ref()).await?;
        Ok([in_time_zones, begin.elapsed()])
    }

    async fn stop(self) -> Result<(), Failure> {
        if let Some(service) = self.time_zones {
            service.stop().await?;
        }
        if let Some(service) = self.events {
            service.stop().await?;
        }
        Ok(())
    }
}

/// A table that is ready.
async fn open<V>(log: &Log, topic: &str) -> Result<Table<String, V>, Failure>
where
    V: Serialize + DeserializeOwned + Send + Sync + 'static,
{
    let table = Table::open(log, TableSettings::new(topic)).await?;
    table.ready().await?;
    Ok(table)
}

/// Waits until a key has a value, or has none.
async fn reach<V>(table: &Table<String, V>, key: &str, value: Option<&V>) -> Result<(), Failure>
where
    V: PartialEq + Serialize + DeserializeOwned + Send + Sync + 'static,
{
    let mut watch = table.watch(key.to_owned());
    loop {
        let entry = watch.next().await?;
        if entry.as_ref().map(|entry| entry.value.as_ref()) == value {
            return Ok(());
        }
    }
}

/// Adds, changes and deletes countries, starts the services again in one order and another, and says what the tables hold then.
///
/// # Errors
/// The log refuses.
pub async fn run(scene: &Scene) -> Result<Report, Failure> {
    let mut world = World::start(scene).await?;
    println!(
        "Countries, Time Zones and Events started with {} countries",
        FIRST.len()
    );
    for (code, name, zone, minutes) in FIRST {
        let country = Country::new(name, zone, minutes);
        world.follow(code, Some(&country)).await?;
    }

    let south_sudan = Country::new("South Sudan", "Africa/Juba", 120);
    let begin = Instant::now();
    world.put("SS", "South Sudan", "Africa/Juba", 120).await?;
    let put = begin.elapsed();
    let added = world.follow("SS", Some(&south_sudan)).await?.map(|took| took + put);
    println!(
        "South Sudan is there: in Time Zones after {:.1?}, in Events after {:.1?}",
        added[0], added[1]
    );

    let before = world.events()?.get("DE");
    world.put("DE", "Germany", "Europe/Berlin", 120).await?;
    world
        .follow("DE", Some(&Country::new("Germany", "Europe/Berlin", 120)))
        .await?;
    let after = world.events()?.get("DE");
    let begins = |event: Option<std::sync::Arc<Event>>| event.map(|event| event.begins_utc.clone()).unwrap_or_default();
    let summer_time = [begins(before), begins(after)];
    println!(
        "Germany has summer time: its new year begins at {} instead of {} (UTC)",
        summer_time[1], summer_time[0]
    );

    world.countries.delete(&"YU".to_owned()).await?;
    world.follow("YU", None).await?;
    println!("Yugoslavia is no more, in all three");

    let mut order = [0, 1, 2];
    for round in 0..RESTARTS {
        order.shuffle(&mut rand::rng());
        // While they are away others change too.
        let minutes = 330 + i32::try_from(round)?;
        world.put("IN", "India", "Asia/Kolkata", minutes).await?;
        world.restart(&order).await?;
        world
            .follow("IN", Some(&Country::new("India", "Asia/Kolkata", minutes)))
            .await?;
    }
    println!("all three were started again {RESTARTS} times, in one order and another");
    let report = Report {
        added,
        summer_time,
        stores: [
            Store::of(scene, "countries", &world.countries).await?,
            Store::of(scene, "time-zones", world.time_zones()?).await?,
            Store::of(scene, "events", world.events()?).await?,
        ],
    };
    world.stop().await?;
    Ok(report)
}

/// Runs the services and a page that shows what each has, until `stopping`.
///
/// # Errors
/// The log refuses, or the address is taken.
pub async fn serve(scene: &Scene, address: SocketAddr, stopping: CancellationToken) -> Result<(), Failure> {
    let world = World::start(scene).await?;
    let stores = page::Stores {
        countries: world.countries.clone(),
        time_zones: world.time_zones()?.clone(),
        events: world.events()?.clone(),
    };
    page::serve(address, stores, stopping).await?;
    world.stop().await
}

/// What the story has shown.
#[derive(Clone, Debug)]
pub struct Report {
    /// How long South Sudan took to be in Time Zones, and in Events.
    pub added: [Duration; 2],
    /// When the new year begins in Germany, before and after its clocks were changed.
    pub summer_time: [String; 2],
    /// The three stores at the end.
    pub stores: [Store; 3],
}

/// What a service's table holds, and what stands on its topic.
#[derive(Clone, Debug)]
pub struct Store {
    /// The topic without the run's suffix.
    pub name: &'static str,
    /// The table of the service that was restarted, as JSON by key.
    pub held: BTreeMap<String, String>,
    /// A table that was opened at the end.
    pub fresh: BTreeMap<String, String>,
    /// The last record of each key on the topic, deleted ones left out.
    pub log: BTreeMap<String, String>,
}

impl Store {
    async fn of<V>(scene: &Scene, name: &'static str, table: &Table<String, V>) -> Result<Self, Failure>
    where
        V: Serialize + DeserializeOwned + Send + Sync + 'static,
    {
        let topic = scene.name(name);
        let mut log = BTreeMap::new();
        for record in scene.read(&topic).await? {
            match &record.value {
                Some(value) => log.insert(key(&record), String::from_utf8_lossy(value).into_owned()),
                None => log.remove(&key(&record)),
            };
        }
        Ok(Self {
            name,
            held: as_json(table)?,
            fresh: as_json(&open::<V>(&scene.log, &topic).await?)?,
            log,
        })
    }

    /// Whether the table is what the log says, whenever it was opened.
    pub fn is_true(&self) -> bool {
        self.held == self.log && self.fresh == self.log
    }
}

fn as_json<V>(table: &Table<String, V>) -> Result<BTreeMap<String, String>, Failure>
where
    V: Serialize + DeserializeOwned + Send + Sync + 'static,
{
    let entries = table.entries().into_iter();
    let json = entries.map(|(key, entry)| Ok((key, serde_json::to_string(&*entry.value)?)));
    json.collect()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\n{:<12} {:>4} {:>14} {:>15}",
            "store", "keys", "as on the log", "opened anew"
        )?;
        let yes = |is_so| if is_so { "equal" } else { "DIFFERENT" };
        for store in &self.stores {
            let (held, fresh) = (yes(store.held == store.log), yes(store.fresh == store.log));
            writeln!(f, "{:<12} {:>4} {held:>14} {fresh:>15}", store.name, store.held.len())?;
        }
        let [in_time_zones, in_events] = self.added;
        write!(
            f,
            "\nSouth Sudan could be read in Time Zones {in_time_zones:.1?} and in Events {in_events:.1?} after it was added to Countries."
        )
    }
}
