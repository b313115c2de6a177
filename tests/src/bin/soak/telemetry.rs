//! Events that are posted to two gateways, which are killed and stopped like everybody: what was taken is on the log, once.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;

use barnabas::log::{Log, TopicSpec};
use barnabas_tests::conformance::{make_topic, unique};
use barnabas_tests::http;
use barnabas_tests::kafka::free_ports;
use barnabas_tests::oracle::OracleRecord;

use crate::{PARTITIONS, SLOTS};

/// Events of one request.
const BATCH: u64 = 20;

pub struct Telemetry {
    topic: String,
    addresses: HashMap<&'static str, SocketAddr>,
    posted: u64,
    /// The ids of those that were answered 202.
    taken: Vec<String>,
}

impl Telemetry {
    pub async fn new(log: &Log) -> Self {
        let addresses = free_ports::<{ SLOTS.len() }>().map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        Self {
            topic: make_topic(log, TopicSpec::new(unique("visits"), PARTITIONS)).await,
            addresses: SLOTS.into_iter().zip(addresses).collect(),
            posted: 0,
            taken: Vec::new(),
        }
    }

    /// What a gateway is started with.
    pub fn gateway(&self, slot: &str, brokers: &str, folder: &Path) -> Vec<String> {
        let data_dir = folder.join(format!("gateway-{slot}"));
        [
            ("--listen", self.addresses[slot].to_string()),
            ("--data-dir", data_dir.display().to_string()),
            ("--kafka-brokers", brokers.to_owned()),
            ("--topics-prefix", format!("{}.gateway", self.topic)),
            ("--events-topics", format!("{}:telemetry", self.topic)),
        ]
        .into_iter()
        .flat_map(|(name, value)| [name.to_owned(), value])
        .collect()
    }

    /// Posts some to each gateway, which may be away, or have no log.
    pub async fn post(&mut self) {
        let path = format!("/v1/topics/{}/events", self.topic);
        for slot in SLOTS {
            let ids: Vec<String> = (0..BATCH).map(|nth| (self.posted + nth).to_string()).collect();
            self.posted += BATCH;
            let line = |id: &String| format!(r#"{{"type":"visit","id":"{id}"}}"#);
            let body = ids.iter().map(line).collect::<Vec<_>>().join("\n");
            let answer = http::post(self.addresses[slot], &path, "application/x-ndjson", body).await;
            match answer.map(|answer| answer.status.as_u16()) {
                Ok(202) => self.taken.extend(ids),
                Ok(429 | 503) | Err(_) => {}
                Ok(status) => panic!("gateway {slot} answers {status}"),
            }
        }
    }

    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// How many were taken.
    pub fn taken(&self) -> usize {
        self.taken.len()
    }

    pub fn judge(&self, records: &[OracleRecord]) {
        assert!(!self.taken.is_empty(), "no gateway has taken anything");
        let mut times: HashMap<&str, usize> = HashMap::new();
        for record in records {
            *times.entry(record.header("ce_id")).or_default() += 1;
        }
        let is_wrong = |id: &&String| times.get(id.as_str()) != Some(&1);
        let wrong: Vec<_> = self.taken.iter().filter(is_wrong).collect();
        assert!(wrong.is_empty(), "they were taken and are not there once: {wrong:?}");
    }
}
