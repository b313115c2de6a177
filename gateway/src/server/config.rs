//! Settings of the gateway: one struct per concern, read from `barnabas.toml`, the environment and the command line.
//!
//! A setting has one key, such as `http.header_timeout_ms`. In the file it stands under that key, in the environment as
//! `BARNABAS_HTTP_HEADER_TIMEOUT_MS`, on the command line as `--http-header-timeout-ms`. Flags win over the environment, which
//! wins over the file. Job types and options of librdkafka are tables of names and stand apart from the list.
//!
//! Invariant: a setting that is not known, or cannot be read, is an error that names it; nothing has started by then.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

#[cfg(doc)]
use crate::log::ProducerSettings;
use crate::log::{self, Log, TopicSpec};
use crate::patterns::{atomic_store, schedule};

/// The file that is read when it exists and no other is named.
const DEFAULT_FILE: &str = "barnabas.toml";

/// All settings of a gateway.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Where the gateway listens, and to whom it answers.
    pub listen: ListenConfig,
    /// Where the gateway keeps its files.
    pub data: DataConfig,
    /// Apache Kafka instead of the embedded log.
    pub kafka: KafkaConfig,
    /// Names and shape of the gateway's own topics.
    pub topics: TopicsConfig,
    /// Limits of HTTP connections.
    pub http: HttpConfig,
    /// Events that are posted.
    pub events: EventsConfig,
    /// Events that are pushed.
    pub push: PushConfig,
    /// Jobs that are posted.
    pub jobs: JobsConfig,
    /// Events that are posted for later.
    pub schedules: SchedulesConfig,
    /// Requests that may be repeated.
    pub idempotency: IdempotencyConfig,
    /// The page and the browser client.
    pub web: WebConfig,
    /// What is logged.
    pub logging: LoggingConfig,
}

/// Where the gateway listens, and to whom it answers.
#[derive(Clone, Debug)]
pub struct ListenConfig {
    /// Address and port. Default `127.0.0.1:8080`, `BARNABAS_LISTEN`. Only a loopback address is taken, see `insecure`.
    pub address: SocketAddr,
    /// Listen on an address that others can reach although nobody has to say who they are: everybody who reaches it may post
    /// jobs and read every channel. For a private network, such as that of a Compose file, behind something that asks.
    /// Default false, `BARNABAS_INSECURE_LISTEN`.
    pub insecure: bool,
    /// Origins besides the gateway's own whose pages may post and subscribe, such as `https://app.example.org`, separated by
    /// commas. Default none, `BARNABAS_ALLOWED_ORIGINS`.
    pub allowed_origins: Vec<String>,
}

impl Default for ListenConfig {
    fn default() -> Self {
        Self {
            address: SocketAddr::from(([127, 0, 0, 1], 8080)),
            insecure: false,
            allowed_origins: Vec::new(),
        }
    }
}

/// Where the gateway keeps its files.
#[derive(Clone, Debug)]
pub struct DataConfig {
    /// The folder of the embedded log, of uploads on their way and of the job view. One gateway uses it at a time. Default
    /// `barnabas-data` in the working directory, `BARNABAS_DATA_DIR`.
    pub dir: PathBuf,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            dir: PathBuf::from("barnabas-data"),
        }
    }
}

/// Apache Kafka instead of the embedded log.
#[derive(Clone, Default)]
pub struct KafkaConfig {
    /// `host:port`, separated by commas. Default none: the embedded log. `KAFKA_BROKERS`.
    pub brokers: Option<String>,
    /// Passed to librdkafka as they are: `BARNABAS_KAFKA_SECURITY_PROTOCOL=SASL_SSL` is `security.protocol`. Default none.
    pub options: BTreeMap<String, String>,
}

impl fmt::Debug for KafkaConfig {
    /// Names of options only: passwords are among them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KafkaConfig")
            .field("brokers", &self.brokers)
            .field("options", &self.options.keys())
            .finish()
    }
}

/// Names and shape of the gateway's own topics.
#[derive(Clone, Debug)]
pub struct TopicsConfig {
    /// First part of their names. Default `barnabas`, `BARNABAS_TOPICS_PREFIX`.
    pub prefix: String,
    /// Partitions of each. Never changed on topics that exist: keys and tokens would move. Default 8, `BARNABAS_TOPICS_PARTITIONS`.
    pub partitions: i32,
    /// Copies of each record. Default: the broker's, `BARNABAS_TOPICS_REPLICATION`.
    pub replication: Option<i16>,
    /// Hours for which records are kept: how far back a browser can resume. Default 168 (7 days),
    /// `BARNABAS_TOPICS_RETENTION_HOURS`.
    pub retention: Duration,
}

impl Default for TopicsConfig {
    fn default() -> Self {
        Self {
            prefix: "barnabas".to_owned(),
            partitions: 8,
            replication: None,
            retention: Duration::from_secs(7 * 24 * 60 * 60),
        }
    }
}

impl TopicsConfig {
    /// The topic of events on their way to browsers, keyed by channel id.
    pub fn notifications(&self) -> String {
        format!("{}.notifications", self.prefix)
    }

    /// The topic of commands to the job store, keyed by job id.
    pub fn job_commands(&self) -> String {
        format!("{}.jobs.commands", self.prefix)
    }

    /// The topic of job states, keyed by job id.
    pub fn jobs(&self) -> String {
        format!("{}.jobs", self.prefix)
    }

    /// The topic of idempotency keys, keyed by them.
    pub fn idempotency(&self) -> String {
        format!("{}.idempotency", self.prefix)
    }

    /// The topic of schedules, keyed by schedule id.
    pub fn schedules(&self) -> String {
        format!("{}.schedules", self.prefix)
    }

