//! State on the log under the same troubles: an atomic store, windows, schedules and a projection, each owned by two processes, a table
//! that is read here, and events that are posted to two gateways. At the end each is compared with what the oracle reads on the log.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::{Duration, Instant};

use barnabas::log::kafka::KafkaSettings;
use barnabas::log::{Log, ProducerRecord, ProducerSettings, TopicSpec};
use barnabas::patterns::atomic_store::{self, Submitter};
use barnabas::patterns::replay::Replay;
use barnabas::patterns::schedule::{self, Schedule, Scheduler, When};
use barnabas::patterns::table::{self, Table, TableSettings};
use barnabas_tests::conformance::{append_all, make_topic, unique};
use barnabas_tests::consumer::SOON;
use barnabas_tests::oracle::read_kafka;
use barnabas_tests::process::{Process, program};
use barnabas_tests::projection::{Asked, ProjectionWork, fold, random_entries};
use barnabas_tests::store::{Part, Request, StoreWorkerSettings, folded, submitter};
use barnabas_tests::windows::{self, random_commands};
use futures_util::future::join_all;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tempfile::TempDir;

use crate::telemetry::Telemetry;
use crate::{PARTITIONS, SLOTS, Trouble, wait};

/// Of each request.
const PARTS: u32 = 5;
/// What one step submits to each of them.
const STEP_REQUESTS: usize = 8;
const STEP_SCHEDULES: usize = 20;
const STEP_ENTRIES: i64 = 40;
const STEP_PUTS: u64 = 10;
const STEP_HAPPENED: i64 = 50;
/// Keys of the view and of the table.
const KEYS: u32 = 50;
/// Records are kept for as long as a soak may take.
const RETENTION: Duration = Duration::from_secs(24 * 60 * 60);

/// All of it.
pub struct State {
    brokers: String,
    log: Log,
    random: StdRng,
    pairs: Vec<Pair>,
    store: String,
    completions: String,
    submitter: Submitter,
    requests: usize,
    scheduler: Scheduler,
    events: String,
    /// When each schedule is due.
    due: HashMap<String, i64>,
    work: ProjectionWork,
    entries: i64,
    table: Table<String, u64>,
    values: BTreeMap<String, u64>,
    put: u64,
    windows: String,
    results: String,
    happened: i64,
    telemetry: Telemetry,
    folder: TempDir,
}

/// Two processes of one program.
struct Pair {
    program: &'static str,
    arguments: HashMap<&'static str, Vec<String>>,
    processes: HashMap<&'static str, Process>,
}

impl Pair {
    fn start(program: &'static str, arguments: impl Fn(&str) -> Vec<String>, folder: &Path) -> Self {
        let mut pair = Self {
            program,
            arguments: SLOTS.map(|slot| (slot, arguments(slot))).into(),
            processes: HashMap::new(),
        };
        for slot in SLOTS {
            pair.begin(slot, folder);
        }
        pair
    }

    fn begin(&mut self, slot: &'static str, folder: &Path) {
        let output = folder.join(format!("{}-{slot}", self.program));
        let process = Process::start(&program(self.program), &self.arguments[slot], &[], &output);
        self.processes.insert(slot, process);
    }

    fn end(&mut self, slot: &str) {
        if let Some(process) = self.processes.remove(slot) {
            process.kill();
        }
    }

    async fn make_trouble(&mut self, trouble: Trouble, slot: &'static str, mut random: StdRng, folder: &Path) {
        let pause_ms = match trouble {
            Trouble::PauseShort => 50..1000,
            Trouble::PauseLong => 3000..8000,
            // Not all of them listen to SIGTERM.
            Trouble::Kill | Trouble::Restart => {
                self.end(slot);
                return self.begin(slot, folder);
            }
        };
        self.processes[slot].pause();
        wait(&mut random, pause_ms).await;
        self.processes[slot].resume();
    }
}

