//! A real Kafka for the tests: the one of `KAFKA_BROKERS`, else Apache Kafka from its published jars on this machine's Java.
//!
//! [`brokers`] is what most tests need: one broker, shared by all tests of a process. [`KafkaNode::start`] and
//! [`KafkaCluster::start`] make brokers of one's own, to be killed, paused and restarted. Ports are free ones, data lies in a
//! temporary folder, and a watchdog process ends a broker whose test process is gone, however that ended.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rand::RngExt;
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use tempfile::TempDir;

/// The variable that names the brokers to use instead of starting one.
pub const BROKERS_VARIABLE: &str = "KAFKA_BROKERS";

/// A broker that does not answer by then has failed to start.
const START_TIMEOUT: Duration = Duration::from_secs(90);

/// Lines of a node's log that a failed test shows.
const SHOWN_LINES: usize = 20;

/// Starts Java in the background, says its process id, and ends it when the pipe from the test process closes. With `keep` or `stop`
/// as the last word the data stays for a restart; with `stop` Java is asked to end, and says goodbye to the other brokers.
const WATCHDOG: &str = r#"
data=$1; log=$2; shift 2
"$@" >>"$log" 2>&1 </dev/null &
java=$!
echo $java
read -r last
case $last in stop) kill $java ;; *) kill -9 $java ;; esac 2>/dev/null
wait $java 2>/dev/null
case $last in keep|stop) ;; *) rm -rf "$data" ;; esac
"#;

/// The brokers for this test run, as `bootstrap.servers`. The first call starts one unless `KAFKA_BROKERS` names them; it
/// ends with the process.
///
/// # Panics
/// If there is none and none can be started.
pub fn brokers() -> String {
    static SHARED: OnceLock<KafkaNode> = OnceLock::new();
    match std::env::var(BROKERS_VARIABLE) {
        Ok(brokers) => brokers,
        Err(_) => SHARED.get_or_init(KafkaNode::start).brokers().to_owned(),
    }
}

/// One node, broker and controller in one. Ends, and its data goes, when dropped.
#[derive(Debug)]
pub struct KafkaNode {
    brokers: String,
    data_dir: TempDir,
    /// None while it is killed.
    process: Mutex<Option<NodeProcess>>,
}

#[derive(Debug)]
struct NodeProcess {
    watchdog: Child,
    /// Closing it ends the node.
    leash: ChildStdin,
    java_pid: libc::pid_t,
}

impl KafkaNode {
    /// Starts a broker of its own and returns when it answers.
    ///
    /// # Panics
    /// If it cannot be started; the message says why.
    pub fn start() -> Self {
        let [broker_port, controller_port] = free_ports();
        let voters = format!("1@127.0.0.1:{controller_port}");
        let node = Self::make(1, broker_port, controller_port, &voters, 1, None);
        wait_for_brokers(node.brokers(), 1);
        node
    }