    /// The gateway's own topics as they should be, except for [`TopicsConfig::idempotency`] and [`TopicsConfig::schedules`].
    pub fn specs(&self) -> Vec<TopicSpec> {
        let notifications = TopicSpec {
            fixed_partitions: true,
            retention: Some(self.retention),
            ..TopicSpec::new(self.notifications(), self.partitions)
        };
        let of_jobs = atomic_store::topics(&self.jobs(), self.partitions, self.retention);
        let mut specs = vec![notifications];
        specs.extend(of_jobs);
        for spec in &mut specs {
            spec.replication = self.replication;
        }
        specs
    }
}

/// Limits of HTTP connections.
#[derive(Clone, Debug)]
pub struct HttpConfig {
    /// Milliseconds within which a request's head must be there, and for which a connection may be idle. Default 5000,
    /// `BARNABAS_HTTP_HEADER_TIMEOUT_MS`.
    pub header_timeout: Duration,
    /// Bytes of a request's head. Default 16384, `BARNABAS_HTTP_MAX_HEADER_BYTES`.
    pub max_header_bytes: usize,
    /// Fields of a request's head. Default 64, `BARNABAS_HTTP_MAX_HEADERS`.
    pub max_headers: usize,
    /// Milliseconds without a byte after which a request's body is given up. Default 10000, `BARNABAS_HTTP_STALL_TIMEOUT_MS`.
    pub stall_timeout: Duration,
    /// Connections at a time; more wait in the kernel's queue. Default: 80 % of the process's limit of open files,
    /// `BARNABAS_HTTP_MAX_CONNECTIONS`.
    pub max_connections: Option<usize>,
    /// Milliseconds that connections have to end when the gateway stops. Default 30000, `BARNABAS_HTTP_SHUTDOWN_GRACE_MS`.
    pub shutdown_grace: Duration,
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            header_timeout: Duration::from_secs(5),
            max_header_bytes: 16 * 1024,
            max_headers: 64,
            stall_timeout: Duration::from_secs(10),
            max_connections: None,
            shutdown_grace: Duration::from_secs(30),
        }
    }
}

/// Events that are posted.
#[derive(Clone, Debug)]
pub struct EventsConfig {
    /// Bytes of a request's body. Default 262144, `BARNABAS_EVENTS_MAX_BODY_BYTES`.
    pub max_body_bytes: usize,
    /// Milliseconds within which the log must have acknowledged, else the answer is 503. Default 10000,
    /// `BARNABAS_EVENTS_DEADLINE_MS`.
    pub deadline: Duration,
    /// Topics to which events may be posted with `POST /v1/topics/{topic}/events`, separated by commas, each with its profile or
    /// without: `orders,clicks:telemetry`. They must exist. Default none, `BARNABAS_EVENTS_TOPICS`.
    pub topics: Vec<OpenTopic>,
    /// Bytes of events for open topics that may wait for the log, all together; past it the answer is 429. Default 16777216 (16 MiB),
    /// `BARNABAS_EVENTS_QUEUE_BYTES`.
    pub queue_bytes: u32,
}

impl Default for EventsConfig {
    fn default() -> Self {
        Self {
            max_body_bytes: 256 * 1024,
            deadline: Duration::from_secs(10),
            topics: Vec::new(),
            queue_bytes: 16 * 1024 * 1024,
        }
    }
}

/// A topic to which events may be posted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenTopic {
    /// Its name.
    pub name: String,
    /// How its events are produced.
    pub profile: ProducerProfile,
}

impl OpenTopic {
    /// A topic of commands.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            profile: ProducerProfile::default(),
        }
    }

    /// A topic of telemetry.
    pub fn telemetry(name: impl Into<String>) -> Self {
        Self {
            profile: ProducerProfile::Telemetry,
            ..Self::new(name)
        }
    }
}

impl FromStr for OpenTopic {
    type Err = String;

    fn from_str(value: &str) -> Result<Self, String> {
        match value.split_once(':') {
            None => Ok(Self::new(value)),
            Some((name, "command")) => Ok(Self::new(name)),
            Some((name, "telemetry")) => Ok(Self::telemetry(name)),
            Some((_, profile)) => Err(format!("{profile:?} is neither command nor telemetry")),
        }
    }
}

/// How events of a topic are produced. All are acknowledged by all replicas before they are answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProducerProfile {
    /// Each at once.
    #[default]
    Command,
    /// In compressed batches: [`ProducerSettings::telemetry`].
    Telemetry,
}

/// Events that are pushed.
#[derive(Clone, Debug)]
pub struct PushConfig {
    /// Bytes that may wait for one client; past it the client is fed from the log when it reads on. Default 1048576 (1 MiB),
    /// `BARNABAS_PUSH_BACKLOG_BYTES`.
    pub backlog_bytes: usize,
    /// Bytes of recent events of each partition that are kept in memory for those who come back. Default 4194304 (4 MiB),
    /// `BARNABAS_PUSH_HISTORY_BYTES`.
    pub history_bytes: usize,
    /// Channels of one connection or request. Default 128, `BARNABAS_PUSH_MAX_CHANNELS`.
    pub max_channels: usize,
    /// Seconds that a long-poll waits at most, and if it does not say. Default 25, `BARNABAS_PUSH_POLL_WAIT_S`.
    pub poll_wait: Duration,
    /// Bytes of a WebSocket message from a client. Default 65536, `BARNABAS_PUSH_MAX_MESSAGE_BYTES`.
    pub max_message_bytes: usize,
    /// WebSocket messages of a client each second, in the long run. Default 20, `BARNABAS_PUSH_MESSAGES_PER_SECOND`.
    pub messages_per_second: u32,
    /// WebSocket messages of a client at once. Default 40, `BARNABAS_PUSH_MESSAGE_BURST`.
    pub message_burst: u32,
    /// Milliseconds within which a WebSocket's first command must come. Default 5000, `BARNABAS_PUSH_CONNECT_TIMEOUT_MS`.
    pub connect_timeout: Duration,
    /// Milliseconds between pings of a WebSocket. Default 25000, `BARNABAS_PUSH_PING_MS`.
    pub ping: Duration,
    /// Milliseconds within which a ping must be answered. Default 8000, `BARNABAS_PUSH_PONG_TIMEOUT_MS`.
    pub pong_timeout: Duration,
}

