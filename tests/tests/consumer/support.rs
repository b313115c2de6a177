//! A topic with a group that consumes it, and a handler that writes down what it was given.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use barnabas::log::embedded::EmbeddedSettings;
use barnabas::log::kafka::KafkaSettings;
use barnabas::log::{
    GroupDescription, Log, Producer, ProducerRecord, ProducerSettings, Record, StartAt, TopicPartition,
};
use barnabas::patterns::consumer::{ConsumerBuilder, ConsumerHandle, Context, Handler, HandlerError};
use barnabas_tests::conformance::{make_topic, unique};
use barnabas_tests::site::Engine;
use futures_util::future::BoxFuture;
use tempfile::TempDir;

pub use barnabas::log::TopicSpec;
pub use barnabas_tests::conformance::within;

/// A log, a topic on it, and a group.
pub struct Bench {
    pub log: Log,
    pub topic: String,
    pub group: String,
    pub partitions: i32,
    producer: Producer,
    _folder: TempDir,
}

/// One call of a handler.
#[derive(Clone, Debug)]
pub struct Call {
    pub partition: TopicPartition,
    pub offset: i64,
    pub key: String,
    pub value: String,
    pub attempt: u32,
    pub at: Instant,
}

/// The calls of a handler, in order.
#[derive(Clone, Default)]
pub struct Calls(Arc<Mutex<Vec<Call>>>);

impl Calls {
    pub fn all(&self) -> Vec<Call> {
        self.0.lock().expect("no handler panics with it").clone()
    }

    pub fn len(&self) -> usize {
        self.0.lock().expect("no handler panics with it").len()
    }

    pub fn push(&self, call: Call) {
        self.0.lock().expect("no handler panics with it").push(call);
    }

    /// The calls for one value.
    pub fn of(&self, value: &str) -> Vec<Call> {
        self.all().into_iter().filter(|call| call.value == value).collect()
    }