impl State {
    /// Makes the topics and starts the processes.
    pub async fn start(brokers: &str, seed: u64) -> Self {
        let folder = TempDir::new().expect("a folder");
        let log = Log::connect_kafka(KafkaSettings::new(brokers)).await.expect("a log");
        let store = unique("requests");
        let completions = format!("{store}.completions");
        let schedules = unique("schedules");
        let events = format!("{schedules}.events");
        let work = ProjectionWork {
            log: brokers.to_owned(),
            database: folder.path().join("view.sqlite").display().to_string(),
            group: unique("entries"),
            topic: unique("entries"),
            view: "entries".to_owned(),
            version: 1,
        };
        let own = [&completions, &events, &work.topic].map(|topic| TopicSpec::new(topic, PARTITIONS));
        let table = make_topic(&log, table::topic(unique("numbers"), PARTITIONS)).await;
        let windows = unique("windows");
        let results = make_topic(&log, TopicSpec::new(format!("{windows}.results"), PARTITIONS)).await;
        let specs = atomic_store::topics(&store, PARTITIONS, RETENTION).into_iter();
        let specs = specs
            .chain(atomic_store::topics(&windows, PARTITIONS, RETENTION))
            .chain(schedule::topics(&schedules, PARTITIONS, RETENTION))
            .chain(own);
        for spec in specs {
            make_topic(&log, spec).await;
        }
        for spec in work.settings().topics(&log).await.expect("topics") {
            make_topic(&log, spec).await;
        }
        let owner = StoreWorkerSettings {
            brokers: Some(brokers.to_owned()),
            data_dir: folder.path().to_owned(),
            store: store.clone(),
            completions: completions.clone(),
            owners: 1,
            window_commands: 20,
            submit: None,
        };
        let json = |settings: Result<String, serde_json::Error>| settings.expect("settings are JSON");
        let (owner, projecting) = (json(serde_json::to_string(&owner)), json(serde_json::to_string(&work)));
        // So few are held in memory that the nearest are looked up again and again.
        let firing = [schedules.as_str(), "50", "kafka", brokers].map(str::to_owned).to_vec();
        let counting = [brokers, &windows, &results].map(str::to_owned).to_vec();
        let workers = [
            ("store-worker", vec![owner]),
            ("window-worker", counting),
            ("schedule-worker", firing),
            ("projection-worker", vec![projecting]),
        ];
        let telemetry = Telemetry::new(&log).await;
        let pairs = workers.map(|(program, arguments)| Pair::start(program, |_| arguments.clone(), folder.path()));
        let gateways = Pair::start(
            "barnabas",
            |slot| telemetry.gateway(slot, brokers, folder.path()),
            folder.path(),
        );
        let table = Table::open(&log, TableSettings::new(&table)).await.expect("a table");
        let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
        Self {
            brokers: brokers.to_owned(),
            random: StdRng::seed_from_u64(seed),
            pairs: pairs.into_iter().chain([gateways]).collect(),
            submitter: submitter(&log, &store).await,
            scheduler: Scheduler::new(log.clone(), &schedules, producer),
            log,
            store,
            completions,
            requests: 0,
            events,
            due: HashMap::new(),
            work,
            entries: 0,
            table,
            values: BTreeMap::new(),
            put: 0,
            windows,
            results,
            happened: 0,
            telemetry,
            folder,
        }
    }

    /// Submits what one step does, and reads from the table what was put there.
    pub async fn submit(&mut self) {
        for _ in 0..STEP_REQUESTS {
            let key = format!("request-{}", self.requests);
            self.requests += 1;
            for index in 0..PARTS {
                let part = Part {
                    index: Some(index),
                    total: PARTS,
                };
                for _ in 0..self.random.random_range(1..3) {
                    self.submitter.submit(&key, &part).await.expect("submitted");
                }
            }
        }
        for _ in 0..STEP_SCHEDULES {
            let id = format!("schedule-{}", self.due.len());
            let event = ProducerRecord::to(self.events.as_str()).key(id.clone()).value("{}");
            let when = When::After(Duration::from_millis(self.random.random_range(0..20_000)));
            let submitted = self
                .scheduler
                .submit(Schedule {
                    id: id.clone(),
                    when,
                    event,
                })
                .await;
            self.due.insert(id, submitted.expect("submitted").due_ms);
        }
        let numbers = self.entries..self.entries + STEP_ENTRIES;
        self.entries = numbers.end;
        let entries = random_entries(&mut self.random, numbers, KEYS);
        append_all(&self.log, entries.iter().map(|entry| entry.record(&self.work.topic))).await;
        let numbers = self.happened..self.happened + STEP_HAPPENED;
        self.happened = numbers.end;
        append_all(&self.log, random_commands(&mut self.random, &self.windows, numbers)).await;
        self.telemetry.post().await;
        for _ in 0..STEP_PUTS {
            let key = format!("key-{}", self.random.random_range(0..KEYS));
            self.put += 1;
            let revision = self.table.put(&key, &self.put).await.expect("put");
            self.table.wait_applied(revision).await.expect("applied");
            assert_eq!(self.table.get(&key).as_deref(), Some(&self.put), "what was put is read");
            self.values.insert(key, self.put);
        }
    }