impl Default for PushConfig {
    fn default() -> Self {
        Self {
            backlog_bytes: 1024 * 1024,
            history_bytes: 4 * 1024 * 1024,
            max_channels: 128,
            poll_wait: Duration::from_secs(25),
            max_message_bytes: 64 * 1024,
            messages_per_second: 20,
            message_burst: 40,
            connect_timeout: Duration::from_secs(5),
            ping: Duration::from_secs(25),
            pong_timeout: Duration::from_secs(8),
        }
    }
}

/// Jobs that are posted.
#[derive(Clone, Debug)]
pub struct JobsConfig {
    /// Transactional producers that small jobs share. Default 4, `BARNABAS_JOBS_LANES`.
    pub lanes: usize,
    /// Large jobs that are produced at a time, each in a transaction of its own. Default 2, `BARNABAS_JOBS_LARGE_LANES`.
    pub large_lanes: usize,
    /// Bytes above which a job is large. Default 1048576, `BARNABAS_JOBS_LARGE_BYTES`.
    pub large_bytes: u64,
    /// Bytes of waiting jobs that are held in memory, all together; what is more goes to files. Default 16777216 (16 MiB),
    /// `BARNABAS_JOBS_MEMORY_BYTES`.
    pub memory_bytes: usize,
    /// Milliseconds within which the log must have acknowledged a job, plus one second for each MiB of it, else the answer is
    /// 503. Default 20000, `BARNABAS_JOBS_DEADLINE_MS`.
    pub deadline: Duration,
    /// Whether this node keeps the state of jobs for `GET /v1/jobs/{id}`. Default true, `BARNABAS_JOBS_VIEW`.
    pub view: bool,
    /// The job types by name, in the file as tables `[job_types.NAME]`. Default: `import-contacts`, CSV.
    pub types: BTreeMap<String, JobTypeConfig>,
}

impl Default for JobsConfig {
    fn default() -> Self {
        Self {
            lanes: 4,
            large_lanes: 2,
            large_bytes: 1024 * 1024,
            memory_bytes: 16 * 1024 * 1024,
            deadline: Duration::from_secs(20),
            view: true,
            types: BTreeMap::from([(
                "import-contacts".to_owned(),
                JobTypeConfig::new("import-contacts", BodyFormat::Csv),
            )]),
        }
    }
}

/// What the body of a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyFormat {
    /// CSV with a header line.
    Csv,
    /// One JSON value on each line.
    Ndjson,
}

impl FromStr for BodyFormat {
    type Err = String;

    fn from_str(value: &str) -> Result<Self, String> {
        match value {
            "csv" => Ok(Self::Csv),
            "ndjson" => Ok(Self::Ndjson),
            _ => Err("neither csv nor ndjson".to_owned()),
        }
    }
}

/// A job type: everything that the gateway has to know of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobTypeConfig {
    /// The topic of its chunks, `topic`. Default: the job type's name.
    pub topic: String,
    /// What its body is, `format`: `csv` or `ndjson`. Must be given.
    pub format: BodyFormat,
    /// Rows of a chunk at most, `chunk_rows`. Default 500.
    pub chunk_rows: u32,
    /// Bytes of a chunk at most, with its header line, `chunk_bytes`. Default 262144.
    pub chunk_bytes: usize,
    /// Bytes of a body at most, `max_body_bytes`. Default 268435456 (256 MiB).
    pub max_body_bytes: u64,
    /// Partitions of its topic, `partitions`: how many workers can share the work. Default 8.
    pub partitions: i32,
}

impl JobTypeConfig {
    /// A job type with everything else at its default.
    pub fn new(name: &str, format: BodyFormat) -> Self {
        Self {
            topic: name.to_owned(),
            format,
            chunk_rows: 500,
            chunk_bytes: 256 * 1024,
            max_body_bytes: 256 * 1024 * 1024,
            partitions: 8,
        }
    }

    /// The job type's topic as it should be.
    pub fn topic_spec(&self, topics: &TopicsConfig) -> TopicSpec {
        TopicSpec {
            replication: topics.replication,
            retention: Some(topics.retention),
            ..TopicSpec::new(&self.topic, self.partitions)
        }
    }
}

/// Events that are posted for later. They go to the topics of [`EventsConfig::topics`]; with none there are no schedules.
#[derive(Clone, Debug)]
pub struct SchedulesConfig {
    /// Whether this node fires what is due. At least one of those on a log has to. Default true, `BARNABAS_SCHEDULES_FIRE`.
    pub fire: bool,
}

impl Default for SchedulesConfig {
    fn default() -> Self {
        Self { fire: true }
    }
}

impl SchedulesConfig {
    /// The topics of schedules and of the commands for them, as they should be.
    pub fn topic_specs(topics: &TopicsConfig) -> [TopicSpec; 2] {
        let specs = schedule::topics(&topics.schedules(), topics.partitions, topics.retention);
        specs.map(|spec| TopicSpec {
            replication: topics.replication,
            ..spec
        })
    }
}

/// Requests that may be repeated.
#[derive(Clone, Debug)]
pub struct IdempotencyConfig {
    /// Hours for which a request with an `Idempotency-Key` is answered as the first time. Default 24,
    /// `BARNABAS_IDEMPOTENCY_RETENTION_HOURS`.
    pub retention: Duration,
}

impl Default for IdempotencyConfig {
    fn default() -> Self {
        Self {
            retention: Duration::from_secs(24 * 60 * 60),
        }
    }
}

impl IdempotencyConfig {
    /// What the topic keeps keys beyond their time, so that nodes whose clocks differ agree on each.
    const SLACK: Duration = Duration::from_secs(60 * 60);