    /// Waits until something can be said of the calls.
    pub async fn until(&self, what: &str, is_so: impl Fn(&[Call]) -> bool) {
        within(what, async {
            while !is_so(&self.0.lock().expect("no handler panics with it")) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }
}

type Answer = Result<Vec<ProducerRecord>, HandlerError>;

/// Calls a function and sends what it answers.
pub struct Call1<F>(pub F);

impl<F> Handler for Call1<F>
where
    F: Fn(Call) -> BoxFuture<'static, Answer> + Send + Sync + 'static,
{
    async fn handle(&self, context: &mut Context, record: &Record) -> Result<(), HandlerError> {
        let text = |bytes: &Option<bytes::Bytes>| {
            let bytes = bytes.as_ref().map(|bytes| String::from_utf8_lossy(bytes).into_owned());
            bytes.unwrap_or_default()
        };
        let call = Call {
            partition: context.partition().clone(),
            offset: record.offset,
            key: text(&record.key),
            value: text(&record.value),
            attempt: context.attempt(),
            at: Instant::now(),
        };
        for record in (self.0)(call).await? {
            context.send(record);
        }
        Ok(())
    }
}

impl Bench {
    pub async fn new(engine: Engine, partitions: i32) -> Self {
        let folder = TempDir::new().expect("a folder");
        let log = match engine {
            Engine::Embedded => Log::open_embedded(EmbeddedSettings::new(folder.path())).await,
            Engine::Kafka => Log::connect_kafka(KafkaSettings::new(barnabas_tests::kafka::brokers())).await,
        };
        let log = log.expect("a log");
        let topic = make_topic(&log, TopicSpec::new(unique("orders"), partitions)).await;
        let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
        Self {
            group: unique("group"),
            topic,
            partitions,
            producer,
            log,
            _folder: folder,
        }
    }

    pub fn builder(&self) -> ConsumerBuilder {
        ConsumerBuilder::new(&self.group, [&self.topic]).commit_interval(Duration::from_millis(20))
    }

    /// Makes the topics that a consumer needs beside its own, and starts it.
    pub async fn start<F>(&self, builder: ConsumerBuilder, handle: F) -> ConsumerHandle
    where
        F: Fn(Call) -> BoxFuture<'static, Answer> + Send + Sync + 'static,
    {
        self.make_topics(&builder).await;
        builder.start(&self.log, Call1(handle)).await.expect("a consumer")
    }

    pub async fn make_topics(&self, builder: &ConsumerBuilder) {
        for spec in builder.topics(&self.log).await.expect("topics") {
            make_topic(&self.log, spec).await;
        }
    }

    /// Starts a consumer that writes down its calls, each after what `work` does.
    pub async fn note<F>(&self, builder: ConsumerBuilder, calls: &Calls, work: F) -> ConsumerHandle
    where
        F: Fn(&Call) -> BoxFuture<'static, Result<(), HandlerError>> + Send + Sync + 'static,
    {
        let calls = calls.clone();
        let handle = move |call: Call| -> BoxFuture<'static, Answer> {
            let (calls, done) = (calls.clone(), work(&call));
            Box::pin(async move {
                let ended = done.await;
                calls.push(call);
                ended.map(|()| Vec::new())
            })
        };
        self.start(builder, handle).await
    }

    pub async fn append(&self, record: ProducerRecord) -> i64 {
        let appended = within("an append", self.producer.append(record)).await;
        appended.expect("appended").offset
    }

    /// Appends values `0` to `count - 1` with the keys that a function gives them.
    pub async fn append_many(&self, count: usize, key: impl Fn(usize) -> String) {
        let mut deliveries = Vec::new();
        for number in 0..count {
            let record = ProducerRecord::to(self.topic.as_str())
                .key(key(number))
                .value(number.to_string());
            deliveries.push(self.producer.send(record).await.expect("sent"));
        }
        for delivery in deliveries {
            delivery.await.expect("appended");
        }
    }

    /// How far behind the group is in all partitions of the topic.
    pub async fn lag(&self) -> i64 {
        let mut lag = 0;
        for number in 0..self.partitions {
            let partition = TopicPartition::new(self.topic.as_str(), number);
            let end = self.log.offset(&partition, StartAt::End).await.expect("an end");
            lag += end - self.committed(&partition).await.unwrap_or(0);
        }
        lag
    }

    pub async fn committed(&self, partition: &TopicPartition) -> Option<i64> {
        let groups = loop {
            match self.log.groups().await {
                Ok(groups) => break groups,
                Err(error) if error.is_retriable() => tokio::time::sleep(Duration::from_millis(20)).await,
                Err(error) => panic!("{error}"),
            }
        };
        let group: Option<GroupDescription> = groups.into_iter().find(|group| group.group == self.group);
        let lag = group?.partitions.into_iter().find(|lag| lag.partition == *partition)?;
        lag.committed.map(|committed| committed.0)
    }

    /// Waits until the group has committed everything.
    pub async fn caught_up(&self) {
        within("the group has caught up", async {
            while self.lag().await > 0 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }

    /// Everything that stands on a topic.
    pub async fn read(&self, topic: &str) -> Vec<(TopicPartition, Record)> {
        let partitions = self.log.describe_topic(topic).await.expect("a topic").partitions;
        let mut reader = self.log.reader(topic).await.expect("a reader");
        for partition in 0..partitions {
            reader.assign(partition, StartAt::Start).await.expect("assigned");
        }
        let (mut records, mut ended) = (Vec::new(), 0);
        while ended < partitions {
            let batch = within("a batch", reader.next()).await.expect("a batch");
            ended += i32::from(batch.caught_up);
            let partition = batch.partition.clone();
            records.extend(batch.records.into_iter().map(|record| (partition.clone(), record)));
        }
        records
    }

    /// Waits until so many records stand on a topic, and returns them.
    pub async fn read_until(&self, topic: &str, count: usize) -> Vec<(TopicPartition, Record)> {
        within(&format!("{count} records on {topic}"), async {
            loop {
                let records = self.read(topic).await;
                if records.len() >= count {
                    return records;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await
    }
}

/// The values of each key in the order of the calls.
pub fn by_key(calls: &[Call]) -> HashMap<String, Vec<usize>> {
    let mut keys: HashMap<String, Vec<usize>> = HashMap::new();
    for call in calls {
        let number = call.value.parse().expect("a number");
        keys.entry(call.key.clone()).or_default().push(number);
    }
    keys
}

/// Nothing to do, and it never fails.
pub fn nothing(_: &Call) -> BoxFuture<'static, Result<(), HandlerError>> {
    Box::pin(async { Ok(()) })
}

/// Fails for good, with this message, while it is told to.
pub fn failing_for_good(
    message: &'static str,
    ill: &Arc<AtomicBool>,
) -> impl Fn(&Call) -> BoxFuture<'static, Result<(), HandlerError>> + Send + Sync + use<> {
    let ill = ill.clone();
    move |_: &Call| -> BoxFuture<'static, _> {
        let fails = ill.load(Ordering::SeqCst);
        Box::pin(async move {
            if fails {
                Err(HandlerError::non_retriable(message))
            } else {
                Ok(())
            }
        })
    }
}
