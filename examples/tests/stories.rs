//! The examples as they are run, on both logs; what they promise is read from the log.

use std::collections::BTreeMap;
use std::time::Duration;

use barnabas::log::Record;
use barnabas::patterns::dead_letter::{dead_letter_topic, header};
use barnabas::server::Config;
use barnabas_examples::scene::{Scene, key};
use barnabas_examples::subscriptions::{self, Pace, Renewal};
use barnabas_examples::{checkout, clicks, countries, installed_apps, inventory, orders, split_import};
use barnabas_tests::on_both_logs;
use barnabas_tests::site::Engine;
use tokio::time::timeout;

on_both_logs!(
    every_subscription_is_paid_in_order_though_the_provider_was_away,
    every_subscription_is_paid_by_way_of_retry_topics,
    every_payment_is_checked_out_exactly_once_though_the_stage_is_killed,
    every_service_has_every_order_though_one_is_blocked_and_one_comes_late,
    the_stock_at_any_time_is_the_fold_of_what_had_happened,
    every_split_import_is_told_complete_once_though_workers_and_owners_are_killed,
    every_minute_of_clicks_is_told_once_with_the_senders_count_though_the_counter_is_killed,
    every_app_is_listed_as_the_events_say_though_the_projection_is_changed,
    what_is_said_of_a_country_is_in_all_three_tables,
);

/// Within it a story must be over.
const DEADLINE: Duration = Duration::from_secs(60);

/// Within it a country that was added can be read in all three tables.
const ADDED_WITHIN: Duration = Duration::from_secs(2);

const QUICK: Pace = Pace {
    month: Duration::from_millis(150),
    outage: Duration::from_millis(400),
};

async fn scene(engine: Engine) -> Scene {
    let mut config = Config::default();
    if engine == Engine::Kafka {
        config.kafka.brokers = Some(barnabas_tests::kafka::brokers());
    }
    Scene::open(&mut config).await.expect("a log")
}

async fn read(scene: &Scene, topic: &str) -> Vec<Record> {
    scene.read(topic).await.expect("it is read")
}

fn dead_letters(scene: &Scene, topic: &str, group: &str) -> String {
    dead_letter_topic(&scene.name(topic), &scene.name(group))
}

fn header_of<'a>(record: &'a Record, name: &str) -> &'a str {
    record.headers.last_str(name).unwrap_or("none")
}

/// User and month of each renewal on a topic.
async fn renewals(scene: &Scene, topic: &str) -> Vec<(String, u32)> {
    let records = read(scene, topic).await;
    let renewal = |record: &Record| {
        let value = record.value.as_deref().expect("a value");
        let Renewal { user, month, .. } = serde_json::from_slice(value).expect("a renewal");
        (user, month)
    };
    records.iter().map(renewal).collect()
}

async fn every_subscription_is_paid_in_order_though_the_provider_was_away(engine: Engine) {
    let scene = scene(engine).await;
    let ended = timeout(DEADLINE, subscriptions::run(&scene, subscriptions::blocking(), QUICK)).await;
    let report = ended.expect("in time").expect("a good end");
    assert!(report.is_all_paid() && report.failed > 0, "{report}");
    assert!(report.out_of_order().is_empty(), "{report}");
    let receipts = renewals(&scene, &scene.name("receipts")).await;
    assert_eq!(receipts.len(), 25, "nobody pays twice");
    for user in ["ada", "tony"] {
        let months = receipts.iter().filter(|(of, _)| of == user).map(|(_, month)| *month);
        assert_eq!(months.collect::<Vec<_>>(), [1, 2, 3, 4], "of {user}");
    }
    let yearly = receipts.iter().filter(|(of, _)| of == "margaret").count();
    assert_eq!(yearly, 1, "a year is paid once");
    assert!(
        read(&scene, &dead_letters(&scene, "renewals", "biller"))
            .await
            .is_empty()
    );
    scene.close().await;
}

async fn every_subscription_is_paid_by_way_of_retry_topics(engine: Engine) {
    let scene = scene(engine).await;
    let ended = timeout(
        DEADLINE,
        subscriptions::run(&scene, subscriptions::non_blocking(), QUICK),
    )
    .await;
    let report = ended.expect("in time").expect("a good end");
    let mut paid = renewals(&scene, &scene.name("receipts")).await;
    let mut scheduled = renewals(&scene, &scene.name("renewals")).await;
    paid.sort();
    scheduled.sort();
    assert_eq!(paid, scheduled, "{report}");
    let retried = format!("{}.{}.retry.500ms", scene.name("renewals"), scene.name("biller"));
    assert!(!read(&scene, &retried).await.is_empty());
    assert!(
        read(&scene, &dead_letters(&scene, "renewals", "biller"))
            .await
            .is_empty()
    );
    scene.close().await;
}

