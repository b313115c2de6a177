//! A gateway of a test's own, and a plain HTTP client.
//!
//! The log is the embedded one; with `GATEWAY_TEST_BROKERS=host:port` it is Kafka there, where each test has topics of its own.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use barnabas::log::{Batch, Log, Record, StartAt, TopicSpec};
use barnabas::server::{Config, Server};
use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Within it everything that is waited for must have happened.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// A running gateway.
pub struct Gateway {
    pub address: SocketAddr,
    pub config: Config,
    pub log: Log,
    pub stopping: CancellationToken,
    pub folder: TempDir,
    served: JoinHandle<()>,
}

/// An answer, read to its end.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Gateway {
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        Self::start_on_topics(&[], change).await
    }

    /// A gateway on a log that has these topics already.
    pub async fn start_on_topics(topics: &[TopicSpec], change: impl FnOnce(&mut Config)) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut config = Config::for_tests(folder.path());
        config.topics.prefix = format!("test-{}", Uuid::now_v7().simple());
        config.kafka.brokers = std::env::var("GATEWAY_TEST_BROKERS").ok();
        change(&mut config);
        for job_type in config.jobs.types.values_mut() {
            job_type.topic = format!("{}.{}", config.topics.prefix, job_type.topic);
        }
        let log = config.open_log().await.expect("a log");
        let plan = log.plan_topics(topics).await.expect("a plan");
        log.apply_topics(&plan).await.expect("the topics");
        let stopping = CancellationToken::new();
        let server = Server::start(config.clone(), log.clone(), stopping.clone())
            .await
            .expect("a gateway");
        Self {
            address: server.address(),
            config,
            log,
            stopping,
            folder,
            served: tokio::spawn(server.serve()),
        }
    }

    pub async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.expect("a connection")
    }

    pub async fn get(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        self.send(Method::GET, path, headers, "").await
    }

    pub async fn post(&self, path: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Answer {
        self.send(Method::POST, path, headers, body).await
    }

    pub async fn send(&self, method: Method, path: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Answer {
        let io = TokioIo::new(self.connect().await);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.expect("HTTP");
        tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(path);
        if !headers.iter().any(|(name, _)| *name == "host") {
            request = request.header("host", self.address.to_string());
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body.into())).expect("a request");
        let exchange = async {
            let response = sender.send_request(request).await.expect("an answer");
            let (parts, body) = response.into_parts();
            let body = body.collect().await.expect("a body").to_bytes();
            Answer {
                status: parts.status,
                headers: parts.headers,
                body,
            }
        };
        tokio::time::timeout(DEADLINE, exchange)
            .await
            .expect("an answer in time")
    }

    /// The topic of a job type.
    pub fn job_topic(&self, job_type: &str) -> String {
        self.config.jobs.types[job_type].topic.clone()
    }

    /// Everything that is on a topic, by partition, once it is `at_least` so much: Kafka shows a transaction a moment after it
    /// has acknowledged it.
    pub async fn records(&self, topic: &str, at_least: usize) -> Vec<Vec<Record>> {
        let partitions = self.log.describe_topic(topic).await.expect("the topic").partitions;
        let mut reader = self.log.reader(topic).await.expect("a reader");
        let mut records = vec![Vec::new(); partitions as usize];
        let mut behind: BTreeSet<i32> = (0..partitions).collect();
        for partition in 0..partitions {
            reader.assign(partition, StartAt::Start).await.expect("the partition");
        }
        let read = async {
            while !behind.is_empty() || records.iter().map(Vec::len).sum::<usize>() < at_least {
                let batch: Batch = reader.next().await.expect("records");
                if batch.caught_up {
                    behind.remove(&batch.partition.partition);
                }
                records[batch.partition.partition as usize].extend(batch.records);
            }
        };
        tokio::time::timeout(DEADLINE, read)
            .await
            .expect("the topic's end in time");
        records
    }

    /// Stops the gateway and waits until it has drained.
    pub async fn stop(self) {
        self.stopping.cancel();
        tokio::time::timeout(DEADLINE, self.served)
            .await
            .expect("an end in time")
            .expect("no panic");
        self.log.close().await;
    }
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).expect("JSON")
    }

    /// Status, code and line of a problem.
    #[track_caller]
    pub fn problem(&self) -> (u16, String, Option<u64>) {
        assert_eq!(
            self.header("content-type"),
            Some("application/problem+json"),
            "{self:?}"
        );
        let problem = self.json();
        assert_eq!(problem["status"], self.status.as_u16());
        let code = problem["code"].as_str().expect("a code").to_owned();
        (self.status.as_u16(), code, problem["line"].as_u64())
    }
}
