//! Works on the embedded log in a folder until it is killed, and says on a line of its own whatever it was promised:
//! `appended SEQUENCE OFFSET` to topic `input`, `counted OFFSET` when a group has committed, `copied OFFSET` when a transaction
//! has copied records to topic `copies` and committed how far, `unfinished` when a transaction is open that never ends, and
//! `refused ERROR` when something failed, before it tries again.

use std::process::ExitCode;
use std::time::Duration;

use barnabas::log::embedded::EmbeddedSettings;
use barnabas::log::{
    CommittedOffset, Error, GroupEvent, GroupSettings, Log, ProducerRecord, ProducerSettings, Result, TopicSpec,
};

const INPUT: &str = "input";
const COPIES: &str = "copies";
/// Fills up each value behind its sequence and a space.
const FILLER_BYTES: usize = 1000;
/// Enough for the engine to stage it.
const UNFINISHED_RECORDS: usize = 48;
const UNFINISHED_VALUE_BYTES: usize = 64 * 1024;

#[tokio::main]
async fn main() -> ExitCode {
    let Some(folder) = std::env::args().nth(1) else {
        eprintln!("usage: log-worker FOLDER");
        return ExitCode::from(64);
    };
    match work(EmbeddedSettings::new(folder)).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn work(settings: EmbeddedSettings) -> Result<()> {
    let log = Log::open_embedded(settings).await?;
    let topics = [TopicSpec::new(INPUT, 1), TopicSpec::new(COPIES, 1)];
    let plan = log.plan_topics(&topics).await?;
    log.apply_topics(&plan).await?;
    tokio::try_join!(append(&log), count(&log), copy(&log), never_finish(&log))?;
    Ok(())
}

async fn append(log: &Log) -> Result<()> {
    let producer = log.producer(ProducerSettings::default()).await?;
    let run = std::process::id();
    for number in 0u64.. {
        let sequence = format!("{run}.{number}");
        let value = format!("{sequence} {}", "x".repeat(FILLER_BYTES));
        let record = ProducerRecord::to(INPUT).key(sequence.clone()).value(value);
        match producer.append(record).await {
            Ok(appended) => println!("appended {sequence} {}", appended.offset),
            Err(error) => refused(error).await,
        }
    }
    Ok(())
}

async fn count(log: &Log) -> Result<()> {
    let mut member = log.join_group(GroupSettings::new("counter", [INPUT])).await?;
    loop {
        let GroupEvent::Records(batch) = member.next().await? else {
            continue;
        };
        let committed = CommittedOffset {
            next_offset: batch.next_offset,
            metadata: String::new(),
        };
        match member.commit(vec![(batch.partition, committed)]).await {
            Ok(()) => println!("counted {}", batch.next_offset.0),
            Err(error) => refused(error).await,
        }
    }
}

async fn copy(log: &Log) -> Result<()> {
    let mut member = log.join_group(GroupSettings::new("copier", [INPUT])).await?;
    let mut producer = log.transactional_producer("copier").await?;
    loop {
        let GroupEvent::Records(batch) = member.next().await? else {
            continue;
        };
        loop {
            let mut transaction = producer.begin();
            for record in &batch.records {
                let mut copy = ProducerRecord::to(COPIES);
                copy.value.clone_from(&record.value);
                transaction.send(copy).await?;
            }
            let metadata = member.metadata().await?;
            transaction.send_offsets(metadata, [(batch.partition.clone(), batch.next_offset)]);
            match transaction.commit().await {
                Ok(()) => break println!("copied {}", batch.next_offset.0),
                Err(error) => refused(error).await,
            }
        }
    }
}

async fn never_finish(log: &Log) -> Result<()> {
    let mut producer = log.transactional_producer("unfinished").await?;
    let mut transaction = producer.begin();
    for _ in 0..UNFINISHED_RECORDS {
        let value = vec![b'u'; UNFINISHED_VALUE_BYTES];
        transaction.send(ProducerRecord::to(COPIES).value(value)).await?;
    }
    println!("unfinished");
    std::future::pending().await
}

async fn refused(error: Error) {
    println!("refused {error:?}");
    tokio::time::sleep(Duration::from_millis(10)).await;
}