    /// The topic of keys as it should be. It is not compacted: of a key's records the first counts, not the last.
    pub fn topic_spec(&self, topics: &TopicsConfig) -> TopicSpec {
        TopicSpec {
            fixed_partitions: true,
            replication: topics.replication,
            retention: Some(self.retention + Self::SLACK),
            ..TopicSpec::new(topics.idempotency(), topics.partitions)
        }
    }
}

/// The page and the browser client.
#[derive(Clone, Debug, Default)]
pub struct WebConfig {
    /// Serve them from this folder instead of from the binary, so that a change shows on reload. Default none, `BARNABAS_WEB_DIR`.
    pub dir: Option<PathBuf>,
}

/// What is logged, on standard error.
#[derive(Clone, Debug)]
pub struct LoggingConfig {
    /// `text` or `json`. Default `text`, `BARNABAS_LOGGING_FORMAT`.
    pub format: LoggingFormat,
    /// Levels by module, as tracing-subscriber reads them. Default `info`, `BARNABAS_LOGGING_FILTER`.
    pub filter: String,
}

impl Default for LoggingConfig {
    fn default() -> Self {
        Self {
            format: LoggingFormat::Text,
            filter: "info".to_owned(),
        }
    }
}

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoggingFormat {
    /// For people.
    Text,
    /// One JSON object on each line.
    Json,
}

impl FromStr for LoggingFormat {
    type Err = String;

    fn from_str(value: &str) -> Result<Self, String> {
        match value {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err("neither text nor json".to_owned()),
        }
    }
}

/// A setting that is unknown or cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{setting}: {reason}")]
pub struct ConfigError {
    /// The setting as it was written: a variable, a flag, or the file and key.
    pub setting: String,
    /// What is wrong with it.
    pub reason: String,
}

impl ConfigError {
    fn new(setting: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            setting: setting.into(),
            reason: reason.into(),
        }
    }
}

/// A setting with one value: where it is called what, and how it is read.
struct Setting {
    key: &'static str,
    /// What `--help` says: the unit and the default.
    help: &'static str,
    read: fn(&mut Config, &str) -> Result<(), String>,
}

/// Every setting with one value. To add one: a field with its doc above, a line here.
#[rustfmt::skip]
const SETTINGS: &[Setting] = &[
    Setting { key: "listen", help: "address and port [127.0.0.1:8080]", read: |c, v| put(v, &mut c.listen.address) },
    Setting { key: "insecure_listen", help: "allow an address that is not loopback, without any authentication [false]", read: |c, v| put_bool(v, &mut c.listen.insecure) },
    Setting { key: "allowed_origins", help: "other origins whose pages may call, comma separated [none]", read: |c, v| put_origins(v, &mut c.listen.allowed_origins) },
    Setting { key: "data_dir", help: "folder of the gateway's files [barnabas-data]", read: |c, v| put(v, &mut c.data.dir) },
    Setting { key: "kafka.brokers", help: "host:port, comma separated [none: the embedded log]", read: |c, v| put_some(v, &mut c.kafka.brokers) },
    Setting { key: "topics.prefix", help: "first part of the names of topics [barnabas]", read: |c, v| put(v, &mut c.topics.prefix) },
    Setting { key: "topics.partitions", help: "partitions of each topic [8]", read: |c, v| put_positive(v, &mut c.topics.partitions) },
    Setting { key: "topics.replication", help: "copies of each record [the broker's default]", read: |c, v| put_some(v, &mut c.topics.replication) },
    Setting { key: "topics.retention_hours", help: "hours for which records are kept [168]", read: |c, v| put_duration(v, 3_600_000, &mut c.topics.retention) },
    Setting { key: "http.header_timeout_ms", help: "time for a request's head [5000]", read: |c, v| put_duration(v, 1, &mut c.http.header_timeout) },
    Setting { key: "http.max_header_bytes", help: "size of a request's head [16384]", read: |c, v| put_positive(v, &mut c.http.max_header_bytes) },
    Setting { key: "http.max_headers", help: "fields of a request's head [64]", read: |c, v| put_positive(v, &mut c.http.max_headers) },
    Setting { key: "http.stall_timeout_ms", help: "time without a byte of a body [10000]", read: |c, v| put_duration(v, 1, &mut c.http.stall_timeout) },
    Setting { key: "http.max_connections", help: "connections at a time [80 % of the limit of open files]", read: |c, v| put_some(v, &mut c.http.max_connections) },
    Setting { key: "http.shutdown_grace_ms", help: "time for connections to end at shutdown, and then for tasks [30000]", read: |c, v| put_duration(v, 1, &mut c.http.shutdown_grace) },
    Setting { key: "events.max_body_bytes", help: "size of a body with events [262144]", read: |c, v| put_positive(v, &mut c.events.max_body_bytes) },
    Setting { key: "events.deadline_ms", help: "time for the log to acknowledge events [10000]", read: |c, v| put_duration(v, 1, &mut c.events.deadline) },
    Setting { key: "events.topics", help: "topics to which events may be posted, such as orders,clicks:telemetry [none]", read: |c, v| put_topics(v, &mut c.events.topics) },
    Setting { key: "events.queue_bytes", help: "bytes of events for these topics that wait for the log [16777216]", read: |c, v| put_positive(v, &mut c.events.queue_bytes) },
    Setting { key: "push.backlog_bytes", help: "bytes that wait for one client [1048576]", read: |c, v| put_positive(v, &mut c.push.backlog_bytes) },
    Setting { key: "push.history_bytes", help: "recent events of a partition in memory [4194304]", read: |c, v| put_positive(v, &mut c.push.history_bytes) },
    Setting { key: "push.max_channels", help: "channels of one connection [128]", read: |c, v| put_positive(v, &mut c.push.max_channels) },
    Setting { key: "push.poll_wait_s", help: "seconds that a long-poll waits [25]", read: |c, v| put_duration(v, 1000, &mut c.push.poll_wait) },
    Setting { key: "push.max_message_bytes", help: "size of a WebSocket message from a client [65536]", read: |c, v| put_positive(v, &mut c.push.max_message_bytes) },
    Setting { key: "push.messages_per_second", help: "WebSocket messages of a client each second [20]", read: |c, v| put_positive(v, &mut c.push.messages_per_second) },
    Setting { key: "push.message_burst", help: "WebSocket messages of a client at once [40]", read: |c, v| put_positive(v, &mut c.push.message_burst) },
    Setting { key: "push.connect_timeout_ms", help: "time for a WebSocket's first command [5000]", read: |c, v| put_duration(v, 1, &mut c.push.connect_timeout) },
    Setting { key: "push.ping_ms", help: "time between pings of a WebSocket [25000]", read: |c, v| put_duration(v, 1, &mut c.push.ping) },
    Setting { key: "push.pong_timeout_ms", help: "time for the answer to a ping [8000]", read: |c, v| put_duration(v, 1, &mut c.push.pong_timeout) },
    Setting { key: "jobs.lanes", help: "transactional producers that small jobs share [4]", read: |c, v| put_positive(v, &mut c.jobs.lanes) },
    Setting { key: "jobs.large_lanes", help: "large jobs that are produced at a time [2]", read: |c, v| put_positive(v, &mut c.jobs.large_lanes) },
    Setting { key: "jobs.large_bytes", help: "size above which a job is large [1048576]", read: |c, v| put_positive(v, &mut c.jobs.large_bytes) },
    Setting { key: "jobs.memory_bytes", help: "waiting jobs in memory, all together [16777216]", read: |c, v| put_positive(v, &mut c.jobs.memory_bytes) },
    Setting { key: "jobs.deadline_ms", help: "time for the log to acknowledge a job, plus 1 s per MiB [20000]", read: |c, v| put_duration(v, 1, &mut c.jobs.deadline) },
    Setting { key: "jobs.view", help: "keep the state of jobs on this node [true]", read: |c, v| put_bool(v, &mut c.jobs.view) },
    Setting { key: "schedules.fire", help: "fire the schedules that are due [true]", read: |c, v| put_bool(v, &mut c.schedules.fire) },
    Setting { key: "idempotency.retention_hours", help: "hours for which a repeated request is answered as the first time [24]", read: |c, v| put_duration(v, 3_600_000, &mut c.idempotency.retention) },
    Setting { key: "web_dir", help: "serve the page from this folder [from the binary]", read: |c, v| put_some(v, &mut c.web.dir) },
    Setting { key: "logging.format", help: "text or json [text]", read: |c, v| put(v, &mut c.logging.format) },
    Setting { key: "logging.filter", help: "levels by module [info]", read: |c, v| put(v, &mut c.logging.filter) },
];

