//! The conformance suite on Apache Kafka.

use barnabas::log::Log;
use barnabas::log::kafka::KafkaSettings;

/// A connection of its own for each case, to one broker.
async fn log() -> Log {
    Log::connect_kafka(KafkaSettings::new(barnabas_tests::kafka::brokers()))
        .await
        .expect("a connection")
}

barnabas_tests::conformance!(log());
