//! Gateways in the test's own process, on one embedded log: quick to make, and the test holds the log in its hands.

use std::net::SocketAddr;

use barnabas::log::{Log, TopicPartition, partition_for_key};
use barnabas::server::{Config, Server};
use hyper::{Method, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::conformance::within;
use crate::http;
use crate::subscriber::events_path;

/// A log and a gateway on it. Further gateways can be started on the same log.
#[derive(Debug)]
pub struct World {
    /// The log of all gateways.
    pub log: Log,
    /// The settings of the first gateway.
    pub config: Config,
    /// Where the first gateway listens.
    pub address: SocketAddr,
    /// Stops all gateways.
    pub stopping: CancellationToken,
    folders: Vec<TempDir>,
}

impl World {
    /// A gateway with the settings of tests.
    pub async fn new() -> Self {
        Self::with(|_| {}).await
    }

    /// A gateway with settings of the test's own.
    ///
    /// # Panics
    /// If it does not start; so for all that follows.
    pub async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let folder = TempDir::new().expect("a folder");
        let mut config = Config::for_tests(folder.path());
        change(&mut config);
        let log = config.open_log().await.expect("a log");
        let stopping = CancellationToken::new();
        let address = serve(config.clone(), log.clone(), stopping.clone()).await;
        Self {
            log,
            config,
            address,
            stopping,
            folders: vec![folder],
        }
    }

    /// A gateway more; returns where it listens.
    pub async fn another_gateway(&mut self) -> SocketAddr {
        self.gateway_until(self.stopping.clone()).await
    }

    /// A gateway more, with an end of its own.
    pub async fn gateway_until(&mut self, stopping: CancellationToken) -> SocketAddr {
        let folder = TempDir::new().expect("a folder");
        let mut config = self.config.clone();
        config.data.dir = folder.path().into();
        self.folders.push(folder);
        serve(config, self.log.clone(), stopping).await
    }

    /// Posts events named by numbers; returns the token behind the last.
    pub async fn post(&self, channel: &str, numbers: impl IntoIterator<Item = u32>) -> String {
        let events: Vec<Value> = numbers.into_iter().map(|n| json!({"type": "n", "data": n})).collect();
        self.post_events(channel, events).await
    }

    /// Posts events; returns the token behind the last.
    pub async fn post_events(&self, channel: &str, events: Vec<Value>) -> String {
        let request = http::request(Method::POST, &events_path(channel)).header("content-type", "application/json");
        let request = request
            .body(http::whole(Value::from(events).to_string()))
            .expect("a request");
        let answer = within("an answer", http::send(self.address, request))
            .await
            .expect("an answer");
        assert_eq!(answer.status, StatusCode::ACCEPTED, "{answer:?}");
        answer.header("barnabas-token").to_owned()
    }

    /// Asks the first gateway for JSON.
    pub async fn get(&self, path: &str) -> http::Answer {
        let request = http::request(Method::GET, path).header("accept", "application/json");
        let request = request.body(http::whole("")).expect("a request");
        within("an answer", http::send(self.address, request))
            .await
            .expect("an answer")
    }

    /// Deletes the records of a channel's partition below an offset, as retention does.
    pub async fn retain_from(&self, channel: &str, offset: i64) {
        let partition = partition_for_key(channel.as_bytes(), self.config.topics.partitions);
        let place = TopicPartition::new(self.config.topics.notifications(), partition);
        self.log.delete_records(&place, offset).await.expect("deleted");
    }
}

async fn serve(config: Config, log: Log, stopping: CancellationToken) -> SocketAddr {
    let server = Server::start(config, log, stopping).await.expect("a gateway");
    let address = server.address();
    tokio::spawn(server.serve());
    address
}
