//! Reads a topic once, from its start to where it ended when the scan began.

use std::collections::HashMap;

use super::Error;
use crate::log::{self, Batch, Log, Reader, StartAt, TopicPartition};

/// A scan of one topic.
pub(crate) struct Scan {
    reader: Reader,
    /// Where each partition ends that has not been read so far.
    ends: HashMap<i32, i64>,
}

impl Scan {
    pub(crate) async fn new(log: &Log, topic: &str) -> Result<Self, Error> {
        let partitions = log.describe_topic(topic).await?.partitions;
        let mut reader = log.reader(topic).await?;
        let mut ends = HashMap::new();
        for number in 0..partitions {
            let end = log.offset(&TopicPartition::new(topic, number), StartAt::End).await?;
            if reader.assign(number, StartAt::Start).await? < end {
                ends.insert(number, end);
            } else {
                reader.unassign(number).await?;
            }
        }
        Ok(Self { reader, ends })
    }

    /// The next records of a partition, in order; `None`: all have been read.
    pub(crate) async fn next(&mut self) -> Result<Option<Batch>, Error> {
        while !self.ends.is_empty() {
            let mut batch = match self.reader.next().await {
                Ok(batch) => batch,
                // Retention has taken what stood there; what is kept comes after it.
                Err(log::Error::OffsetOutOfRange { partition, .. }) => {
                    self.reader.assign(partition.partition, StartAt::Start).await?;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let number = batch.partition.partition;
            let Some(end) = self.ends.get(&number).copied() else {
                continue;
            };
            batch.records.retain(|record| record.offset < end);
            if batch.caught_up || batch.next_offset.0 >= end {
                self.ends.remove(&number);
                self.reader.unassign(number).await?;
            }
            return Ok(Some(batch));
        }
        Ok(None)
    }
}
