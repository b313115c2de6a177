//! An installation of Barnabas for one test: a log, gateways, importers and the importers' database, all of its own.
//!
//! On the embedded log a gateway stands alone or has its importer in it. On Kafka there may be several of both, and topics and
//! groups carry the site's name, so that many sites share a broker. Starting and stopping block the calling thread: tests that
//! do other things meanwhile use a runtime with several.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags};
use tempfile::TempDir;

use crate::fault::{LogAway, SqliteLock};
use crate::kafka::{self, KafkaNode, free_ports};
use crate::oracle::{OracleRecord, read_embedded, read_kafka};
use crate::process::{Process, program};

/// A program that is not ready by then has failed to start.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// An import that stands still for so long has stopped.
const IMPORT_TIMEOUT: Duration = Duration::from_secs(60);

/// What is committed can be seen in all partitions within this time.
const WHOLE_TIMEOUT: Duration = Duration::from_secs(15);

/// The job type of the contacts import.
pub const JOB_TYPE: &str = "import-contacts";

/// The path to which jobs of the contacts import are posted.
pub fn jobs_path(channel: &str) -> String {
    format!("/v1/jobs/{JOB_TYPE}?channel={channel}")
}

/// Which log a site stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// The embedded log.
    Embedded,
    /// Apache Kafka, the shared broker of the test run.
    Kafka,
}

/// An installation.
#[derive(Debug)]
pub struct Site {
    folder: TempDir,
    /// First part of the names of its topics.
    prefix: String,
    /// None: the embedded log.
    brokers: Option<String>,
    /// The broker, if it has one of its own.
    node: Option<KafkaNode>,
    settings: Vec<(String, String)>,
}

impl Site {
    /// An installation on a log of this kind.
    pub fn new(engine: Engine) -> Self {
        match engine {
            Engine::Embedded => Self::make(None),
            Engine::Kafka => Self::on_kafka(kafka::brokers()),
        }
    }

    /// An installation on a log of this kind which the test may take away: on Kafka a broker of its own.
    pub fn with_a_log_of_its_own(engine: Engine) -> Self {
        match engine {
            Engine::Embedded => Self::make(None),
            Engine::Kafka => {
                let node = KafkaNode::start();
                let mut site = Self::on_kafka(node.brokers());
                site.node = Some(node);
                site
            }
        }
    }

    /// An installation on these brokers.
    pub fn on_kafka(brokers: impl Into<String>) -> Self {
        Self::make(Some(brokers.into()))
    }

