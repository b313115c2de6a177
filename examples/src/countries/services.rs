//! The services that make one table from another, and what they make.

use barnabas::log::{ProducerRecord, Record};
use barnabas::patterns::consumer::{
    ConsumerBuilder, ConsumerHandle, Context, DeliveryGuarantee, Handler, HandlerError, ProcessingOrder,
};
use barnabas::patterns::table::{Table, delete_record, put_record};
use barnabas::server::program::Failure;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::open;
use crate::scene::{Scene, key};

/// A country.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Country {
    /// Its name.
    pub name: String,
    /// The time zone of its capital.
    pub zone: String,
    /// How many minutes the clocks there are before UTC now.
    pub utc_offset_minutes: i32,
}

impl Country {
    /// A country.
    pub fn new(name: &str, zone: &str, utc_offset_minutes: i32) -> Self {
        Self {
            name: name.to_owned(),
            zone: zone.to_owned(),
            utc_offset_minutes,
        }
    }
}

/// How a country stands to UTC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimeZone {
    /// The country's name.
    pub country: String,
    /// The time zone of its capital.
    pub zone: String,
    /// Such as `UTC+05:30`.
    pub utc_offset: String,
    /// The same in minutes.
    pub minutes: i32,
}

/// What happens in a country.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// What.
    pub title: String,
    /// When it begins by UTC.
    pub begins_utc: String,
}

/// How a country stands to UTC.
pub fn time_zone(country: &Country) -> TimeZone {
    let minutes = country.utc_offset_minutes;
    let sign = if minutes < 0 { '-' } else { '+' };
    TimeZone {
        country: country.name.clone(),
        zone: country.zone.clone(),
        utc_offset: format!("UTC{sign}{:02}:{:02}", minutes.abs() / 60, minutes.abs() % 60),
        minutes,
    }
}

/// The new year of 2027 where the clocks are so.
pub fn event(zone: &TimeZone) -> Event {
    // Minutes from the midnight with which the last day of 2026 begins by UTC.
    let begins = 24 * 60 - zone.minutes;
    let day = if begins < 24 * 60 { "2026-12-31" } else { "2027-01-01" };
    Event {
        title: format!("New Year in {}", zone.country),
        begins_utc: format!("{day}T{:02}:{:02}Z", begins / 60 % 24, begins % 60),
    }
}

/// What one table's value makes of another's.
pub(super) type Derive<A, B> = fn(&A) -> B;

/// A service: a group that makes its table from another, and the table, which every instance has in full.
pub(super) struct Service<B> {
    pub(super) table: Table<String, B>,
    consumer: ConsumerHandle,
}

impl<B: Serialize + DeserializeOwned + Send + Sync + 'static> Service<B> {
    pub(super) async fn start<A>(scene: &Scene, from: &str, to: &str, derive: Derive<A, B>) -> Result<Self, Failure>
    where
        A: DeserializeOwned + Send + Sync + 'static,
    {
        // A record of the output for each of the input, in the order of its key, in one transaction with the offset.
        let consumer = ConsumerBuilder::new(scene.name(&format!("{to}-service")), [scene.name(from)])
            .order(ProcessingOrder::Key)
            .guarantee(DeliveryGuarantee::ExactlyOnce);
        let to = scene.name(to);
        let chain = Chain { to: to.clone(), derive };
        Ok(Self {
            consumer: scene.start(consumer, chain).await?,
            table: open(&scene.log, &to).await?,
        })
    }

    pub(super) async fn stop(self) -> Result<(), Failure> {
        Ok(self.consumer.shutdown().await?)
    }
}

struct Chain<A, B> {
    to: String,
    derive: Derive<A, B>,
}

impl<A, B> Chain<A, B>
where
    A: DeserializeOwned,
    B: Serialize,
{
    /// What goes to the output: a tombstone for a tombstone.
    fn derived(&self, record: &Record) -> Result<ProducerRecord, HandlerError> {
        let key = key(record);
        let Some(value) = &record.value else {
            return Ok(delete_record(&self.to, &key));
        };
        let value = serde_json::from_slice(value).map_err(HandlerError::non_retriable)?;
        put_record(&self.to, &key, &(self.derive)(&value)).map_err(HandlerError::non_retriable)
    }
}

impl<A, B> Handler for Chain<A, B>
where
    A: DeserializeOwned + Send + Sync + 'static,
    B: Serialize + Send + Sync + 'static,
{
    async fn handle(&self, context: &mut Context, record: &Record) -> Result<(), HandlerError> {
        context.send(self.derived(record)?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_new_year_begins_at_midnight_of_the_place() {
        for (minutes, offset, begins) in [
            (0, "UTC+00:00", "2027-01-01T00:00Z"),
            (120, "UTC+02:00", "2026-12-31T22:00Z"),
            (330, "UTC+05:30", "2026-12-31T18:30Z"),
            (-300, "UTC-05:00", "2027-01-01T05:00Z"),
        ] {
            let zone = time_zone(&Country::new("Here", "Here/There", minutes));
            assert_eq!(zone.utc_offset, offset);
            assert_eq!(event(&zone).begins_utc, begins);
        }
    }
}
