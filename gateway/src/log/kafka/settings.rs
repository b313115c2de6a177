//! Settings of the Kafka engine, and the only place that knows librdkafka's names for them.
//!
//! What the interface promises (committed records only, murmur2, no silent jumps, no silent topics) rests on settings that a
//! user cannot override; everything else passes through.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::config::RDKafkaLogLevel;

use crate::log::{Acks, Compression, Error, GroupProtocol, GroupSettings, ProducerSettings, Result, StartAt};

/// Where Kafka is and how it is spoken to.
#[derive(Clone)]
pub struct KafkaSettings {
    /// The brokers to ask first, `host:port` with commas between (`bootstrap.servers`).
    pub brokers: String,
    /// Further settings by librdkafka's name, such as `security.protocol`. Those that the engine relies on are refused.
    pub overrides: BTreeMap<String, String>,
    /// Within it a request is answered or fails with [`Error::Timeout`] or [`Error::Unavailable`]. Default 10 s.
    pub request_timeout: Duration,
    /// After it the broker aborts a transaction whose producer has gone (`transaction.timeout.ms`); until then readers of its
    /// partitions are held back. A transaction that takes longer is aborted. A producer can ask for another. Default 10 s.
    pub transaction_timeout: Duration,
}

impl KafkaSettings {
    /// Settings for these brokers, everything else at its default.
    pub fn new(brokers: impl Into<String>) -> Self {
        Self {
            brokers: brokers.into(),
            overrides: BTreeMap::new(),
            request_timeout: Duration::from_secs(10),
            transaction_timeout: Duration::from_secs(10),
        }
    }
}

impl fmt::Debug for KafkaSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Values can be passwords and keys under names that are not known here: only the names are shown.
        let overrides: Vec<&str> = self.overrides.keys().map(String::as_str).collect();
        f.debug_struct("KafkaSettings")
            .field("brokers", &self.brokers)
            .field("overrides", &overrides)
            .field("request_timeout", &self.request_timeout)
            .field("transaction_timeout", &self.transaction_timeout)
            .finish()
    }
}

/// Settings on which the engine's promises rest.
const RESERVED: [&str; 19] = [
    "acks",
    "allow.auto.create.topics",
    "auto.offset.reset",
    "bootstrap.servers",
    "delivery.timeout.ms",
    "enable.auto.commit",
    "enable.auto.offset.store",
    "enable.idempotence",
    "enable.partition.eof",
    "group.id",
    "group.instance.id",
    "group.protocol",
    "isolation.level",
    "message.timeout.ms",
    "metadata.broker.list",
    "partition.assignment.strategy",
    "partitioner",
    "request.required.acks",
    "transactional.id",
];

/// What a client reads ahead, in KiB (`queued.max.messages.kbytes`). When it is full fetching pauses.
const READ_AHEAD_KIB: usize = 16 * 1024;
/// Records that wait in a producer (`queue.buffering.max.messages`). When full, sending waits.
const PRODUCER_QUEUE_RECORDS: usize = 100_000;
/// KiB that wait in a producer (`queue.buffering.max.kbytes`). When full, sending waits.
const PRODUCER_QUEUE_KIB: usize = 64 * 1024;
/// The same for a transactional producer: there are several, and each needs no more than what is on
/// its way to the broker.
const TRANSACTION_QUEUE_KIB: usize = 16 * 1024;
/// Larger than any record that a topic can take: the topic decides what is too large, not the client.
const MAX_REQUEST_BYTES: usize = 1_000_000_000;

/// The group of consumers that are in none: librdkafka has no other.
const READERS: &str = "barnabas-reader";

impl KafkaSettings {
    /// # Errors
    /// [`Error::InvalidSetting`] for an override of a setting that the engine relies on.
    pub(super) fn check(&self) -> Result<()> {
        match self.overrides.keys().find(|name| RESERVED.contains(&name.as_str())) {
            None => Ok(()),
            Some(name) => Err(Error::InvalidSetting {
                name: name.clone(),
                reason: "the engine relies on its own value".to_owned(),
            }),
        }
    }

    /// For metadata, offsets and topics.
    pub(super) fn admin(&self) -> ClientConfig {
        self.common()
    }