    fn make(brokers: Option<String>) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("barnabas-site-")
            .tempdir()
            .expect("a temporary folder");
        let prefix = format!("t{:016x}", rand::random::<u64>());
        let site = Self {
            folder,
            prefix,
            brokers,
            node: None,
            settings: Vec::new(),
        };
        site.chunk_rows(500);
        site
    }

    /// Cuts imports into chunks of so many rows, in the programs that are started from now on.
    pub fn chunk_rows(&self, rows: u32) {
        let settings = format!(
            "[topics]\nprefix = \"{}\"\n\n[job_types.{JOB_TYPE}]\nformat = \"csv\"\ntopic = \"{}\"\nchunk_rows = {rows}\n",
            self.prefix,
            self.chunks_topic()
        );
        std::fs::write(self.settings_file(), settings).expect("the settings are written");
    }

    /// Adds a setting for the programs that are started from now on, as a variable.
    pub fn set(&mut self, variable: &str, value: impl ToString) -> &mut Self {
        self.settings.push((variable.to_owned(), value.to_string()));
        self
    }

    /// Starts a gateway and waits until it is ready. On the embedded log there can be only one.
    ///
    /// # Panics
    /// If it does not become ready.
    pub fn gateway(&self, name: &str) -> Gateway {
        self.start_gateway(name, "barnabas")
    }

    /// Starts gateway and importer in one process, on the embedded log, and waits until they are ready.
    ///
    /// # Panics
    /// If they do not become ready, or the site is on Kafka.
    pub fn gateway_with_importer(&self, name: &str) -> Gateway {
        assert!(self.brokers.is_none(), "on Kafka the importer is a process of its own");
        self.start_gateway(name, "contacts-import")
    }

    fn start_gateway(&self, name: &str, program_name: &str) -> Gateway {
        let [port] = free_ports();
        let data = match self.brokers {
            None => self.embedded_data(),
            Some(_) => self.folder.path().join(name),
        };
        let mut environment = self.environment();
        environment.push(("BARNABAS_LISTEN".to_owned(), format!("127.0.0.1:{port}")));
        environment.push(("BARNABAS_DATA_DIR".to_owned(), data.display().to_string()));
        let mut gateway = Gateway {
            address: SocketAddr::from(([127, 0, 0, 1], port)),
            data,
            run: Run {
                program: program(program_name),
                arguments: Vec::new(),
                environment,
                output: self.folder.path().join(format!("{name}.output")),
                process: None,
            },
        };
        gateway.start();
        gateway
    }

    /// Starts a gateway and an importer: in one process on the embedded log, in two on Kafka.
    ///
    /// # Panics
    /// If the gateway does not become ready.
    pub fn gateway_and_importer(&self) -> (Gateway, Option<Importer>) {
        match self.brokers {
            None => (self.gateway_with_importer("gateway"), None),
            Some(_) => (self.gateway("gateway"), Some(self.importer("importer"))),
        }
    }

    /// Starts an importer on Kafka.
    ///
    /// # Panics
    /// If the site stands on the embedded log: its importer is in the gateway.
    pub fn importer(&self, name: &str) -> Importer {
        assert!(
            self.brokers.is_some(),
            "on the embedded log the importer is in the gateway"
        );
        let mut importer = Importer {
            run: Run {
                program: program("contact-importer"),
                arguments: Vec::new(),
                environment: self.environment(),
                output: self.folder.path().join(format!("{name}.output")),
                process: None,
            },
        };
        importer.start();
        importer
    }

    fn environment(&self) -> Vec<(String, String)> {
        let settings_file = self.settings_file().display().to_string();
        let database = format!("sqlite://{}", self.database().display());
        let mut environment = vec![
            ("BARNABAS_CONFIG".to_owned(), settings_file),
            ("DATABASE_URL".to_owned(), database),
        ];
        environment.extend(
            self.brokers
                .iter()
                .map(|brokers| ("KAFKA_BROKERS".to_owned(), brokers.clone())),
        );
        environment.extend(self.settings.iter().cloned());
        environment
    }

    fn embedded_data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn settings_file(&self) -> PathBuf {
        self.folder.path().join("settings.toml")
    }

    /// The importers' database file.
    pub fn database(&self) -> PathBuf {
        self.folder.path().join("contacts.db")
    }

    /// E-mail addresses of all contacts in the importers' database, sorted.
    pub fn contacts(&self) -> Vec<String> {
        let database = Connection::open_with_flags(self.database(), OpenFlags::SQLITE_OPEN_READ_ONLY)
            .expect("the importers' database opens");
        let mut rows = database
            .prepare("SELECT email FROM contacts ORDER BY email")
            .expect("it has contacts");
        rows.query_map([], |row| row.get(0))
            .expect("contacts are read")
            .collect::<Result<_, _>>()
            .expect("addresses are text")
    }

    /// Keeps importers from writing to their database for as long as the lock lives.
    ///
    /// # Panics
    /// If the database is not there yet.
    pub fn hold_up_importers(&self) -> SqliteLock {
        SqliteLock::take(&self.database())
    }

    /// Lets importers go on until so many contacts are in the database, and holds them up again.
    ///
    /// # Panics
    /// If they do not get there.
    pub fn let_import(&self, lock: SqliteLock, contacts: usize) -> SqliteLock {
        drop(lock);
        let deadline = Instant::now() + IMPORT_TIMEOUT;
        while self.contact_count() < contacts {
            assert!(Instant::now() < deadline, "{} contacts only", self.contact_count());
            std::thread::sleep(Duration::from_millis(1));
        }
        self.hold_up_importers()
    }

    /// Takes the log away, for as long as the value lives.
    ///
    /// # Panics
    /// If the site is on a broker that others use too.
    pub fn take_log_away(&self) -> LogAway<'_> {
        match (&self.brokers, &self.node) {
            (None, _) => LogAway::Embedded(SqliteLock::take(&self.embedded_log())),
            (Some(_), Some(node)) => {
                node.pause();
                LogAway::KafkaSilent(node)
            }
            (Some(_), None) => panic!("others use this broker too"),
        }
    }

    /// Kills the broker; it is started again when the value is dropped.
    ///
    /// # Panics
    /// If the site has no broker of its own.
    pub fn kill_broker(&self) -> LogAway<'_> {
        let node = self.node.as_ref().expect("a broker of its own");
        node.kill();
        LogAway::KafkaDead(node)
    }

    /// How many contacts are in the importers' database.
    pub fn contact_count(&self) -> usize {
        let database = Connection::open_with_flags(self.database(), OpenFlags::SQLITE_OPEN_READ_ONLY)
            .expect("the importers' database opens");
        let count: i64 = database
            .query_row("SELECT count(*) FROM contacts", [], |row| row.get(0))
            .expect("contacts are counted");
        count.try_into().expect("a count")
    }

    /// The brokers, if it stands on Kafka.
    pub fn brokers(&self) -> Option<&str> {
        self.brokers.as_deref()
    }

    /// The topic of chunks.
    pub fn chunks_topic(&self) -> String {
        format!("{}.{JOB_TYPE}", self.prefix)
    }

    /// The topic of events on their way to browsers.
    pub fn notifications_topic(&self) -> String {
        format!("{}.notifications", self.prefix)
    }

    /// The topic of commands to the job store.
    pub fn commands_topic(&self) -> String {
        format!("{}.jobs.commands", self.prefix)
    }

    /// The records of a topic that are committed, partition by partition, read past Barnabas.
    pub fn records(&self, topic: &str) -> Vec<OracleRecord> {
        match &self.brokers {
            Some(brokers) => read_kafka(brokers, topic),
            None => read_embedded(&self.embedded_data(), topic),
        }
    }

    /// Types of the events of a job that stand on the log, in order.
    pub fn told(&self, job: &str) -> Vec<String> {
        let events = self.records(&self.notifications_topic()).into_iter();
        let own = events.filter(|event| event.header("ce_subject") == job);
        own.map(|event| event.header("ce_type").to_owned()).collect()
    }

    /// How often workers said that a chunk of a job is done.
    pub fn done_commands(&self, job: &str) -> usize {
        self.count_done(|of| of == job)
    }

    /// How often workers said that a chunk of any job is done.
    pub fn all_done_commands(&self) -> usize {
        self.count_done(|_| true)
    }

    fn count_done(&self, of: impl Fn(&str) -> bool) -> usize {
        let commands = self.records(&self.commands_topic()).into_iter();
        let done = commands.filter(|command| of(&command.key_text()) && command.json()["command"] == "done");
        done.count()
    }

    /// The file of the embedded log.
    pub fn embedded_log(&self) -> PathBuf {
        self.embedded_data().join("log.sqlite")
    }

    /// Checks that every job of which anything is on the log is there with all its chunks, each once, and its registration, and
    /// returns the ids of all. Jobs may be written meanwhile.
    ///
    /// # Panics
    /// If not.
    pub fn assert_jobs_are_whole(&self) -> BTreeSet<String> {
        let registered_before = self.registered_jobs();
        let deadline = Instant::now() + WHOLE_TIMEOUT;
        let mut chunks = self.chunks_of_jobs();
        // Partitions are read one after the other: of what is committed meanwhile a part may be seen.
        while let Some((job, (chunks_there, total))) = chunks
            .iter()
            .find(|(_, (there, total))| !there.iter().copied().eq(0..*total))
        {
            assert!(
                Instant::now() < deadline,
                "job {job} has only {chunks_there:?} of {total}"
            );
            std::thread::sleep(Duration::from_millis(100));
            chunks = self.chunks_of_jobs();
        }
        // One that was written between two readings is in the second only.
        let with_chunks: BTreeSet<_> = chunks.into_keys().collect();
        let registered_after = self.registered_jobs();
        assert!(
            registered_before.is_subset(&with_chunks) && with_chunks.is_subset(&registered_after),
            "registered {registered_before:?}, then with chunks {with_chunks:?}, then registered {registered_after:?}"
        );
        with_chunks
    }

    /// The chunks of each job that are there, and how many it has.
    fn chunks_of_jobs(&self) -> BTreeMap<String, (BTreeSet<usize>, usize)> {
        let mut chunks: BTreeMap<String, (BTreeSet<usize>, usize)> = BTreeMap::new();
        for chunk in self.records(&self.chunks_topic()) {
            let job = chunk.header("bn-job").to_owned();
            let index = chunk.header("bn-chunk").parse().expect("a number");
            let total: usize = chunk.header("bn-chunks").parse().expect("a number");
            let (there, of) = chunks.entry(job.clone()).or_default();
            assert!(there.insert(index), "chunk {index} of job {job} is there twice");
            *of = total;
        }
        chunks
    }

    fn registered_jobs(&self) -> BTreeSet<String> {
        let mut registered = BTreeSet::new();
        for command in self.records(&self.commands_topic()) {
            if command.json()["command"] == "register" {
                let job = command.key_text();
                assert!(registered.insert(job.clone()), "job {job} is registered twice");
            }
        }
        registered
    }
}

