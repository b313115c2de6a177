//! The brokers to ask first, for clients that know of none any more.
//!
//! librdkafka forgets the brokers that an answer does not name, and when it names none also whom to ask: it never asks again
//! (confluentinc/librdkafka#5301, there since 2.11). A broker names none for a moment when it was held up for longer than the
//! controller waits for it. A client that has been answered so knows of no controller either, by which it is told from one whose
//! brokers are only down: it is given those of `bootstrap.servers` again.

use std::ffi::CString;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use rdkafka::ClientContext;
use rdkafka::admin::AdminClient;
use rdkafka::bindings as sys;
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext};
use rdkafka::producer::{BaseProducer, Producer as _, ProducerContext, ThreadedProducer};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::{Shared, Started, lock};
use crate::log::{Error, Result};

/// Between two looks at the clients, and before what has not helped is tried again: a broker that is just being forgotten is in the way
/// of the same one.
const TICK: Duration = Duration::from_secs(1);
/// Rests between tries grow up to this: librdkafka keeps each list of brokers that it is given.
const LONGEST_REST: Duration = Duration::from_secs(60);

/// The clients of a log.
pub(super) struct Bootstrap {
    brokers: CString,
    clients: Mutex<Vec<Kept>>,
}

struct Kept {
    client: Weak<dyn Native>,
    /// When it may be given brokers again, and the rest after that.
    due: Instant,
    rest: Duration,
}

/// Something that is a client of librdkafka's.
pub(super) trait Native: Send + Sync {
    fn native(&self) -> *mut sys::rd_kafka_t;
}

impl<C: ConsumerContext> Native for BaseConsumer<C> {
    fn native(&self) -> *mut sys::rd_kafka_t {
        self.client().native_ptr()
    }
}

impl<C: ProducerContext> Native for BaseProducer<C> {
    fn native(&self) -> *mut sys::rd_kafka_t {
        self.client().native_ptr()
    }
}

impl<C: ProducerContext + 'static> Native for ThreadedProducer<C> {
    fn native(&self) -> *mut sys::rd_kafka_t {
        self.client().native_ptr()
    }
}

impl<C: ClientContext> Native for AdminClient<C> {
    fn native(&self) -> *mut sys::rd_kafka_t {
        self.inner().native_ptr()
    }
}

impl Bootstrap {
    /// # Errors
    /// [`Error::InvalidSetting`] for a NUL in the brokers.
    pub(super) fn new(brokers: &str) -> Result<Self> {
        let brokers = CString::new(brokers).map_err(|error| Error::InvalidSetting {
            name: "bootstrap.servers".to_owned(),
            reason: error.to_string(),
        })?;
        Ok(Self {
            brokers,
            clients: Mutex::default(),
        })
    }

