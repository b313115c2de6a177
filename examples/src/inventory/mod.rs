//! A warehouse of books whose truth is the log: what is on the shelf is a fold of what has happened, now or at any time before.
//!
//! ```text
//! commands ══▶ warehouse ══ exactly once ══▶ events ══┬▶ read model, live: what is on the shelf?
//!                  ▲                                  └▶ replay: what was there at noon? a second read model, added later
//!                  └───── its stock, by replay ◀══════╝
//! ```
//! The warehouse keeps its stock in memory, and has it by replay when it starts: the events and its place in the commands are one
//! transaction, so they tell the same. That is so while there is one warehouse; several would share an atomic store. The log's clock
//! says when an event was, so the stock at a time that has passed is the same whenever one asks.

mod live;
pub mod stock;

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use barnabas::log::{Error as LogError, ProducerSettings, Timestamps, TopicSpec};
use barnabas::patterns::Error;
use barnabas::patterns::consumer::{
    ConsumerBuilder, ConsumerHandle, Context, DeliveryGuarantee, EventHandler, HandlerError, Registry,
};
use barnabas::patterns::replay::Replay;
use barnabas::server::event::rfc3339;
use barnabas::server::program::Failure;

use self::live::Live;
use self::stock::{Action, Command, Outcomes, ReadModel, Shipped, Stock, StockEvent};
use crate::scene::{Scene, event};

const TITLES: [&str; 4] = ["The Castle", "The Trial", "Amerika", "The Metamorphosis"];

/// Orders of each half of the day.
const ORDERS: usize = 40;

/// So that noon is behind all of the morning and before all of the afternoon.
const NOON: Duration = Duration::from_millis(20);

const COMMAND: &str = "stock.command";

/// A day in the warehouse: commands come in the morning and in the afternoon, and are looked back on at the end.
///
/// # Errors
/// The log refuses.
pub async fn run(scene: &Scene) -> Result<Report, Failure> {
    let names = Names::new(scene);
    scene.make(&names.topics()).await?;
    let shelf: Live<Stock> = Live::follow(&scene.log, &names.events).await?;
    let outcomes: Live<Outcomes> = Live::follow(&scene.log, &names.events).await?;
    // Only to compare with: nobody asks for it before the evening.
    let shipped: Live<Shipped> = Live::follow(&scene.log, &names.events).await?;
    let day = format!("{:08x}", rand::random::<u32>());
    let is_done = async |commands: &[Command]| {
        let outcomes = outcomes.seen();
        let all = [shelf.seen().events, shipped.seen().events];
        let is_there = |command: &Command| outcomes.model.events.contains_key(&command.id);
        Ok(commands.iter().all(is_there) && all == [outcomes.events; 2])
    };

    let mut commands = morning(&day);
    send(scene, &names.commands, &commands).await?;
    let warehouse = names.open_warehouse(scene).await?;
    scene.until(async || is_done(&commands).await).await?;
    warehouse.shutdown().await?;
    let noon = shelf.seen();
    let noon_ms = noon.latest_ms + 1;
    println!(
        "{} commands came in the morning; then the warehouse closed for lunch",
        commands.len()
    );
    tokio::time::sleep(NOON).await;

    let more = afternoon(&day);
    send(scene, &names.commands, &more).await?;
    commands.extend(more);
    let warehouse = names.open_warehouse(scene).await?;
    println!("it knows its stock again by replay, and the afternoon's come");
    scene.until(async || is_done(&commands).await).await?;
    warehouse.shutdown().await?;

    let at_noon = at(scene, noon_ms).await?;
    let (shipped, shipped_later) = (
        shipped.seen().model,
        replay::<Shipped>(scene, Replay::topic(&names.events)).await?,
    );
    let outcomes = replay::<Outcomes>(scene, Replay::topic(&names.events)).await?;
    Ok(Report {
        commands,
        noon_ms,
        live_at_noon: noon.model,
        at_noon,
        now: shelf.seen().model,
        shipped,
        shipped_later,
        outcomes,
    })
}