    /// Makes trouble for some of the processes, and says so.
    pub async fn make_trouble(&mut self, step: u64) {
        let (random, folder) = (&mut self.random, self.folder.path());
        let mut troubles = Vec::new();
        for pair in &mut self.pairs {
            let (trouble, slot) = (Trouble::any(random), SLOTS[random.random_range(0..SLOTS.len())]);
            let seed = random.random();
            if random.random_range(0..3) == 0 {
                println!("step {step}: {trouble:?} {} {slot}", pair.program);
                troubles.push(pair.make_trouble(trouble, slot, StdRng::seed_from_u64(seed), folder));
            }
        }
        join_all(troubles).await;
    }

    /// Starts those again that have ended by themselves, and says which.
    pub fn restart_ended(&mut self, step: u64) {
        for pair in &mut self.pairs {
            for slot in SLOTS {
                if let Some(status) = pair.processes.get_mut(slot).and_then(Process::try_wait) {
                    println!("step {step}: {} {slot} ended by itself: {status}", pair.program);
                    println!("{}", pair.processes[slot].last_output());
                    pair.end(slot);
                    pair.begin(slot, self.folder.path());
                }
            }
        }
    }

    /// Lets all get to their ends, and judges.
    pub async fn finish(self) {
        let read = |topic: &str| read_kafka(&self.brokers, topic);
        self.until("all requests are complete", || {
            read(&self.completions).len() >= self.requests
        })
        .await;
        self.until("all schedules have fired", || {
            read(&self.events).len() >= self.due.len()
        })
        .await;
        let view = Asked::Sqlite(self.folder.path().join("view.sqlite"));
        let entries = read(&self.work.topic);
        let expected = fold(&entries);
        self.until("the view is the fold", || {
            view.try_query("SELECT key, value, number FROM entries ORDER BY key")
                .as_ref()
                == Some(&expected)
        })
        .await;
        let commands = read(&atomic_store::commands_topic(&self.windows));
        let counted = windows::expected(&commands);
        self.until("the windows have what happened", || {
            windows::written(&read(&self.windows), &read(&self.results)) == counted
        })
        .await;
        println!(
            "state: {} requests, {} schedules, {} entries, {} puts, {} things that happened, {} events taken",
            self.requests,
            self.due.len(),
            self.entries,
            self.put,
            self.happened,
            self.telemetry.taken()
        );
        self.telemetry.judge(&read(self.telemetry.topic()));

        let states: BTreeMap<String, Request> = read(&self.store)
            .iter()
            .map(|record| {
                let state = serde_json::from_value(record.json()).expect("a state");
                (record.key_text(), state)
            })
            .collect();
        let commands = read(&atomic_store::commands_topic(&self.store));
        assert_eq!(states, folded(commands), "the states are the fold of the commands");
        let mut completed: HashMap<String, usize> = HashMap::new();
        for record in read(&self.completions) {
            *completed.entry(record.key_text()).or_default() += 1;
        }
        assert_eq!(completed.len(), self.requests);
        assert!(
            completed.values().all(|times| *times == 1),
            "each completes once: {completed:?}"
        );

        let mut fired = HashMap::new();
        for event in read(&self.events) {
            let due_ms: i64 = event.header("bn-due-ms").parse().expect("a due time");
            assert!(event.timestamp_ms >= due_ms, "early: {event:?}");
            assert_eq!(fired.insert(event.key_text(), due_ms), None, "fired twice: {event:?}");
        }
        assert_eq!(fired, self.due, "each fires as it is due");

        let held: BTreeMap<String, u64> = self
            .table
            .entries()
            .into_iter()
            .map(|(key, entry)| (key, *entry.value))
            .collect();
        assert_eq!(held, self.values, "the table holds what was put last");

        let mut replayed: BTreeMap<i32, Vec<Vec<u8>>> = BTreeMap::new();
        let replay = Replay::topic(self.work.topic.as_str())
            .open(&self.log)
            .await
            .expect("a replay");
        let replay = replay.fold(&mut replayed, |replayed, record| {
            let value = record.value.as_deref().unwrap_or_default().to_vec();
            replayed.entry(record.partition).or_default().push(value);
        });
        replay.await.expect("replayed");
        let mut appended: BTreeMap<i32, Vec<Vec<u8>>> = BTreeMap::new();
        for record in entries {
            appended.entry(record.partition).or_default().push(record.value);
        }
        assert_eq!(replayed, appended, "a replay is what stands there, in order");
    }

    async fn until(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let deadline = Instant::now() + SOON;
        while !tokio::task::block_in_place(&mut is_so) {
            if Instant::now() > deadline {
                let processes = self.pairs.iter().flat_map(|pair| pair.processes.values());
                let outputs: Vec<String> = processes.map(Process::last_output).collect();
                panic!("{what}: not within {SOON:?}\n{}", outputs.join("\n"));
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}
