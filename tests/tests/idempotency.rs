//! A request that is repeated under its `Idempotency-Key` is one job with one answer: at several gateways at once, over kills of
//! the one that was doing it, and when that was only slow.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use barnabas_tests::http::{self, Answer, Broken};
use barnabas_tests::job::Job;
use barnabas_tests::on_both_logs;
use barnabas_tests::site::{Engine, Site, contacts_csv, jobs_path};
use hyper::{Method, StatusCode};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::task::JoinHandle;

on_both_logs!(requests_that_are_repeated_after_a_kill_are_one_job_each);

/// Requests under way at a time.
const REQUESTS: usize = 24;

/// Within it a repeated request is answered, whatever has happened to the first.
const ANSWERED_WITHIN: Duration = Duration::from_secs(60);

/// A request and its key.
#[derive(Clone, Debug)]
struct Keyed {
    key: String,
    csv: String,
}

impl Keyed {
    /// Every eighth is large: it has a transaction to itself.
    fn numbered(round: usize, number: usize) -> Self {
        let key = format!("key-{round}-{number}");
        let rows = if number % 8 == 7 { 30_000 } else { 1 + number };
        let csv = contacts_csv(&key, rows);
        Self { key, csv }
    }

    async fn post(&self, to: SocketAddr) -> Result<Answer, Broken> {
        let request = http::request(Method::POST, &jobs_path("c"))
            .header("content-type", "text/csv")
            .header("idempotency-key", format!("\"{}\"", self.key));
        let request = request.body(http::whole(self.csv.clone())).expect("a request");
        http::send(to, request).await
    }

    /// Repeats it until it is answered.
    async fn answer(&self, to: SocketAddr) -> Answered {
        let answered = async {
            loop {
                match self.post(to).await {
                    Ok(answer) if answer.status == StatusCode::ACCEPTED => return Answered::of(&answer),
                    Ok(answer) => assert!(is_later(&answer), "{answer:?}"),
                    Err(_) => {}
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(ANSWERED_WITHIN, answered)
            .await
            .unwrap_or_else(|_| panic!("{} was not answered", self.key))
    }
}

fn is_later(answer: &Answer) -> bool {
    let is_later = [StatusCode::SERVICE_UNAVAILABLE, StatusCode::CONFLICT].contains(&answer.status);
    is_later && !answer.header("retry-after").is_empty()
}

/// What must be the same in every answer.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Answered {
    job: String,
    token: String,
}

impl Answered {
    fn of(answer: &Answer) -> Self {
        let Job { id, token, .. } = Job::of(answer);
        Self { job: id, token }
    }
}

/// Posts requests to a gateway, each a moment after the other at random, and returns what comes of them.
fn post_all(to: SocketAddr, requests: &[Keyed], random: &mut StdRng) -> Vec<JoinHandle<Option<Answered>>> {
    let posts = requests.iter().cloned().map(|request| {
        let pause = Duration::from_micros(random.random_range(0..60_000));
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            match request.post(to).await {
                Ok(answer) if answer.status == StatusCode::ACCEPTED => Some(Answered::of(&answer)),
                Ok(answer) => {
                    assert!(is_later(&answer), "{answer:?}");
                    None
                }
                Err(_) => None,
            }
        })
    });
    posts.collect()
}

/// All answers to each key.
#[derive(Default)]
struct Answers(BTreeMap<String, BTreeSet<Answered>>);

impl Answers {
    fn add(&mut self, request: &Keyed, answered: Answered) {
        self.0.entry(request.key.clone()).or_default().insert(answered);
    }

    async fn repeat(&mut self, requests: &[Keyed], to: SocketAddr) {
        let repeats = requests.iter().cloned();
        let repeats = repeats.map(|request| tokio::spawn(async move { request.answer(to).await }));
        for (request, repeat) in requests.iter().zip(repeats.collect::<Vec<_>>()) {
            self.add(request, repeat.await.expect("an answer"));
        }
    }

    /// How many were answered the first time.
    async fn add_first(&mut self, requests: &[Keyed], posts: Vec<JoinHandle<Option<Answered>>>) -> usize {
        let mut count = 0;
        for (request, post) in requests.iter().zip(posts) {
            if let Some(answered) = post.await.expect("a client ends") {
                self.add(request, answered);
                count += 1;
            }
        }
        count
    }

    /// One answer to each key, and on the log those jobs and no other, each whole and once.
    fn assert_one_job_each(&self, site: &Site) {
        let several: Vec<_> = self.0.iter().filter(|(_, answers)| answers.len() > 1).collect();
        assert!(several.is_empty(), "answered differently: {several:#?}");
        let answered: BTreeSet<String> = self.0.values().flatten().map(|answer| answer.job.clone()).collect();
        assert_eq!(answered.len(), self.0.len(), "one job under several keys");
        assert_eq!(site.assert_jobs_are_whole(), answered);
    }
}