async fn every_payment_is_checked_out_exactly_once_though_the_stage_is_killed(engine: Engine) {
    let scene = scene(engine).await;
    let ended = timeout(DEADLINE, checkout::run(&scene)).await;
    let report = ended.expect("in time").expect("a good end");
    assert_eq!(report.contradictions(), Vec::<String>::new());
    assert_eq!(report.totals(), (600, 588, 12));
    assert!(report.calls > 600, "a kill interrupts payments that are done again");
    for topic in ["checkouts", "deliveries", "bookings", "invoices"] {
        let mut ids: Vec<_> = read(&scene, &scene.name(topic)).await.iter().map(key).collect();
        let count = ids.len();
        ids.sort();
        ids.dedup();
        assert_eq!((ids.len(), count), (588, 588), "on {topic}");
    }
    let hopeless = read(&scene, &dead_letters(&scene, "payments", "checkout")).await;
    for record in &hopeless {
        let message = header_of(record, header::ERROR_MESSAGE);
        assert_eq!(message, "there is no money in this payment");
    }
    assert_eq!(hopeless.len(), 12);
    scene.close().await;
}

async fn every_service_has_every_order_though_one_is_blocked_and_one_comes_late(engine: Engine) {
    let scene = scene(engine).await;
    let ended = timeout(DEADLINE, orders::run(&scene)).await;
    let summary = ended.expect("in time").expect("a good end");
    assert_eq!(summary.wallet_while_blocked, 0, "the others did not wait for it");
    let names: Vec<_> = summary.services.keys().map(String::as_str).collect();
    assert_eq!(names, ["logistics", "loyalty", "wallet", "warehouse"]);
    for (service, part) in &summary.services {
        assert_eq!(
            (part.done, part.dead_letters, part.missing, part.out_of_order),
            (55, 1, 0, 0),
            "of {service}: {summary}"
        );
        let unknown = read(&scene, &dead_letters(&scene, "orders", service)).await;
        assert_eq!(
            header_of(&unknown[0], header::ERROR_MESSAGE),
            "events of type order.gift-wrapped are not known here"
        );
    }
    assert_eq!(read(&scene, &scene.name("outcomes")).await.len(), 4 * 55);
    scene.close().await;
}

async fn the_stock_at_any_time_is_the_fold_of_what_had_happened(engine: Engine) {
    let scene = scene(engine).await;
    let ended = timeout(DEADLINE, inventory::run(&scene)).await;
    let report = ended.expect("in time").expect("a good end");
    assert_eq!(report.contradictions(), Vec::<String>::new());
    assert_eq!(report.outcomes.rejected, 3);
    let events = read(&scene, &scene.name("inventory.events")).await;
    assert_eq!(events.len(), report.commands.len());
    // A fold of its own, of what stands on the log: on hand at noon and now, by title.
    let on_hand = |before_ms: i64| {
        let mut on_hand: BTreeMap<String, i64> = BTreeMap::new();
        for record in events.iter().filter(|record| record.timestamp_ms < before_ms) {
            let event: serde_json::Value =
                serde_json::from_slice(record.value.as_deref().expect("a value")).expect("JSON");
            let sign = match header_of(record, "ce_type") {
                "stock.received" | "stock.adjusted" => 1,
                "stock.shipped" => -1,
                "stock.reserved" | "stock.rejected" => 0,
                other => panic!("{other}"),
            };
            *on_hand.entry(key(record)).or_default() += sign * event["copies"].as_i64().expect("a number");
        }
        on_hand
    };
    let told = |stock: &inventory::stock::Stock| -> BTreeMap<String, i64> {
        stock
            .0
            .iter()
            .map(|(title, copies)| (title.clone(), copies.on_hand))
            .collect()
    };
    assert_eq!(told(&report.at_noon), on_hand(report.noon_ms));
    assert_eq!(told(&report.now), on_hand(i64::MAX));
    assert_ne!(report.at_noon, report.now);
    scene.close().await;
}