/// The stock as it was at a time, in milliseconds since the Unix epoch: what had happened before it.
///
/// # Errors
/// [`Error::Log`] with [`LogError::UnknownTopic`] when there never was a warehouse on this log. The log cannot be read.
pub async fn at(scene: &Scene, time_ms: i64) -> Result<Stock, Failure> {
    let names = Names::new(scene);
    replay(scene, Replay::topic(&names.events).before_ms(time_ms)).await
}

/// Whether there never was a warehouse on the log.
pub fn is_nothing_there(failure: &Failure) -> bool {
    matches!(failure.downcast_ref(), Some(Error::Log(LogError::UnknownTopic(_))))
}

/// A read model of the past.
async fn replay<M: ReadModel>(scene: &Scene, replay: Replay) -> Result<M, Failure> {
    let mut model = M::default();
    let mut replaying = replay.open(&scene.log).await?;
    while let Some(event) = replaying.next().await? {
        model.apply_record(&event)?;
    }
    Ok(model)
}

struct Names {
    commands: String,
    events: String,
    /// The group of the warehouse.
    warehouse: String,
}

impl Names {
    fn new(scene: &Scene) -> Self {
        Self {
            commands: scene.name("inventory.commands"),
            events: scene.name("inventory.events"),
            warehouse: scene.name("inventory.warehouse"),
        }
    }

    fn topics(&self) -> [TopicSpec; 2] {
        [
            TopicSpec::new(&self.commands, 3),
            // The truth is kept for ever, and the log says when it happened.
            TopicSpec {
                retention: None,
                timestamps: Timestamps::LogAppend,
                fixed_partitions: true,
                ..TopicSpec::new(&self.events, 3)
            },
        ]
    }

    async fn open_warehouse(&self, scene: &Scene) -> Result<ConsumerHandle, Failure> {
        let warehouse = Warehouse {
            events: self.events.clone(),
            stock: Mutex::new(replay(scene, Replay::topic(&self.events)).await?),
        };
        let consumer =
            ConsumerBuilder::new(&self.warehouse, [&self.commands]).guarantee(DeliveryGuarantee::ExactlyOnce);
        scene
            .start(consumer, Registry::new().on::<Command>(COMMAND, warehouse))
            .await
    }
}

/// Decides what follows from commands.
struct Warehouse {
    events: String,
    stock: Mutex<Stock>,
}

impl EventHandler<Command> for Warehouse {
    async fn handle(&self, context: &mut Context, command: Command) -> Result<(), HandlerError> {
        let mut stock = self.stock.lock().unwrap_or_else(PoisonError::into_inner);
        let happened: StockEvent = stock.decide(command);
        let record = event(&self.events, &happened.title, happened.event_type(), &happened);
        context.send(record.map_err(HandlerError::non_retriable)?);
        stock.apply(&happened);
        Ok(())
    }
}

async fn send(scene: &Scene, topic: &str, commands: &[Command]) -> Result<(), Failure> {
    let producer = scene.log.producer(ProducerSettings::default()).await?;
    let mut deliveries = Vec::new();
    for command in commands {
        deliveries.push(producer.send(event(topic, &command.title, COMMAND, command)?).await?);
    }
    for delivery in deliveries {
        delivery.await?;
    }
    Ok(())
}

fn morning(day: &str) -> Vec<Command> {
    let mut commands = Commands {
        prefix: format!("{day}-morning"),
        commands: Vec::new(),
    };
    for title in TITLES {
        commands.add(title, Action::Receive, 60);
    }
    commands.add_orders();
    // Nobody has so many.
    commands.add(TITLES[0], Action::Reserve, 1_000_000);
    commands.commands
}

