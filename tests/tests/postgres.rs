//! Importers with PostgreSQL: chunks that come again change nothing, and connections that break off lose nothing.

use std::time::Duration;

use barnabas_tests::job::{self, assert_completed, is_end};
use barnabas_tests::kafka::brokers;
use barnabas_tests::on_both_logs;
use barnabas_tests::postgres::Postgres;
use barnabas_tests::proxy::Proxy;
use barnabas_tests::site::{Engine, Gateway, Site, addresses, contacts_csv, wait_for};
use barnabas_tests::subscriber::{Follower, Transport};
use rdkafka::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};

on_both_logs!(
    chunks_that_come_again_change_nothing_in_postgresql,
    an_import_outlives_connections_to_postgresql_that_break_off,
);

const SOON: Duration = Duration::from_secs(60);
const ROWS: usize = 2000;
const CHUNK_ROWS: usize = 10;

/// Everything that stands in the table; `xmin` is the transaction that wrote a row last.
const WHOLE_TABLE: &str = "SELECT key, name, email, phone, job, line, xmin FROM contacts ORDER BY key";

/// Lets every chunk of the site come to its importers a second time.
fn repeat_chunks(site: &Site, engine: Engine, gateway: &mut Gateway) {
    match engine {
        // The group has forgotten how far it was, and begins anew.
        Engine::Embedded => {
            gateway.stop();
            let log = rusqlite::Connection::open(site.embedded_log()).expect("the log's file opens");
            let forgotten = log.execute("DELETE FROM committed WHERE group_id LIKE '%.contacts-importer'", []);
            assert!(forgotten.expect("offsets are deleted") > 0);
            gateway.start();
        }
        Engine::Kafka => {
            let producer: BaseProducer = ClientConfig::new()
                .set("bootstrap.servers", brokers())
                .create()
                .expect("a producer");
            let topic = site.chunks_topic();
            for chunk in site.records(&topic) {
                let headers = chunk.headers.iter().fold(OwnedHeaders::new(), |headers, (key, value)| {
                    headers.insert(Header {
                        key,
                        value: Some(value),
                    })
                });
                let record: BaseRecord<'_, str, [u8]> =
                    BaseRecord::to(&topic).payload(chunk.value.as_slice()).headers(headers);
                producer.send(record).map_err(|(error, _)| error).expect("it is queued");
            }
            producer.flush(SOON).expect("Kafka takes it");
        }
    }
}

async fn chunks_that_come_again_change_nothing_in_postgresql(engine: Engine) {
    let postgres = Postgres::start();
    let mut site = Site::new(engine);
    site.chunk_rows(CHUNK_ROWS as u32);
    site.set("DATABASE_URL", postgres.url(postgres.address()));
    let (mut gateway, _importer) = site.gateway_and_importer();
    let mut follower = Follower::new(gateway.address(), &[Transport::WebSocket], "c", None);
    follower.join().await;
    // The second overwrites half of the first, so that chunks of the first, repeated, could bring back what is out of date.
    let mut seen = 0;
    let mut chunks = 0;
    for (name, rows) in [("Olga", ROWS), ("Amalia", ROWS / 2)] {
        let csv = contacts_csv("k", rows).replace("Amalia", name);
        let job = job::submit(gateway.address(), "c", csv).await;
        follower.until(is_end).await;
        assert_completed(&follower.unbroken()[seen..], &job.id, rows as u64, 0);
        seen = follower.events.len();
        chunks += rows / CHUNK_ROWS;
    }
    let before = postgres.query(WHOLE_TABLE);
    assert_eq!(
        postgres.query("SELECT email FROM contacts ORDER BY email COLLATE \"C\""),
        addresses("k", ROWS)
    );
    assert_eq!(
        postgres.query("SELECT left(name, 4), count(*) FROM contacts GROUP BY 1 ORDER BY 1"),
        [format!("Amal|{}", ROWS / 2), format!("Olga|{}", ROWS / 2)]
    );
    repeat_chunks(&site, engine, &mut gateway);
    let all_done = || site.all_done_commands() == 2 * chunks;
    wait_for("every chunk is done a second time", SOON, all_done).await;
    assert_eq!(postgres.query(WHOLE_TABLE), before);
    // Nor is anything told a second time.
    let job = job::submit(gateway.address(), "c", contacts_csv("k", 1)).await;
    follower.until(is_end).await;
    assert_completed(&follower.unbroken()[seen..], &job.id, 1, 0);
}

async fn an_import_outlives_connections_to_postgresql_that_break_off(engine: Engine) {
    let postgres = Postgres::start();
    let way = Proxy::start([postgres.address()]).await;
    let mut site = Site::new(engine);
    site.chunk_rows(CHUNK_ROWS as u32);
    site.set("DATABASE_URL", postgres.url(way.address()));
    let (gateway, _importer) = site.gateway_and_importer();
    let mut follower = Follower::new(gateway.address(), &[Transport::Sse], "c", None);
    follower.join().await;
    let job = job::submit(gateway.address(), "c", contacts_csv("k", ROWS)).await;
    let mut cut = 0;
    let end = follower
        .until(|event| {
            // At every word of progress, so in the middle of what comes next.
            if !is_end(event) {
                way.reset();
                cut += 1;
            }
            is_end(event)
        })
        .await;
    assert!(cut > 1, "{end:?}");
    assert_completed(follower.unbroken(), &job.id, ROWS as u64, 0);
    assert_eq!(
        postgres.query("SELECT email FROM contacts ORDER BY email COLLATE \"C\""),
        addresses("k", ROWS)
    );
}