/// Settings of a job type, in the file only.
const JOB_TYPE_SETTINGS: &[&str] = &[
    "topic",
    "format",
    "chunk_rows",
    "chunk_bytes",
    "max_body_bytes",
    "partitions",
];

impl Setting {
    fn variable(&self) -> String {
        match self.key {
            "kafka.brokers" => "KAFKA_BROKERS".to_owned(),
            key => format!("BARNABAS_{}", key.replace('.', "_").to_ascii_uppercase()),
        }
    }

    fn flag(&self) -> String {
        format!("--{}", self.key.replace(['.', '_'], "-"))
    }
}

impl Config {
    /// Settings for a test: a free port, and files in `data_dir`.
    pub fn for_tests(data_dir: impl Into<PathBuf>) -> Self {
        let mut config = Self::default();
        config.listen.address.set_port(0);
        config.data.dir = data_dir.into();
        config.http.shutdown_grace = Duration::from_secs(5);
        config
    }

    /// Settings of this process: its arguments (without the program's name), its environment, and the file named by `--config` or
    /// `BARNABAS_CONFIG`, else `barnabas.toml` in the working directory if there is one.
    ///
    /// # Errors
    /// The first setting that is not known or cannot be read.
    pub fn load(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, ConfigError> {
        Self::from_sources(arguments, std::env::vars_os())
    }

    /// As [`Config::load`], with an environment of the caller's.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn from_sources(
        arguments: impl IntoIterator<Item = OsString>,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Self, ConfigError> {
        let flags = flags(arguments)?;
        let variables = variables(environment)?;
        let mut config = Self::default();
        let named = flags
            .iter()
            .find(|(flag, _)| flag == "--config")
            .or_else(|| variables.iter().find(|(name, _)| name == "BARNABAS_CONFIG"));
        if let Some((setting, file)) = named {
            let text = std::fs::read_to_string(file)
                .map_err(|error| ConfigError::new(setting, format!("cannot read {file}: {error}")))?;
            config.read_file(Path::new(file), &text)?;
        } else if let Ok(text) = std::fs::read_to_string(DEFAULT_FILE) {
            config.read_file(Path::new(DEFAULT_FILE), &text)?;
        }
        for (name, value) in &variables {
            config.read_variable(name, value)?;
        }
        for (flag, value) in &flags {
            config.read_flag(flag, value)?;
        }
        config.check()?;
        Ok(config)
    }

    /// The settings as `--help` lists them.
    pub fn help() -> String {
        let mut text = String::from("  --config  BARNABAS_CONFIG\n        file with settings [barnabas.toml]\n");
        for setting in SETTINGS {
            text += &format!(
                "  {}  {}\n        {}\n",
                setting.flag(),
                setting.variable(),
                setting.help
            );
        }
        text + "  BARNABAS_KAFKA_*\n        options of librdkafka: BARNABAS_KAFKA_SECURITY_PROTOCOL is security.protocol\n"
    }

    /// Opens the log that the settings name: Kafka's if `KAFKA_BROKERS` is set, else the embedded one in the data folder.
    ///
    /// # Errors
    /// Those of [`Log::connect_kafka`] and [`Log::open_embedded`].
    pub async fn open_log(&self) -> log::Result<Log> {
        match &self.kafka.brokers {
            Some(brokers) => {
                let mut settings = log::kafka::KafkaSettings::new(brokers);
                settings.overrides.clone_from(&self.kafka.options);
                Log::connect_kafka(settings).await
            }
            None => Log::open_embedded(log::embedded::EmbeddedSettings::new(self.data.dir.clone())).await,
        }
    }

    /// All topics that the gateway needs, as they should be.
    pub fn topic_specs(&self) -> Vec<TopicSpec> {
        let mut specs = self.topics.specs();
        specs.push(self.idempotency.topic_spec(&self.topics));
        if self.has_schedules() {
            specs.extend(SchedulesConfig::topic_specs(&self.topics));
        }
        specs.extend(
            self.jobs
                .types
                .values()
                .map(|job_type| job_type.topic_spec(&self.topics)),
        );
        specs
    }

    /// Whether there is a topic to which events can be scheduled.
    pub fn has_schedules(&self) -> bool {
        !self.events.topics.is_empty()
    }

    fn read_flag(&mut self, flag: &str, value: &str) -> Result<(), ConfigError> {
        if flag == "--config" {
            return Ok(());
        }
        let Some(setting) = SETTINGS.iter().find(|setting| setting.flag() == flag) else {
            return Err(unknown(flag, flag, SETTINGS.iter().map(Setting::flag)));
        };
        (setting.read)(self, value).map_err(|reason| ConfigError::new(flag, reason))
    }

    fn read_variable(&mut self, name: &str, value: &str) -> Result<(), ConfigError> {
        // The file is read already; where the gateway is asks the command line.
        if ["BARNABAS_CONFIG", "BARNABAS_GATEWAY"].contains(&name) {
            return Ok(());
        }
        if let Some(setting) = SETTINGS.iter().find(|setting| setting.variable() == name) {
            return (setting.read)(self, value).map_err(|reason| ConfigError::new(name, reason));
        }
        if let Some(option) = name.strip_prefix("BARNABAS_KAFKA_") {
            let option = option.to_ascii_lowercase().replace('_', ".");
            self.kafka.options.insert(option, value.to_owned());
            return Ok(());
        }
        Err(unknown(name, name, SETTINGS.iter().map(Setting::variable)))
    }

    fn read_file(&mut self, file: &Path, text: &str) -> Result<(), ConfigError> {
        let table: toml::Table = text
            .parse()
            .map_err(|error: toml::de::Error| ConfigError::new(file.display().to_string(), error.to_string()))?;
        let mut values = Vec::new();
        for (key, value) in table {
            match (key.as_str(), value) {
                ("job_types", toml::Value::Table(types)) => self.read_job_types(file, types)?,
                (_, value) => flatten(key, value, &mut values),
            }
        }
        for (key, value) in values {
            let at = format!("{}: {key}", file.display());
            let value = plain(value).ok_or_else(|| ConfigError::new(&at, "a string, number or boolean is wanted"))?;
            if let Some(setting) = SETTINGS.iter().find(|setting| setting.key == key) {
                (setting.read)(self, &value).map_err(|reason| ConfigError::new(at, reason))?;
            } else if let Some(option) = key.strip_prefix("kafka.") {
                self.kafka.options.insert(option.to_owned(), value);
            } else {
                return Err(unknown(
                    &at,
                    &key,
                    SETTINGS.iter().map(|setting| setting.key.to_owned()),
                ));
            }
        }
        Ok(())
    }

    fn read_job_types(&mut self, file: &Path, types: toml::Table) -> Result<(), ConfigError> {
        for (name, value) in types {
            let at = format!("{}: job_types.{name}", file.display());
            let toml::Value::Table(table) = value else {
                return Err(ConfigError::new(at, "a table is wanted"));
            };
            let known = self.jobs.types.remove(&name);
            let mut job_type = known
                .clone()
                .unwrap_or_else(|| JobTypeConfig::new(&name, BodyFormat::Csv));
            if known.is_none() && !table.contains_key("format") {
                return Err(ConfigError::new(at, "format is missing: csv or ndjson"));
            }
            for (key, value) in table {
                let at = format!("{at}.{key}");
                let value = plain(value).ok_or_else(|| ConfigError::new(&at, "a string or number is wanted"))?;
                match key.as_str() {
                    "topic" => put(&value, &mut job_type.topic),
                    "format" => put(&value, &mut job_type.format),
                    "chunk_rows" => put_positive(&value, &mut job_type.chunk_rows),
                    "chunk_bytes" => put_positive(&value, &mut job_type.chunk_bytes),
                    "max_body_bytes" => put_positive(&value, &mut job_type.max_body_bytes),
                    "partitions" => put_positive(&value, &mut job_type.partitions),
                    _ => {
                        return Err(unknown(
                            &at,
                            &key,
                            JOB_TYPE_SETTINGS.iter().map(|key| (*key).to_owned()),
                        ));
                    }
                }
                .map_err(|reason| ConfigError::new(at, reason))?;
            }
            self.jobs.types.insert(name, job_type);
        }
        Ok(())
    }

    /// What can only be seen when all is read.
    fn check(&self) -> Result<(), ConfigError> {
        if !self.listen.address.ip().is_loopback() && !self.listen.insecure {
            return Err(ConfigError::new(
                "BARNABAS_LISTEN",
                format!(
                    "no authentication is configured, so only a loopback address such as 127.0.0.1 can be listened on, not {}; \
                     BARNABAS_INSECURE_LISTEN=1 allows it to everybody who can reach it",
                    self.listen.address.ip()
                ),
            ));
        }
        let own = format!("{}.", self.topics.prefix);
        if let Some(topic) = self.events.topics.iter().find(|topic| topic.name.starts_with(&own)) {
            return Err(ConfigError::new(
                "BARNABAS_EVENTS_TOPICS",
                format!("{} is the gateway's own topic", topic.name),
            ));
        }
        if self.idempotency.retention.is_zero() {
            return Err(ConfigError::new(
                "BARNABAS_IDEMPOTENCY_RETENTION_HOURS",
                "must be at least 1",
            ));
        }
        for (name, job_type) in &self.jobs.types {
            let at = format!("job_types.{name}");
            if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
                return Err(ConfigError::new(at, "a name is made of A-Za-z0-9._-"));
            }
            if job_type.chunk_bytes > TopicSpec::DEFAULT_MAX_MESSAGE_BYTES / 2 {
                return Err(ConfigError::new(
                    format!("{at}.chunk_bytes"),
                    "a chunk must fit into a record: at most 524294",
                ));
            }
        }
        Ok(())
    }
}

