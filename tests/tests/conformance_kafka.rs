//! The conformance suite on Apache Kafka.

use barnabas::log::Log;
use barnabas::log::kafka::KafkaSettings;
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier};
use rdkafka::client::DefaultClientContext;

/// A connection of its own for each case, to one broker.
async fn log() -> Log {
    Log::connect_kafka(KafkaSettings::new(barnabas_tests::kafka::brokers()))
        .await
        .expect("a connection")
}

/// Kafka compacts what lies before the newest segment, so segments end soon.
async fn hurry_compaction(topic: &str) {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", barnabas_tests::kafka::brokers())
        .create()
        .expect("a client");
    let change = AlterConfig::new(ResourceSpecifier::Topic(topic))
        .set("cleanup.policy", "compact")
        .set("min.cleanable.dirty.ratio", "0.01")
        .set("segment.ms", "100");
    let answer = admin.alter_configs(&[change], &AdminOptions::new()).await;
    let answer = answer.expect("an answer");
    assert!(answer.iter().all(Result::is_ok), "{answer:?}");
}

barnabas_tests::conformance!(log(), hurry_compaction);