    /// Like [`KafkaNode::start`], for clients that go through a proxy: who asks at `proxied` for the brokers is told that there is one at
    /// `advertised`.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start_behind(proxied: SocketAddr, advertised: SocketAddr) -> Self {
        let [broker_port, controller_port] = free_ports();
        let voters = format!("1@127.0.0.1:{controller_port}");
        let node = Self::make(1, broker_port, controller_port, &voters, 1, Some((proxied, advertised)));
        wait_for_brokers(node.brokers(), 1);
        node
    }

    fn make(
        id: usize,
        broker_port: u16,
        controller_port: u16,
        voters: &str,
        nodes: usize,
        behind: Option<(SocketAddr, SocketAddr)>,
    ) -> Self {
        let data_dir = tempfile::Builder::new()
            .prefix("barnabas-kafka-")
            .tempdir()
            .expect("a temporary folder for Kafka's data");
        fs::write(
            data_dir.path().join("server.properties"),
            properties(data_dir.path(), id, broker_port, controller_port, voters, nodes, behind),
        )
        .expect("Kafka's properties are written");
        let node = Self {
            brokers: format!("127.0.0.1:{broker_port}"),
            data_dir,
            process: Mutex::new(None),
        };
        node.format();
        node.restart_unchecked();
        node
    }

    /// Its address, as `bootstrap.servers`.
    pub fn brokers(&self) -> &str {
        &self.brokers
    }

    /// Kills it as a power cut would (SIGKILL). Its data stays for [`KafkaNode::restart`].
    pub fn kill(&self) {
        if let Some(process) = self.lock().take() {
            process.end(b"keep\n");
        }
    }

    /// Asks it to end as an operator does (SIGTERM), so that it hands over what it leads, and waits until it has. Its data stays for
    /// [`KafkaNode::restart`].
    pub fn stop(&self) {
        if let Some(process) = self.lock().take() {
            process.end(b"stop\n");
        }
    }

    /// Starts it again after [`KafkaNode::kill`] or [`KafkaNode::stop`], on the same port with the same data, and returns when it answers.
    ///
    /// # Panics
    /// If it does not start.
    pub fn restart(&self) {
        self.restart_unchecked();
        wait_for_brokers(&self.brokers, 1);
    }

    /// Waits until it leads its partitions: after a kill it answers before it has read all of them again.
    pub fn wait_in_sync(&self) {
        wait_in_sync(&self.brokers);
    }

    /// Stops it without ending it (SIGSTOP): connections stay open and nothing answers.
    pub fn pause(&self) {
        self.signal(libc::SIGSTOP);
    }

    /// Lets it go on after [`KafkaNode::pause`].
    pub fn resume(&self) {
        self.signal(libc::SIGCONT);
    }

    fn signal(&self, signal: libc::c_int) {
        let process = self.lock();
        let pid = process.as_ref().expect("the node runs").java_pid;
        // SAFETY: kill takes no memory. The pid is that of our own child: the watchdog has not reaped it, since it waits for
        // the leash first, so the number cannot have passed to another process.
        let sent = unsafe { libc::kill(pid, signal) };
        assert_eq!(sent, 0, "signal {signal} to Kafka: {}", io::Error::last_os_error());
    }

    fn restart_unchecked(&self) {
        let mut process = self.lock();
        assert!(process.is_none(), "the node already runs");
        let mut watchdog = Command::new("sh")
            // As the leash of other processes, it outlives a signal to all of them.
            .process_group(0)
            .args(["-c", WATCHDOG, "kafka-watchdog"])
            .args([self.data_dir.path(), &self.log_file()])
            .arg(java())
            .args(["-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"])
            .arg("-cp")
            .arg(class_path())
            .arg("kafka.Kafka")
            .arg(self.data_dir.path().join("server.properties"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("sh starts");
        let leash = watchdog.stdin.take().expect("its stdin is piped");
        let mut line = String::new();
        BufReader::new(watchdog.stdout.take().expect("its stdout is piped"))
            .read_line(&mut line)
            .expect("the watchdog says Kafka's process id");
        *process = Some(NodeProcess {
            watchdog,
            leash,
            java_pid: line.trim().parse().expect("a process id"),
        });
    }

    fn format(&self) {
        let output = Command::new(java())
            .args(["-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"])
            .arg("-cp")
            .arg(class_path())
            // A fixed cluster id: the nodes of a cluster must agree, and two clusters never meet.
            .args([
                "kafka.tools.StorageTool",
                "format",
                "-t",
                "QmFybmFiYXNUZXN0cyEhIQ",
                "-c",
            ])
            .arg(self.data_dir.path().join("server.properties"))
            .output()
            .expect("Java starts");
        assert!(
            output.status.success(),
            "Kafka's storage cannot be formatted: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// What the broker wrote to its standard output and error.
    pub fn log_file(&self) -> PathBuf {
        self.data_dir.path().join("server.log")
    }

    /// The last errors that it logged, for the message of a failed test.
    fn last_errors(&self) -> String {
        let log = fs::read(self.log_file()).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let errors: Vec<&str> = log.lines().filter(|line| line.contains(" ERROR ")).collect();
        let shown = &errors[errors.len().saturating_sub(SHOWN_LINES)..];
        format!(
            "the last errors of the broker at {}:\n{}",
            self.brokers,
            shown.join("\n")
        )
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<NodeProcess>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for KafkaNode {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.last_errors());
        }
        if let Some(process) = self.lock().take() {
            process.end(b"");
        }
    }
}

impl NodeProcess {
    fn end(mut self, last_word: &[u8]) {
        // A watchdog that is gone has ended its node already: what cannot be written does not matter.
        let _ = self.leash.write_all(last_word);
        drop(self.leash);
        self.watchdog.wait().expect("the watchdog can be waited for");
    }
}

/// Three nodes, replication 3, `min.insync.replicas` 2.
#[derive(Debug)]
pub struct KafkaCluster {
    /// The nodes. Each can be killed, paused and restarted.
    pub nodes: Vec<KafkaNode>,
}

impl KafkaCluster {
    /// Starts three nodes and returns when each knows of the others.
    ///
    /// # Panics
    /// If one cannot be started.
    pub fn start() -> Self {
        let ports: [u16; 6] = free_ports();
        let voters: Vec<String> = (0..3)
            .map(|i| format!("{}@127.0.0.1:{}", i + 1, ports[3 + i]))
            .collect();
        let voters = voters.join(",");
        let nodes = (0..3)
            .map(|i| KafkaNode::make(i + 1, ports[i], ports[3 + i], &voters, 3, None))
            .collect();
        let cluster = Self { nodes };
        for node in &cluster.nodes {
            wait_for_brokers(node.brokers(), 3);
        }
        cluster
    }

    /// The addresses, as `bootstrap.servers`.
    pub fn brokers(&self) -> String {
        let brokers: Vec<&str> = self.nodes.iter().map(KafkaNode::brokers).collect();
        brokers.join(",")
    }

    /// Waits until any one node may go: see [`KafkaNode::wait_in_sync`].
    pub fn wait_in_sync(&self) {
        wait_in_sync(&self.brokers());
    }
}

fn properties(
    data_dir: &Path,
    id: usize,
    broker_port: u16,
    controller_port: u16,
    voters: &str,
    nodes: usize,
    behind: Option<(SocketAddr, SocketAddr)>,
) -> String {
    let (listener, advertised) = match behind {
        Some((listener, advertised)) => (format!(",PROXIED://{listener}"), format!(",PROXIED://{advertised}")),
        None => Default::default(),
    };
    let replication = nodes;
    let min_in_sync = if nodes > 1 { 2 } else { 1 };
    // One of several that goes is missed soon. One that is alone has nobody to do its work: it is not given up.
    let session_ms = if nodes > 1 { 3000 } else { 9000 };
    let log_dir = data_dir.join("log");
    let log_dir = log_dir.display();
    format!(
        "process.roles=broker,controller
node.id={id}
controller.quorum.voters={voters}
listeners=PLAINTEXT://127.0.0.1:{broker_port},CONTROLLER://127.0.0.1:{controller_port}{listener}
advertised.listeners=PLAINTEXT://127.0.0.1:{broker_port}{advertised}
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,PROXIED:PLAINTEXT
log.dirs={log_dir}
default.replication.factor={replication}
min.insync.replicas={min_in_sync}
offsets.topic.replication.factor={replication}
offsets.topic.num.partitions=4
transaction.state.log.replication.factor={replication}
transaction.state.log.min.isr={min_in_sync}
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor={replication}
share.coordinator.state.topic.min.isr={min_in_sync}
auto.create.topics.enable=false
broker.session.timeout.ms={session_ms}
broker.heartbeat.interval.ms=500
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=500
group.consumer.min.session.timeout.ms=500
group.consumer.session.timeout.ms=3000
group.consumer.min.heartbeat.interval.ms=100
group.consumer.heartbeat.interval.ms=500
transaction.abort.timed.out.transaction.cleanup.interval.ms=1000
log.initial.task.delay.ms=500
log.retention.check.interval.ms=500
log.cleaner.backoff.ms=200
log.cleaner.min.cleanable.ratio=0.01
log.cleaner.dedupe.buffer.size=16777216
log.segment.delete.delay.ms=500
"
    )
}

/// Free ports below the range from which the system takes those of outgoing connections, so that a broker that is down for a
/// while finds its own free again. No other test of this process is given them, however long it takes until they are bound.
pub fn free_ports<const N: usize>() -> [u16; N] {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    std::array::from_fn(|_| {
        loop {
            let port = rand::rng().random_range(20_000..32_000);
            if TcpListener::bind(("127.0.0.1", port)).is_ok() && given.insert(port) {
                break port;
            }
        }
    })
}

fn quiet_client(brokers: &str) -> BaseConsumer {
    ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set_log_level(rdkafka::config::RDKafkaLogLevel::Emerg)
        .create()
        .expect("a Kafka client")
}

fn wait_for_brokers(brokers: &str, count: usize) {
    let client = quiet_client(brokers);
    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        let known = client
            .fetch_metadata(None, Duration::from_secs(1))
            .map(|metadata| metadata.brokers().len());
        match known {
            Ok(known) if known >= count => return,
            known => assert!(
                Instant::now() < deadline,
                "Kafka at {brokers} does not answer after {START_TIMEOUT:?}: {known:?}"
            ),
        }
    }
}

/// Waits until each partition has a leader and all its replicas are in sync, Kafka's own topics among them.
///
/// # Panics
/// If that does not come about.
fn wait_in_sync(brokers: &str) {
    let client = quiet_client(brokers);
    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        let metadata = client.fetch_metadata(None, Duration::from_secs(1));
        let behind = metadata.map(|metadata| {
            let partitions = metadata.topics().iter().flat_map(|topic| topic.partitions());
            partitions
                .filter(|partition| partition.leader() < 0 || partition.isr().len() < partition.replicas().len())
                .count()
        });
        match behind {
            Ok(0) => return,
            behind => assert!(
                Instant::now() < deadline,
                "partitions out of sync after {START_TIMEOUT:?}: {behind:?}"
            ),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn java() -> PathBuf {
    match std::env::var_os("JAVA_HOME") {
        Some(home) => Path::new(&home).join("bin/java"),
        None => PathBuf::from("java"),
    }
}

/// The jars of Kafka, fetched once into the build folder.
fn class_path() -> String {
    static JARS: OnceLock<PathBuf> = OnceLock::new();
    format!("{}/*", JARS.get_or_init(fetch_jars).display())
}

fn fetch_jars() -> PathBuf {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).join("kafka");
    let target = target_dir();
    let jars = target.join("kafka-4.1.1");
    // Test processes that come together wait here for the first one's fetch.
    let lock = File::create(target.join("kafka-4.1.1.lock")).expect("the build folder can be written");
    lock.lock().expect("the build folder can be locked");
    if jars.exists() {
        return jars;
    }
    eprintln!("fetching Apache Kafka 4.1.1 by Maven into {}", jars.display());
    let fetched = tempfile::tempdir_in(&target).expect("the build folder can be written");
    let output = Command::new("mvn")
        .args(["--batch-mode", "--quiet", "--file"])
        .arg(project.join("pom.xml"))
        .arg("dependency:copy-dependencies")
        .arg(format!("-DoutputDirectory={}", fetched.path().display()))
        .output()
        .expect("Maven (mvn) is needed to fetch Apache Kafka; or set KAFKA_BROKERS to a running one");
    assert!(
        output.status.success(),
        "Maven cannot fetch Apache Kafka: {}",
        String::from_utf8_lossy(&output.stdout)
    );
    fs::rename(fetched.keep(), &jars).expect("the jars move within the build folder");
    jars
}

/// Cargo's build folder: the one above the running test in which Cargo notes its compiler, whoever made the folder.
fn target_dir() -> PathBuf {
    let test = std::env::current_exe().expect("the path of the running test");
    test.ancestors()
        .find(|folder| folder.join(".rustc_info.json").exists())
        .expect("a test runs from Cargo's build folder")
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(brokers: &str) -> bool {
        quiet_client(brokers)
            .fetch_metadata(None, Duration::from_secs(1))
            .is_ok()
    }

    #[test]
    fn a_node_can_be_paused_killed_and_restarted_and_leaves_nothing_behind() {
        let node = KafkaNode::start();
        let brokers = node.brokers().to_owned();
        let data = node.data_dir.path().to_owned();
        node.pause();
        assert!(!answers(&brokers));
        node.resume();
        wait_for_brokers(&brokers, 1);
        node.kill();
        assert!(!answers(&brokers));
        node.restart();
        assert!(answers(&brokers));
        node.stop();
        assert!(!answers(&brokers) && data.exists());
        node.restart();
        drop(node);
        assert!(!answers(&brokers) && !data.exists());
    }
}