/// Arguments as (flag, value), from `--flag value` and `--flag=value`.
fn flags(arguments: impl IntoIterator<Item = OsString>) -> Result<Vec<(String, String)>, ConfigError> {
    let mut flags = Vec::new();
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        let argument = text(argument)?;
        if !argument.starts_with("--") {
            return Err(ConfigError::new(argument, "is not a flag"));
        }
        let (flag, value) = match argument.split_once('=') {
            Some((flag, value)) => (flag.to_owned(), value.to_owned()),
            None => match arguments.next().map(text).transpose()? {
                Some(value) if !value.starts_with("--") => (argument, value),
                _ => return Err(ConfigError::new(argument, "has no value")),
            },
        };
        flags.push((flag, value));
    }
    Ok(flags)
}

/// The variables that are Barnabas's. An empty one counts as not set, as in Compose files.
fn variables(
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Vec<(String, String)>, ConfigError> {
    let mut variables = Vec::new();
    for (name, value) in environment {
        let Some(name) = name.to_str() else { continue };
        if (name.starts_with("BARNABAS_") || name == "KAFKA_BROKERS") && !value.is_empty() {
            let value = value
                .into_string()
                .map_err(|_| ConfigError::new(name, "is not UTF-8"))?;
            variables.push((name.to_owned(), value));
        }
    }
    variables.sort();
    Ok(variables)
}

fn text(argument: OsString) -> Result<String, ConfigError> {
    argument
        .into_string()
        .map_err(|argument| ConfigError::new(argument.to_string_lossy(), "is not UTF-8"))
}

fn flatten(key: String, value: toml::Value, into: &mut Vec<(String, toml::Value)>) {
    match value {
        toml::Value::Table(table) => {
            for (inner, value) in table {
                flatten(format!("{key}.{inner}"), value, into);
            }
        }
        value => into.push((key, value)),
    }
}

/// A TOML value as the text that a variable would hold.
fn plain(value: toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Boolean(yes) => Some(yes.to_string()),
        toml::Value::Array(values) => {
            let values: Option<Vec<String>> = values.into_iter().map(plain).collect();
            Some(values?.join(","))
        }
        _ => None,
    }
}

