//! Reads again what partitions have let go to save memory, when its turn comes.
//!
//! One partition at a time; a reader that nobody will need is closed.

use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tokio::time::sleep;

use super::partition::Partition;
use super::runner::Operation;
use crate::log::{self, Batch, Log, Reader, StartAt, TopicPartition};

/// Offsets that are rather read than skipped on the way to the next one that is wanted.
const SKIPPED: i64 = 10_000;

/// How long it waits after it could not read.
const WAIT: Duration = Duration::from_millis(500);

/// What reads again.
pub(super) struct Rereader {
    log: Log,
    /// `None` while it reads, or has nothing to.
    place: Option<Place>,
    is_reading: bool,
}

/// A reader and where it stands.
struct Place {
    reader: Reader,
    partition: TopicPartition,
    position: i64,
}

/// What was read again.
pub(super) struct Reread {
    pub(super) partition: TopicPartition,
    pub(super) epoch: u64,
    /// All that the log still has from an offset on, up to the end of the batch; `None`: it could not be read.
    pub(super) read: Option<(i64, Batch)>,
    place: Option<Place>,
}

impl Rereader {
    pub(super) fn new(log: &Log) -> Self {
        Self {
            log: log.clone(),
            place: None,
            is_reading: false,
        }
    }

    /// Begins to read what one of the partitions wants, unless it reads already.
    pub(super) fn begin<'a>(
        &mut self,
        mut partitions: impl Iterator<Item = &'a Partition> + Clone,
    ) -> Option<BoxFuture<'static, Operation>> {
        if self.is_reading {
            return None;
        }
        let place = self.place.take();
        let is_there = |state: &&Partition| place.as_ref().is_some_and(|place| place.partition == state.name);
        let position = place.as_ref().map_or(0, |place| place.position);
        // It stays with a partition as long as something is wanted there.
        let here = partitions.clone().find(is_there);
        let wanted = here.and_then(|state| Some((state, state.missing_from(position)?)));
        let wanted = wanted.or_else(|| partitions.find_map(|state| Some((state, state.missing_from(0)?))));
        let Some((state, wanted)) = wanted else {
            self.place = place.filter(|_| here.is_some_and(Partition::has_let_go));
            return None;
        };
        let (partition, epoch) = (state.name.clone(), state.epoch);
        let place = place.filter(|place| place.partition == partition);
        let log = self.log.clone();
        self.is_reading = true;
        let reading = async move {
            let (read, place) = match read(&log, place, &partition, wanted).await {
                Ok((from, batch, place)) => (Some((from, batch)), Some(place)),
                Err(error) => {
                    tracing::warn!(%partition, %error, "records that were let go cannot be read again; trying on");
                    sleep(WAIT).await;
                    (None, None)
                }
            };
            Operation::Reread(Reread {
                partition,
                epoch,
                read,
                place,
            })
        };
        Some(reading.boxed())
    }

    /// It has read.
    pub(super) fn end(&mut self, reread: &mut Reread) {
        self.is_reading = false;
        self.place = reread.place.take();
    }
}

/// The next batch on the way to the offset that is wanted, with the offset from which on it is complete.
async fn read(
    log: &Log,
    place: Option<Place>,
    partition: &TopicPartition,
    wanted: i64,
) -> log::Result<(i64, Batch, Place)> {
    let mut place = match place {
        Some(place) if (place.position..place.position + SKIPPED).contains(&wanted) => place,
        place => {
            let mut reader = match place {
                Some(place) => place.reader,
                None => log.reader(&partition.topic).await?,
            };
            let at = StartAt::Offset(wanted);
            let position = match reader.assign(partition.partition, at).await {
                Err(log::Error::OffsetOutOfRange { start, .. }) if wanted < start => {
                    reader.assign(partition.partition, StartAt::Start).await?
                }
                position => position?,
            };
            let partition = partition.clone();
            Place {
                reader,
                partition,
                position,
            }
        }
    };
    // What retention has taken is complete too: nothing is left of it.
    let from = place.position.min(wanted);
    let batch = place.reader.next().await?;
    place.position = batch.next_offset.0;
    Ok((from, batch, place))
}