fn seeded() -> StdRng {
    let given = std::env::var("BARNABAS_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = given.unwrap_or_else(|| rand::random_range(0..1_000_000));
    println!("BARNABAS_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

async fn requests_that_are_repeated_after_a_kill_are_one_job_each(engine: Engine) {
    const ROUNDS: usize = 8;
    let mut random = seeded();
    let site = Site::new(engine);
    let mut gateway = site.gateway("gateway");
    let other = (engine == Engine::Kafka).then(|| site.gateway("other"));
    let mut answers = Answers::default();
    let mut lost = 0;
    for round in 0..ROUNDS {
        let requests: Vec<Keyed> = (0..REQUESTS).map(|number| Keyed::numbered(round, number)).collect();
        let posts = post_all(gateway.address(), &requests, &mut random);
        tokio::time::sleep(Duration::from_micros(random.random_range(0..120_000))).await;
        gateway.kill();
        match &other {
            // Nobody but the other one can tell what became of them. Now and then the dead one comes back meanwhile.
            Some(other) if round % 2 == 0 => answers.repeat(&requests, other.address()).await,
            Some(other) => {
                let (half, rest) = requests.split_at(REQUESTS / 2);
                let to = other.address();
                let repeating = half.to_vec();
                let repeats = tokio::spawn(async move {
                    let mut answers = Answers::default();
                    answers.repeat(&repeating, to).await;
                    answers
                });
                gateway.start();
                answers.repeat(rest, gateway.address()).await;
                let Answers(repeated) = repeats.await.expect("answers");
                answers.0.extend(repeated);
                gateway.kill();
            }
            None => {}
        }
        gateway.start();
        answers.repeat(&requests, gateway.address()).await;
        lost += REQUESTS - answers.add_first(&requests, posts).await;
    }
    println!("{lost} of {} requests got no answer the first time", ROUNDS * REQUESTS);
    assert!(lost > 0, "nothing was tried");
    answers.assert_one_job_each(&site);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_whose_file_of_keys_is_gone_reads_them_from_the_log() {
    let site = Site::new(Engine::Embedded);
    let mut gateway = site.gateway("gateway");
    let requests: Vec<Keyed> = (0..REQUESTS).map(|number| Keyed::numbered(0, number)).collect();
    let mut answers = Answers::default();
    answers.repeat(&requests, gateway.address()).await;
    gateway.kill();
    let data = site.embedded_log();
    let data = data.parent().expect("a folder");
    std::fs::remove_file(data.join("idempotency.sqlite")).expect("the file of keys");
    // What is left of it belongs to no file any more.
    gateway.start();
    answers.repeat(&requests, gateway.address()).await;
    answers.assert_one_job_each(&site);
}

#[tokio::test(flavor = "multi_thread")]
async fn duplicates_at_three_gateways_on_kafka_are_one_job() {
    let site = Site::new(Engine::Kafka);
    let gateways = ["one", "two", "three"].map(|name| site.gateway(name));
    let mut answers = Answers::default();
    for round in 0..5 {
        let request = Keyed::numbered(round, if round == 4 { 7 } else { round });
        let posts = (0..20).map(|number| {
            let (request, to) = (request.clone(), gateways[number % gateways.len()].address());
            tokio::spawn(async move { Answered::of(&request.post(to).await.expect("an answer")) })
        });
        for post in posts.collect::<Vec<_>>() {
            answers.add(&request, post.await.expect("an answer"));
        }
    }
    answers.assert_one_job_each(&site);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_on_kafka_that_was_only_slow_does_not_do_again_what_others_have_done() {
    const ROUNDS: usize = 3;
    let mut random = seeded();
    let site = Site::new(Engine::Kafka);
    let (slow, other) = (site.gateway("slow"), site.gateway("other"));
    let mut answers = Answers::default();
    let mut late = 0;
    for round in 0..ROUNDS {
        let requests: Vec<Keyed> = (0..REQUESTS).map(|number| Keyed::numbered(round, number)).collect();
        let posts = post_all(slow.address(), &requests, &mut random);
        tokio::time::sleep(Duration::from_micros(random.random_range(5_000..70_000))).await;
        slow.process().pause();
        answers.repeat(&requests, other.address()).await;
        let before = posts.iter().filter(|post| post.is_finished()).count();
        slow.process().resume();
        late += answers.add_first(&requests, posts).await.saturating_sub(before);
        // It goes on, with others' answers and with requests of its own.
        answers.repeat(&requests, slow.address()).await;
        let next = [Keyed::numbered(ROUNDS + round, 0)];
        answers.repeat(&next, slow.address()).await;
    }
    println!("{late} requests were answered by the slow gateway when it went on");
    assert!(late > 0, "nothing was tried");
    answers.assert_one_job_each(&site);
}