fn put<T: FromStr<Err: fmt::Display>>(value: &str, into: &mut T) -> Result<(), String> {
    *into = value
        .parse()
        .map_err(|error: T::Err| format!("cannot read {value:?}: {error}"))?;
    Ok(())
}

fn put_some<T: FromStr<Err: fmt::Display>>(value: &str, into: &mut Option<T>) -> Result<(), String> {
    *into = Some(
        value
            .parse()
            .map_err(|error: T::Err| format!("cannot read {value:?}: {error}"))?,
    );
    Ok(())
}

fn put_positive<T: FromStr<Err: fmt::Display> + PartialOrd + From<u8>>(
    value: &str,
    into: &mut T,
) -> Result<(), String> {
    put(value, into)?;
    if *into < T::from(1) {
        return Err("must be at least 1".to_owned());
    }
    Ok(())
}

fn put_bool(value: &str, into: &mut bool) -> Result<(), String> {
    *into = match value {
        "1" | "true" | "yes" => true,
        "0" | "false" | "no" => false,
        _ => return Err(format!("{value:?} is neither true nor false")),
    };
    Ok(())
}

fn put_duration(value: &str, unit_ms: u64, into: &mut Duration) -> Result<(), String> {
    let mut units = 0u64;
    put(value, &mut units)?;
    let ms = units.checked_mul(unit_ms).ok_or_else(|| "is too long".to_owned())?;
    *into = Duration::from_millis(ms);
    Ok(())
}

fn put_origins(value: &str, into: &mut Vec<String>) -> Result<(), String> {
    into.clear();
    for origin in value.split(',').map(str::trim).filter(|origin| !origin.is_empty()) {
        let rest = origin
            .strip_prefix("https://")
            .or_else(|| origin.strip_prefix("http://"))
            .ok_or_else(|| format!("{origin:?} does not begin with https:// or http://"))?;
        if rest.is_empty() || rest.contains(['/', '*']) {
            return Err(format!(
                "{origin:?} is not an origin: scheme, host and port, nothing else"
            ));
        }
        into.push(origin.to_ascii_lowercase());
    }
    Ok(())
}

fn put_topics(value: &str, into: &mut Vec<OpenTopic>) -> Result<(), String> {
    let topics = value.split(',').map(str::trim).filter(|topic| !topic.is_empty());
    *into = topics.map(str::parse).collect::<Result<_, _>>()?;
    Ok(())
}

/// The error for a setting that nobody knows, naming the nearest that is known.
fn unknown(setting: &str, written: &str, known: impl Iterator<Item = String>) -> ConfigError {
    let nearest = known
        .min_by_key(|known| edit_distance(written, known))
        .unwrap_or_default();
    ConfigError::new(setting, format!("is not a setting; the nearest is {nearest}"))
}