async fn every_split_import_is_told_complete_once_though_workers_and_owners_are_killed(engine: Engine) {
    let scene = scene(engine).await;
    let ended = timeout(DEADLINE, split_import::run(&scene)).await;
    let report = ended.expect("in time").expect("a good end");
    assert_eq!(report.contradictions(), Vec::<String>::new());
    assert!(report.said > 1000, "some jobs were done twice: {report}");
    let mut told: Vec<_> = read(&scene, &scene.name("completions")).await.iter().map(key).collect();
    told.sort();
    assert_eq!(told, ["import-1", "import-2", "import-3", "import-4", "import-5"]);
    scene.close().await;
}

async fn every_minute_of_clicks_is_told_once_with_the_senders_count_though_the_counter_is_killed(engine: Engine) {
    let scene = scene(engine).await;
    let ended = timeout(DEADLINE, clicks::run(&scene)).await;
    let report = ended.expect("in time").expect("a good end");
    assert_eq!(report.contradictions(), Vec::<String>::new());
    assert_eq!(
        (report.sent, report.late, report.closed.len()),
        (15 * 200 + 14, 14, 15 * 3)
    );
    let events = read(&scene, &scene.name("clicks")).await.len() as u64;
    let minutes = read(&scene, &scene.name("minutes")).await;
    let count = |record: &Record| {
        let minute: clicks::Minute =
            serde_json::from_slice(record.value.as_deref().expect("a value")).expect("a minute");
        minute.value
    };
    assert_eq!(minutes.iter().map(count).sum::<u64>() + report.late, events);
    scene.close().await;
}

async fn every_app_is_listed_as_the_events_say_though_the_projection_is_changed(engine: Engine) {
    let folder = tempfile::tempdir().expect("a folder");
    let mut config = Config::default();
    config.data.dir = folder.path().to_owned();
    let store = installed_apps::Store::in_data_folder(&config);
    let scene = scene(engine).await;
    let ended = timeout(DEADLINE, installed_apps::run(&scene, &store)).await;
    let report = ended.expect("in time").expect("a good end");
    assert!(report.is_right(), "{report}");
    assert!(report.view.len() > 10 && !report.answer.is_empty(), "{report}");
    // As somebody else reads the file.
    let file = rusqlite::Connection::open(folder.path().join("installed-apps.sqlite")).expect("it opens");
    let rows: i64 = file
        .query_row("SELECT count(*) FROM installed_apps WHERE major > 0", [], |row| {
            row.get(0)
        })
        .expect("it is read");
    assert_eq!(rows, report.fold.len() as i64);
    let letters = read(&scene, &dead_letters(&scene, "app-events", "app-directory")).await;
    assert!(letters.iter().all(|letter| letter.value.as_deref() == Some(b"<app/>")));
    store.clear().await.expect("it is removed");
    scene.close().await;
}

async fn what_is_said_of_a_country_is_in_all_three_tables(engine: Engine) {
    let scene = scene(engine).await;
    let ended = timeout(DEADLINE, countries::run(&scene)).await;
    let report = ended.expect("in time").expect("a good end");
    assert!(report.added.iter().all(|took| *took < ADDED_WITHIN), "{report}");
    for store in &report.stores {
        let codes: Vec<_> = store.held.keys().map(String::as_str).collect();
        assert_eq!(
            codes,
            ["DE", "IN", "JP", "KE", "PE", "SS"],
            "in {}: {report}",
            store.name
        );
        assert!(store.is_true(), "{store:?}");
    }
    let [summer_before, summer_after] = &report.summer_time;
    assert_eq!(
        (summer_before.as_str(), summer_after.as_str()),
        ("2026-12-31T23:00Z", "2026-12-31T22:00Z")
    );
    // What the last table says of India follows from what the first says.
    let countries = last_values::<countries::Country>(&scene, "countries").await;
    let events = last_values::<countries::Event>(&scene, "events").await;
    for (code, country) in &countries {
        assert_eq!(events[code], countries::event(&countries::time_zone(country)));
    }
    assert_eq!(countries.len(), events.len());
    scene.close().await;
}

/// The last value of each key of a topic that has one.
async fn last_values<V: serde::de::DeserializeOwned>(scene: &Scene, topic: &str) -> BTreeMap<String, V> {
    let mut values = BTreeMap::new();
    for record in read(scene, &scene.name(topic)).await {
        match &record.value {
            Some(value) => values.insert(key(&record), serde_json::from_slice(value).expect("a value")),
            None => values.remove(&key(&record)),
        };
    }
    values
}