/// A program that can be started again as it was.
#[derive(Debug)]
struct Run {
    program: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    output: PathBuf,
    /// None while it is killed.
    process: Option<Process>,
}

impl Run {
    fn start(&mut self) {
        assert!(self.process.is_none(), "it runs already");
        let process = Process::start(&self.program, &self.arguments, &self.environment, &self.output);
        self.process = Some(process);
    }

    fn process(&self) -> &Process {
        self.process.as_ref().expect("it runs")
    }

    fn process_mut(&mut self) -> &mut Process {
        self.process.as_mut().expect("it runs")
    }

    fn kill(&mut self) {
        self.process.take().expect("it runs").kill();
    }

    /// Stops what still runs, unless the test has failed anyway.
    fn end(&mut self) {
        if let Some(process) = self.process.take()
            && !std::thread::panicking()
        {
            process.stop();
        }
    }
}

/// A gateway. When dropped it is stopped as an operator would, and must leave nothing behind.
#[derive(Debug)]
pub struct Gateway {
    address: SocketAddr,
    data: PathBuf,
    run: Run,
}

impl Gateway {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its process.
    pub fn process(&self) -> &Process {
        self.run.process()
    }

    /// Ends it as a power cut would. Its data stays for [`Gateway::start`].
    pub fn kill(&mut self) {
        self.run.kill();
    }