    /// For the end of a partition behind open transactions, and for what only a consumer's client can be asked for. It reads nothing.
    pub(super) fn asking_consumer(&self) -> ClientConfig {
        let mut config = self.common();
        config
            // As for readers: nothing ever joins it or commits to it.
            .set("group.id", READERS)
            .set("enable.auto.commit", "false")
            .set("isolation.level", "read_uncommitted");
        config
    }

    pub(super) fn producer(&self, settings: &ProducerSettings) -> ClientConfig {
        let mut config = self.any_producer(PRODUCER_QUEUE_KIB);
        config
            .set("message.timeout.ms", millis(settings.delivery_timeout))
            .set("linger.ms", millis(settings.linger));
        match settings.compression {
            Compression::None => {}
            Compression::Lz4 => drop(config.set("compression.type", "lz4")),
        }
        match settings.acks {
            Acks::All => config
                .set("acks", "all")
                .set("enable.idempotence", "true")
                // librdkafka tells of an idempotent producer's state in its statistics only.
                .set("statistics.interval.ms", "500"),
            Acks::Leader => config.set("acks", "1"),
            Acks::None => config.set("acks", "0"),
        };
        config
    }

    pub(super) fn transactional_producer(&self, transactional_id: &str, transaction_timeout: Duration) -> ClientConfig {
        let mut config = self.any_producer(TRANSACTION_QUEUE_KIB);
        config
            .set("transactional.id", transactional_id)
            .set("transaction.timeout.ms", millis(transaction_timeout))
            .set("message.timeout.ms", millis(transaction_timeout))
            .set("socket.timeout.ms", millis(self.transaction_timeout / 2))
            // Ends the calls that only a change of a connection wakes, see `TransactionThread::try_send_offsets`.
            .set("connections.max.idle.ms", "60000")
            .set("linger.ms", "0")
            .set("acks", "all")
            .set("enable.idempotence", "true");
        config
    }

    pub(super) fn reader(&self) -> ClientConfig {
        let mut config = self.consumer();
        config
            // librdkafka consumes only with a group's name. Nothing ever joins it or commits to it.
            .set("group.id", READERS)
            // An offset that is not kept is an error to be told, never a jump.
            .set("auto.offset.reset", "error");
        config
    }

    /// For a member's place in its group. What the member reads it reads by [`KafkaSettings::group_fetcher`].
    pub(super) fn group_member(&self, settings: &GroupSettings) -> ClientConfig {
        let mut config = self.consumer();
        config
            .set("group.id", &settings.group)
            // Its partitions are paused, but only when they are there: what it has fetched by then is dropped.
            .set("fetch.message.max.bytes", "1")
            // The rebalance waits as long for this member's release.
            .set(
                "max.poll.interval.ms",
                millis(settings.session_timeout.max(settings.release_timeout) + Duration::from_secs(30)),
            )
            .set("topic.metadata.refresh.interval.ms", "30000");
        match settings.protocol {
            GroupProtocol::Classic => config
                .set("partition.assignment.strategy", "cooperative-sticky")
                .set("session.timeout.ms", millis(settings.session_timeout))
                // A member learns of a rebalance by its heartbeats: half a second at the default session timeout.
                .set("heartbeat.interval.ms", millis(settings.session_timeout / 20)),
            GroupProtocol::Consumer => config.set("group.protocol", "consumer"),
        };
        if let Some(instance_id) = &settings.instance_id {
            config.set("group.instance.id", instance_id);
        }
        // Again, for what was just set.
        self.apply_overrides(&mut config);
        config
    }

    /// For the records of a member's partitions.
    pub(super) fn group_fetcher(&self, settings: &GroupSettings) -> ClientConfig {
        let mut config = self.consumer();
        config
            // It never joins: the name of the group is that for which the user has the rights.
            .set("group.id", &settings.group)
            // Where the member goes on when retention has overtaken it.
            .set(
                "auto.offset.reset",
                match settings.start_at {
                    StartAt::End => "latest",
                    _ => "earliest",
                },
            );
        config
    }