    /// Cares for this client from now on, until it is dropped.
    pub(super) fn keep<C: Native + 'static>(&self, client: &Arc<C>) {
        let client: Weak<C> = Arc::downgrade(client);
        lock(&self.clients).push(Kept {
            client,
            due: Instant::now(),
            rest: TICK,
        });
    }

    /// Cares for the clients of a log until it is closed or dropped.
    pub(super) async fn run(self: Arc<Self>, log: Weak<Shared>, closing: CancellationToken, started: Started) {
        // Who no longer waits has dropped the log.
        let _ = started.send(Ok(()));
        loop {
            tokio::select! {
                () = closing.cancelled() => return,
                () = sleep(TICK) => {}
            }
            if log.strong_count() == 0 {
                return;
            }
            self.look();
        }
    }

    fn look(&self) {
        let now = Instant::now();
        // The last reference to a client may be here, and it takes its time to end: without the lock.
        let mut seen = Vec::new();
        lock(&self.clients).retain_mut(|kept| {
            let Some(client) = kept.client.upgrade() else {
                return false;
            };
            // SAFETY: the client is alive during the call, which does not wait.
            if unsafe { sys::rd_kafka_controllerid(client.native(), 0) } != -1 {
                kept.rest = TICK;
            } else if kept.due <= now {
                kept.due = now + kept.rest;
                kept.rest = (2 * kept.rest).min(LONGEST_REST);
                tracing::debug!("a client knows of no broker and is given the first ones again");
                // SAFETY: the client is alive during the call, which copies the C string.
                unsafe { sys::rd_kafka_brokers_add(client.native(), self.brokers.as_ptr()) };
            }
            seen.push(client);
            true
        });
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use rdkafka::client::Client;

    use super::super::event::Consumer;
    use super::super::{KafkaLog, KafkaSettings};
    use super::*;

    const WITHIN: Duration = Duration::from_secs(20);
    const METADATA: i16 = 3;
    const API_VERSIONS: i16 = 18;
    const TOPICS: i32 = 10_000;

    /// A broker that answers what it can do, which is to say which brokers there are: itself, or none.
    struct Broker {
        port: u16,
        names_none: Arc<AtomicBool>,
    }

    impl Broker {
        fn start() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            let port = listener.local_addr().expect("an address").port();
            let names_none = Arc::new(AtomicBool::new(false));
            let none = names_none.clone();
            thread::spawn(move || {
                for stream in listener.incoming() {
                    let (stream, none) = (stream.expect("a connection"), none.clone());
                    // It ends with the client.
                    thread::spawn(move || serve(stream, port, &none));
                }
            });
            Self { port, names_none }
        }
    }

    fn serve(mut stream: TcpStream, port: u16, names_none: &AtomicBool) -> io::Result<()> {
        loop {
            let mut size = [0; 4];
            stream.read_exact(&mut size)?;
            let mut request = vec![0; u32::from_be_bytes(size) as usize];
            stream.read_exact(&mut request)?;
            let api = i16::from_be_bytes([request[0], request[1]]);
            let mut answer = request[4..8].to_vec();
            answer.extend(match api {
                API_VERSIONS => api_versions(),
                METADATA => metadata(port, names_none.load(Ordering::Relaxed)),
                _ => return Ok(()),
            });
            stream.write_all(&(answer.len() as u32).to_be_bytes())?;
            stream.write_all(&answer)?;
        }
    }

    /// Version 3: no error, two requests with their versions, no throttling.
    fn api_versions() -> Vec<u8> {
        let mut answer = vec![0, 0, 3];
        for (api, versions) in [(METADATA, [0_i16, 1]), (API_VERSIONS, [0, 3])] {
            answer.extend(api.to_be_bytes());
            answer.extend(versions.iter().flat_map(|version| version.to_be_bytes()));
            answer.push(0);
        }
        answer.extend([0; 5]);
        answer
    }

    /// Version 1: the brokers, the controller, and topics without partitions. They are many, for the time that it takes to note them: only
    /// a client that is busy when its last broker goes forgets to look for another.
    fn metadata(port: u16, names_none: bool) -> Vec<u8> {
        let mut answer = Vec::new();
        if names_none {
            answer.extend(0_i32.to_be_bytes());
        } else {
            answer.extend([1, 1].iter().flat_map(|number: &i32| number.to_be_bytes()));
            answer.extend(9_i16.to_be_bytes());
            answer.extend(b"127.0.0.1");
            answer.extend(i32::from(port).to_be_bytes());
            answer.extend((-1_i16).to_be_bytes());
        }
        let controller: i32 = if names_none { -1 } else { 1 };
        answer.extend(controller.to_be_bytes());
        answer.extend(TOPICS.to_be_bytes());
        for topic in 0..TOPICS {
            answer.extend([0, 0, 0, 100]);
            answer.extend(format!("{topic:0100}").bytes());
            answer.extend([0; 5]);
        }
        answer
    }

    /// How many brokers a client hears of.
    fn brokers<C: ClientContext>(client: &Client<C>) -> Option<usize> {
        let heard = client.fetch_metadata(None, Duration::from_millis(500)).ok()?;
        Some(heard.brokers().len())
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn clients_that_were_told_of_no_broker_come_back() {
        let broker = Broker::start();
        let log = KafkaLog::connect(KafkaSettings::new(format!("127.0.0.1:{}", broker.port))).await;
        let log = log.expect("a connection");
        let consumer = Consumer::new(&log.0.settings.reader(), &log).expect("a consumer");
        let all = || [brokers(log.0.admin.inner()), brokers(consumer.client().client())];
        let until = |what: &str, holds: fn(&Option<usize>) -> bool| {
            let deadline = Instant::now() + WITHIN;
            while !all().iter().all(holds) {
                assert!(Instant::now() < deadline, "{what} not in {WITHIN:?}: {:?}", all());
            }
        };
        tokio::task::block_in_place(|| {
            until("there is a broker", |heard| *heard == Some(1));
            broker.names_none.store(true, Ordering::Relaxed);
            until("there is none", |heard| *heard != Some(1));
            broker.names_none.store(false, Ordering::Relaxed);
            until("there is one again", |heard| *heard == Some(1));
        });
    }
}
