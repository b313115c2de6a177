//! Starts Apache Kafka for a whole test run, says `KAFKA_BROKERS=…` on a line, and ends it when its standard input closes.
//! `kafka-node 3` starts three nodes.

use std::io::{self, Read};
use std::process::ExitCode;

use barnabas_tests::kafka::{BROKERS_VARIABLE, KafkaCluster, KafkaNode};

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        None | Some("1") => {
            let node = KafkaNode::start();
            say_and_wait(node.brokers());
        }
        Some("3") => {
            let cluster = KafkaCluster::start();
            say_and_wait(&cluster.brokers());
        }
        Some(nodes) => {
            eprintln!("{nodes}: either 1 node or 3");
            return ExitCode::from(64);
        }
    }
    ExitCode::SUCCESS
}

fn say_and_wait(brokers: &str) {
    println!("{BROKERS_VARIABLE}={brokers}");
    // What comes in means nothing, and an input that cannot be read has ended too.
    let _ = io::copy(&mut io::stdin().lock().by_ref(), &mut io::sink());
}