    fn consumer(&self) -> ClientConfig {
        let mut config = self.common();
        config
            .set("isolation.level", "read_committed")
            .set("enable.partition.eof", "true")
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("queued.max.messages.kbytes", READ_AHEAD_KIB.to_string())
            // How long fetching pauses when the read-ahead is full; the default of 1 s would starve a fast reader.
            .set("fetch.queue.backoff.ms", "10")
            // A request that waits for records holds up the partitions that are not in it: those just assigned or resumed. At
            // the default of 500 ms they were that late; an idle consumer now asks each broker ten times a second.
            .set("fetch.wait.max.ms", "100")
            .set("fetch.error.backoff.ms", "100");
        self.apply_overrides(&mut config);
        config
    }

    fn any_producer(&self, queue_kib: usize) -> ClientConfig {
        let mut config = self.common();
        config
            .set("partitioner", "murmur2_random")
            // Records without a key are spread one by one.
            .set("sticky.partitioning.linger.ms", "0")
            .set("queue.buffering.max.messages", PRODUCER_QUEUE_RECORDS.to_string())
            .set("queue.buffering.max.kbytes", queue_kib.to_string())
            .set("message.max.bytes", MAX_REQUEST_BYTES.to_string())
            // Below the smallest usual limit of a topic, so that a batch of small records is never too large.
            .set("batch.size", "524288")
            .set("topic.metadata.propagation.max.ms", "5000");
        self.apply_overrides(&mut config);
        config
    }

    fn common(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        // rdkafka takes its level from the `log` crate, which nothing here sets up.
        config.set_log_level(if self.overrides.contains_key("debug") {
            RDKafkaLogLevel::Debug
        } else {
            RDKafkaLogLevel::Info
        });
        config
            .set("bootstrap.servers", &self.brokers)
            .set("client.id", "barnabas")
            .set("allow.auto.create.topics", "false")
            .set("socket.timeout.ms", millis(self.request_timeout))
            .set("socket.connection.setup.timeout.ms", millis(self.request_timeout))
            .set("socket.nagle.disable", "true")
            .set("socket.keepalive.enable", "true")
            // A broker that comes back is found within a second.
            .set("reconnect.backoff.ms", "50")
            .set("reconnect.backoff.max.ms", "1000");
        self.apply_overrides(&mut config);
        config
    }

    fn apply_overrides(&self, config: &mut ClientConfig) {
        for (name, value) in &self.overrides {
            config.set(name, value);
        }
    }
}

fn millis(duration: Duration) -> String {
    duration.as_millis().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_engine_relies_on_cannot_be_overridden() {
        let mut settings = KafkaSettings::new("localhost:9092");
        settings.overrides.insert("sasl.username".into(), "me".into());
        assert!(settings.check().is_ok());
        settings
            .overrides
            .insert("isolation.level".into(), "read_uncommitted".into());
        assert!(matches!(settings.check(), Err(Error::InvalidSetting { name, .. }) if name == "isolation.level"));
    }

    #[test]
    fn an_override_holds_for_members_of_groups() {
        let mut settings = KafkaSettings::new("localhost:9092");
        settings.overrides.insert("session.timeout.ms".into(), "6000".into());
        let member = settings.group_member(&GroupSettings::new("group", ["topic"]));
        assert_eq!(member.get("session.timeout.ms"), Some("6000"));
    }

    #[test]
    fn telemetry_waits_and_is_compressed_and_is_acknowledged_like_all_else() {
        let settings = KafkaSettings::new("localhost:9092");
        let [telemetry, command] =
            [ProducerSettings::telemetry(), ProducerSettings::default()].map(|profile| settings.producer(&profile));
        let of = |config: &ClientConfig| {
            ["linger.ms", "compression.type", "acks", "enable.idempotence"]
                .map(|name| config.get(name).unwrap_or("none").to_owned())
        };
        assert_eq!(of(&telemetry), ["50", "lz4", "all", "true"]);
        assert_eq!(of(&command), ["0", "none", "all", "true"]);
    }

    #[test]
    fn debug_output_shows_no_values_of_overrides() {
        let mut settings = KafkaSettings::new("localhost:9092");
        settings.overrides.insert("sasl.password".into(), "secret".into());
        let shown = format!("{settings:?}");
        assert!(shown.contains("sasl.password") && !shown.contains("secret"));
    }
}