    /// Stops it as an operator would. Its data stays for [`Gateway::start`].
    ///
    /// # Panics
    /// If it does not stop in time with exit status 0, or leaves uploads behind.
    pub fn stop(&mut self) {
        self.run.end();
        self.assert_nothing_left();
    }

    /// Starts it again, on the same port with the same data, and waits until it is ready.
    ///
    /// # Panics
    /// If it does not become ready.
    pub fn start(&mut self) {
        self.run.start();
        let deadline = Instant::now() + READY_TIMEOUT;
        while !is_ready(self.address) {
            let status = self.run.process_mut().try_wait();
            let process = self.run.process();
            assert!(status.is_none(), "it ended with {status:?}\n{}", process.last_output());
            assert!(Instant::now() < deadline, "it is not ready\n{}", process.last_output());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn assert_nothing_left(&self) {
        let left: Vec<_> = std::fs::read_dir(self.data.join("spool"))
            .map(|entries| entries.filter_map(Result::ok).map(|entry| entry.path()).collect())
            .unwrap_or_default();
        assert!(left.is_empty(), "uploads were left behind: {left:?}");
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        if self.run.process.is_some() {
            self.run.end();
            self.assert_nothing_left();
        }
    }
}

/// An importer on Kafka. When dropped it is stopped as an operator would.
#[derive(Debug)]
pub struct Importer {
    run: Run,
}

impl Importer {
    /// Its process.
    pub fn process(&self) -> &Process {
        self.run.process()
    }

    /// Ends it as a power cut would.
    pub fn kill(&mut self) {
        self.run.kill();
    }

    /// Starts it again.
    pub fn start(&mut self) {
        self.run.start();
    }
}

impl Drop for Importer {
    fn drop(&mut self) {
        self.run.end();
    }
}

/// Whether the gateway at an address says that it is ready.
pub fn is_ready(address: SocketAddr) -> bool {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"GET /healthz/ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    ask().is_ok_and(|answer| answer.starts_with("HTTP/1.1 200 "))
}

/// Waits for a fact.
///
/// # Panics
/// If it is not one by the deadline.
pub async fn wait_for(what: &str, timeout: Duration, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + timeout;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {timeout:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The addresses of [`contacts_csv`], sorted.
pub fn addresses(name: &str, rows: usize) -> Vec<String> {
    let mut addresses: Vec<String> = (1..=rows).map(|row| format!("{name}-{row}@example.org")).collect();
    addresses.sort();
    addresses
}

/// A CSV of contacts as the importer takes it, all good, their addresses begin with `name`.
pub fn contacts_csv(name: &str, rows: usize) -> String {
    let mut csv = String::from("name,email,phone\n");
    for row in 1..=rows {
        csv += &format!(
            "\"Amalia {row}, Castle\",{name}-{row}@example.org,+420 601 {:03} {:03}\n",
            row / 1000 % 1000,
            row % 1000
        );
    }
    csv
}