fn afternoon(day: &str) -> Vec<Command> {
    let mut commands = Commands {
        prefix: format!("{day}-afternoon"),
        commands: Vec::new(),
    };
    commands.add("Letters to Milena", Action::Receive, 12);
    commands.add_orders();
    commands.add(TITLES[1], Action::Adjust, -1);
    commands.add(TITLES[2], Action::Adjust, -1_000_000);
    // What was not kept back does not go out.
    commands.add(TITLES[3], Action::Ship, 1_000_000);
    commands.commands
}

struct Commands {
    prefix: String,
    commands: Vec<Command>,
}

impl Commands {
    fn add(&mut self, title: &str, action: Action, copies: i64) {
        self.commands.push(Command {
            id: format!("{}-{}", self.prefix, self.commands.len()),
            title: title.to_owned(),
            action,
            copies,
        });
    }

    /// Each is kept back first, and goes out then; the last ones wait for tomorrow.
    fn add_orders(&mut self) {
        for number in 0..ORDERS {
            let (title, copies) = (TITLES[number % TITLES.len()], 1 + (number % 3) as i64);
            self.add(title, Action::Reserve, copies);
            if number < ORDERS - TITLES.len() {
                self.add(title, Action::Ship, copies);
            }
        }
    }
}

/// What the day has come to.
#[derive(Clone, Debug)]
pub struct Report {
    /// All commands of the day.
    pub commands: Vec<Command>,
    /// When noon was, in milliseconds since the Unix epoch.
    pub noon_ms: i64,
    /// What the read model said at noon.
    pub live_at_noon: Stock,
    /// What the replay to noon says in the evening.
    pub at_noon: Stock,
    /// What the read model says in the evening.
    pub now: Stock,
    /// What has gone out, by a read model that was there all day.
    pub shipped: Shipped,
    /// The same by one that was added in the evening.
    pub shipped_later: Shipped,
    /// How many events each command has.
    pub outcomes: Outcomes,
}

impl Report {
    /// What contradicts that the state is a fold of the log, and each command one event.
    pub fn contradictions(&self) -> Vec<String> {
        let mut found = Vec::new();
        if self.at_noon != self.live_at_noon {
            found.push("the stock at noon is not what the read model said then".to_owned());
        }
        let bytes = |shipped| serde_json::to_vec(shipped).unwrap_or_default();
        if bytes(&self.shipped) != bytes(&self.shipped_later) {
            found.push("the read model that was added later is another".to_owned());
        }
        for command in &self.commands {
            match self.outcomes.events.get(&command.id).copied().unwrap_or(0) {
                1 => {}
                events => found.push(format!("command {} has {events} events", command.id)),
            }
        }
        for (title, copies) in &self.now.0 {
            if !copies.is_possible() {
                found.push(format!(
                    "of {title} there are {} copies, {} kept back",
                    copies.on_hand, copies.reserved
                ));
            }
        }
        found
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let noon = rfc3339(self.noon_ms);
        writeln!(f, "\nThe stock at noon, {noon}, by replay:\n{}", self.at_noon)?;
        writeln!(f, "\nThe stock now, by the live read model:\n{}", self.now)?;
        writeln!(f, "\nCopies that have gone out, by a read model that was added now:")?;
        for (title, copies) in &self.shipped_later.0 {
            writeln!(f, "{copies:>17}  {title}")?;
        }
        let (commands, rejected) = (self.commands.len(), self.outcomes.rejected);
        writeln!(f, "\n{commands} commands came today; {rejected} of all were rejected.")?;
        match self.contradictions().as_slice() {
            [] => write!(
                f,
                "Each command is exactly one event, the replay to noon is what the read model said at noon, and the read model\n\
                 that was added later equals the one that was there all day.\n\
                 On a log that is kept (--data-dir DIR or KAFKA_BROKERS), ask again with: inventory at {noon}"
            ),
            found => write!(f, "The log tells otherwise:\n  {}", found.join("\n  ")),
        }
    }
}