/// Levenshtein's distance: how many characters must be added, removed or changed.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let changed = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(file: &str, environment: &[(&str, &str)], arguments: &[&str]) -> Result<Config, ConfigError> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("settings.toml");
        std::fs::write(&path, file).expect("a file");
        let mut arguments: Vec<OsString> = arguments.iter().map(Into::into).collect();
        arguments.extend(["--config".into(), path.into_os_string()]);
        let environment = environment.iter().map(|(name, value)| (name.into(), value.into()));
        Config::from_sources(arguments, environment)
    }

    fn error(file: &str, environment: &[(&str, &str)], arguments: &[&str]) -> String {
        let error = read(file, environment, arguments).expect_err("an error").to_string();
        error
            .rsplit_once(".toml: ")
            .map_or(error.clone(), |(_, error)| error.to_owned())
    }

    #[test]
    fn flags_win_over_the_environment_and_that_over_the_file() {
        let file = "listen = \"127.0.0.1:1\"\n[http]\nmax_headers = 1\nheader_timeout_ms = 1";
        let environment = [
            ("BARNABAS_LISTEN", "127.0.0.1:2"),
            ("BARNABAS_HTTP_MAX_HEADERS", "2"),
            ("BARNABAS_GATEWAY", "http://127.0.0.1:4"),
        ];
        let config = read(file, &environment, &["--listen=127.0.0.1:3"]).expect("settings");
        assert_eq!(config.listen.address.port(), 3);
        assert_eq!(config.http.max_headers, 2);
        assert_eq!(config.http.header_timeout, Duration::from_millis(1));
    }

    #[test]
    fn an_unknown_setting_is_refused_and_the_nearest_named() {
        for (error, expected) in [
            (
                error("", &[("BARNABAS_LISTNE", "x")], &[]),
                "BARNABAS_LISTNE: is not a setting; the nearest is BARNABAS_LISTEN",
            ),
            (
                error("", &[], &["--http-max-header", "1"]),
                "--http-max-header: is not a setting; the nearest is --http-max-headers",
            ),
            (
                error("[jobs]\nlane = 1", &[], &[]),
                "jobs.lane: is not a setting; the nearest is jobs.lanes",
            ),
            (
                error("[job_types.import-contacts]\nchunk_row = 1", &[], &[]),
                "job_types.import-contacts.chunk_row: is not a setting; the nearest is chunk_rows",
            ),
        ] {
            assert_eq!(error, expected);
        }
    }

    #[test]
    fn a_value_that_cannot_be_read_is_refused_under_its_name() {
        assert!(error("", &[("BARNABAS_JOBS_LANES", "0")], &[]).starts_with("BARNABAS_JOBS_LANES: must be"));
        assert!(error("", &[("BARNABAS_LISTEN", "here")], &[]).starts_with("BARNABAS_LISTEN: cannot read \"here\""));
        assert!(error("[job_types.x]\ntopic = \"x\"", &[], &[]).starts_with("job_types.x: format is missing"));
        assert_eq!(error("", &[], &["--listen"]), "--listen: has no value");
    }

    #[test]
    fn an_address_that_others_can_reach_is_refused_without_authentication() {
        let environment = [("BARNABAS_LISTEN", "0.0.0.0:8080")];
        assert!(error("", &environment, &[]).starts_with("BARNABAS_LISTEN: no authentication is configured"));
        let environment = [environment[0], ("BARNABAS_INSECURE_LISTEN", "1")];
        assert!(read("", &environment, &[]).is_ok());
    }

    #[test]
    fn options_of_librdkafka_are_passed_on_and_never_printed() {
        let environment = [
            ("KAFKA_BROKERS", "k:9092"),
            ("BARNABAS_KAFKA_SASL_PASSWORD", "secret"),
            ("BARNABAS_KAFKA_SECURITY_PROTOCOL", "SASL_SSL"),
        ];
        let config = read("[kafka]\n\"client.id\" = \"b\"", &environment, &[]).expect("settings");
        assert_eq!(config.kafka.options["security.protocol"], "SASL_SSL");
        assert_eq!(config.kafka.options["client.id"], "b");
        assert!(!format!("{config:?}").contains("secret"));
    }

    #[test]
    fn an_open_topic_may_name_its_profile() {
        let environment = [("BARNABAS_EVENTS_TOPICS", "orders, clicks:telemetry,payments:command")];
        let config = read("", &environment, &[]).expect("settings");
        let expected = [
            OpenTopic::new("orders"),
            OpenTopic::telemetry("clicks"),
            OpenTopic::new("payments"),
        ];
        assert_eq!(config.events.topics, expected);
        let environment = [("BARNABAS_EVENTS_TOPICS", "clicks:fast")];
        assert_eq!(
            error("", &environment, &[]),
            "BARNABAS_EVENTS_TOPICS: \"fast\" is neither command nor telemetry"
        );
        let file = "[events]\ntopics = [\"barnabas.jobs:telemetry\"]";
        assert!(error(file, &[], &[]).ends_with("barnabas.jobs is the gateway's own topic"));
    }

    #[test]
    fn a_job_type_is_a_table_in_the_file() {
        let file = "[job_types.import-events]\nformat = \"ndjson\"\nchunk_rows = 10";
        let config = read(file, &[], &[]).expect("settings");
        let job_type = &config.jobs.types["import-events"];
        assert_eq!((job_type.format, job_type.chunk_rows), (BodyFormat::Ndjson, 10));
        assert_eq!(job_type.topic, "import-events");
        assert!(config.jobs.types.contains_key("import-contacts"));
        assert!(config.topic_specs().iter().any(|spec| spec.name == "import-events"));
    }

    #[test]
    fn the_documented_file_names_every_setting_with_its_default() {
        let text = include_str!("../../docs/barnabas.toml");
        let mut documented = read(text, &[], &[]).expect("settings");
        let another = documented.jobs.types.remove("import-events");
        assert_eq!(another, Some(JobTypeConfig::new("import-events", BodyFormat::Ndjson)));
        assert_eq!(format!("{documented:?}"), format!("{:?}", Config::default()));
        for key in SETTINGS.iter().map(|setting| setting.key) {
            let name = key.rsplit('.').next().unwrap_or(key);
            let is_named = |line: &str| line.trim_start_matches("# ").starts_with(&format!("{name} = "));
            assert!(text.lines().any(is_named), "{key} is missing");
        }
    }
}
