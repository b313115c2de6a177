//! Members that come and go.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use barnabas::log::{
    Error, GroupEvent, GroupMember, GroupProtocol, GroupSettings, NextOffset, ProducerRecord, TopicPartition,
};
use barnabas::patterns::consumer::{ConsumerHandle, DeliveryGuarantee, ProcessingOrder};
use barnabas_tests::on_both_logs;
use barnabas_tests::site::Engine;
use futures_util::future::BoxFuture;
use tokio::sync::Semaphore;

use super::support::{Bench, Call, Calls, nothing, within};

on_both_logs!(
    members_that_come_and_go_lose_and_repeat_nothing,
    members_of_the_newer_protocol_that_come_and_go_lose_and_repeat_nothing,
    transactions_of_members_that_come_and_go_lose_and_repeat_nothing,
    transactions_of_members_of_the_newer_protocol_lose_and_repeat_nothing,
    a_handler_that_runs_past_the_bound_is_not_waited_for,
    what_ends_late_says_nothing_of_a_later_assignment,
    a_partition_that_was_paused_goes_on_at_its_next_owner,
);

async fn until_owned(consumer: &ConsumerHandle, partitions: usize) {
    within("the partitions are shared", async {
        let owned = async || {
            let all = consumer.state().await.expect("a state").partitions;
            all.iter()
                .filter(|state| !state.partition.topic.ends_with(".redrive"))
                .count()
        };
        while owned().await != partitions {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

async fn members_that_come_and_go_lose_and_repeat_nothing(engine: Engine) {
    come_and_go(engine, GroupProtocol::Classic, DeliveryGuarantee::AtLeastOnce).await;
}

async fn members_of_the_newer_protocol_that_come_and_go_lose_and_repeat_nothing(engine: Engine) {
    come_and_go(engine, GroupProtocol::Consumer, DeliveryGuarantee::AtLeastOnce).await;
}

async fn transactions_of_members_that_come_and_go_lose_and_repeat_nothing(engine: Engine) {
    come_and_go(engine, GroupProtocol::Classic, DeliveryGuarantee::ExactlyOnce).await;
}

async fn transactions_of_members_of_the_newer_protocol_lose_and_repeat_nothing(engine: Engine) {
    come_and_go(engine, GroupProtocol::Consumer, DeliveryGuarantee::ExactlyOnce).await;
}

async fn come_and_go(engine: Engine, protocol: GroupProtocol, guarantee: DeliveryGuarantee) {
    let bench = Arc::new(Bench::new(engine, 6).await);
    const COUNT: usize = 3000;
    let calls = Calls::default();
    let work = |_: &Call| -> BoxFuture<'static, _> {
        Box::pin(async {
            tokio::time::sleep(Duration::from_millis(1)).await;
            Ok(())
        })
    };
    let builder = |slot: &str| {
        let builder = bench.builder().order(ProcessingOrder::Key).protocol(protocol);
        builder.guarantee(guarantee).slot(slot)
    };
    let first = bench.note(builder("1"), &calls, work).await;
    let writer = tokio::spawn({
        let bench = bench.clone();
        async move {
            for _ in 0..30 {
                bench.append_many(COUNT / 30, |number| number.to_string()).await;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    });
    until_owned(&first, 6).await;
    let second = bench.note(builder("2"), &calls, work).await;
    until_owned(&second, 3).await;
    let third = bench.note(builder("3"), &calls, work).await;
    until_owned(&third, 2).await;
    first.shutdown().await.expect("a good end");
    until_owned(&second, 3).await;
    writer.await.expect("all is written");
    bench.caught_up().await;
    second.shutdown().await.expect("a good end");
    third.shutdown().await.expect("a good end");
    let mut seen: Vec<_> = calls
        .all()
        .iter()
        .map(|call| (call.partition.partition, call.offset))
        .collect();
    let calls_made = seen.len();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(
        (seen.len(), calls_made),
        (COUNT, COUNT),
        "each once: whoever left had committed what it did"
    );
}

async fn a_handler_that_runs_past_the_bound_is_not_waited_for(engine: Engine) {
    let bench = Bench::new(engine, 2).await;
    bench.append_many(40, |number| number.to_string()).await;
    let calls = Calls::default();
    let (hanging, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(tokio::sync::Notify::new()));
    let work = {
        let (hanging, gate) = (hanging.clone(), gate.clone());
        move |call: &Call| -> BoxFuture<'static, _> {
            let hangs = call.offset == 5;
            let (hanging, gate) = (hanging.clone(), gate.clone());
            Box::pin(async move {
                if hangs {
                    let opened = gate.notified();
                    hanging.fetch_add(1, Ordering::SeqCst);
                    opened.await;
                }
                Ok(())
            })
        }
    };
    let first = bench
        .note(bench.builder().drain_timeout(Duration::from_millis(300)), &calls, work)
        .await;
    within("both hang", async {
        while hanging.load(Ordering::SeqCst) < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    let second = bench.note(bench.builder(), &calls, nothing).await;
    until_owned(&second, 1).await;
    // The new owner goes on at the record whose handler hangs.
    calls
        .until("the rest of one partition", |calls| {
            let later = calls.iter().filter(|call| call.offset >= 5);
            later.count() >= 10
        })
        .await;
    let moved = calls
        .all()
        .iter()
        .find(|call| call.offset == 5)
        .expect("it goes on at the hanging record")
        .partition
        .clone();
    gate.notify_waiters();
    bench.caught_up().await;
    first.shutdown().await.expect("a good end");
    second.shutdown().await.expect("a good end");
    let of_moved: Vec<_> = calls
        .all()
        .iter()
        .filter(|call| call.partition == moved && call.offset == 5)
        .map(|call| call.offset)
        .collect();
    assert_eq!(
        of_moved,
        [5, 5],
        "once by the new owner, and once late, which changed nothing"
    );
}

/// A handler that is no longer waited for ends when its member has the partition again, where the record is being handled anew.
async fn what_ends_late_says_nothing_of_a_later_assignment(engine: Engine) {
    let bench = Bench::new(engine, 2).await;
    let partitions = [0, 1].map(|number| TopicPartition::new(bench.topic.as_str(), number));
    for partition in &partitions {
        let record = ProducerRecord::to(bench.topic.as_str()).partition(partition.partition);
        bench.append(record.value("1")).await;
    }
    let (begun, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
    let work = || {
        let (begun, gate) = (begun.clone(), gate.clone());
        move |_: &Call| -> BoxFuture<'static, _> {
            let (begun, gate) = (begun.clone(), gate.clone());
            Box::pin(async move {
                begun.fetch_add(1, Ordering::SeqCst);
                gate.acquire().await.expect("never closed").forget();
                Ok(())
            })
        }
    };
    let until_begun = async |count: usize| {
        within("handlers have begun", async {
            while begun.load(Ordering::SeqCst) < count {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    };
    let builder = || bench.builder().drain_timeout(Duration::from_millis(100));
    let calls = Calls::default();
    let first = bench.note(builder(), &calls, work()).await;
    until_begun(2).await;
    let second = bench.note(builder(), &Calls::default(), work()).await;
    until_owned(&second, 1).await;
    until_begun(3).await;
    let state = first.state().await.expect("a state");
    let (stays, moved) = match state.partitions.iter().any(|state| state.partition == partitions[0]) {
        true => (&partitions[0], &partitions[1]),
        false => (&partitions[1], &partitions[0]),
    };
    second.shutdown().await.expect("a good end");
    until_begun(4).await;

    // Those who wait for the longest go first: the two from before.
    gate.add_permits(2);
    within("the partition that stayed is done", async {
        while bench.committed(stays).await != Some(1) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert_eq!(calls.len(), 2);
    let state = first.state().await.expect("a state");
    let of_moved = state.partitions.iter().find(|state| state.partition == *moved);
    assert_eq!(
        of_moved.expect("it is back").done.0,
        0,
        "its record is still being handled"
    );
    gate.add_permits(1);
    bench.caught_up().await;
    first.shutdown().await.expect("a good end");
    assert_eq!(calls.len(), 3);
}

async fn a_partition_that_was_paused_goes_on_at_its_next_owner(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    let calls = Calls::default();
    let first = bench.note(bench.builder(), &calls, nothing).await;
    until_owned(&first, 1).await;
    first.pause_all().await.expect("paused");
    bench.append_many(10, |number| number.to_string()).await;
    first.shutdown().await.expect("a good end");
    assert_eq!(calls.len(), 0);
    let second = bench.note(bench.builder(), &calls, nothing).await;
    bench.caught_up().await;
    second.shutdown().await.expect("a good end");
    assert_eq!(calls.len(), 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_an_instance_that_comes_back_under_its_id_disturbs_nobody() {
    for protocol in [GroupProtocol::Classic, GroupProtocol::Consumer] {
        let bench = Bench::new(Engine::Kafka, 4).await;
        bench.make_topics(&bench.builder()).await;
        let join = async |instance: &str| {
            let settings = GroupSettings {
                instance_id: Some(instance.to_owned()),
                protocol,
                ..GroupSettings::new(&bench.group, [&bench.topic])
            };
            bench.log.join_group(settings).await.expect("a member")
        };
        let mut first = join("a").await;
        assert_eq!(assigned(&mut first).await.len(), 4);
        let mut second = join("b").await;
        let GroupEvent::Revoked(moved) = next_event(&mut first).await else {
            panic!("half of the partitions move");
        };
        first.release(moved.clone()).await.expect("released");
        assert_eq!(assigned(&mut second).await, moved);
        drop(second);
        let mut second = join("b").await;
        assert_eq!(assigned(&mut second).await, moved, "they were kept for it");

        let mut third = join("b").await;
        // The classic protocol prefers who comes, the newer one who is there.
        let (winner, loser) = match protocol {
            GroupProtocol::Classic => (&mut third, &mut second),
            GroupProtocol::Consumer => (&mut second, &mut third),
        };
        let ended = within("one of the two ends", async {
            loop {
                match loser.next().await {
                    Ok(_) => {}
                    Err(error) if error.is_retriable() => {}
                    Err(error) => return error,
                }
            }
        })
        .await;
        assert!(matches!(ended, Error::FencedMember { .. }), "{ended}");
        if protocol == GroupProtocol::Classic {
            assert_eq!(assigned(winner).await, moved);
        }
        let next = moved.iter().map(|partition| (partition.clone(), NextOffset(0).into()));
        winner.commit(next.collect()).await.expect("it is still a member");
        let told = tokio::time::timeout(Duration::from_millis(500), next_event(&mut first)).await;
        assert!(told.is_err(), "the other member is told nothing: {told:?}");
    }
}

async fn assigned(member: &mut GroupMember) -> Vec<TopicPartition> {
    loop {
        match next_event(member).await {
            GroupEvent::Assigned(partitions) if !partitions.is_empty() => {
                let mut partitions: Vec<_> = partitions.into_iter().map(|(partition, _)| partition).collect();
                partitions.sort();
                return partitions;
            }
            GroupEvent::Assigned(_) => {}
            event => panic!("{event:?}"),
        }
    }
}

/// The next event that is not an empty batch.
async fn next_event(member: &mut GroupMember) -> GroupEvent {
    within("an event", async {
        loop {
            match member.next().await.expect("an event") {
                GroupEvent::Records(batch) if batch.records.is_empty() => {}
                event => return event,
            }
        }
    })
    .await
}
