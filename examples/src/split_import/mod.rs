//! Who knows when all are in? Large imports are split into jobs for many workers, and each import is reported complete once, although
//! workers and the store that counts are killed, and jobs are done twice.
//!
//! ```text
//! imports, split ══▶ jobs ══▶ workers ── done: index of total ══▶ imports store ══▶ completions: one for each import
//! ```
//! A worker says that a job is done, and only then is the job's offset committed: a worker that is killed in between leaves a job that
//! is done again and said again. The store keeps the *set* of jobs that are in, so that what is said twice counts once; set, offset and
//! completion are one transaction.

mod imports;
mod worker;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use barnabas::log::{ProducerSettings, TopicSpec};
use barnabas::patterns::atomic_store;
use barnabas::server::program::Failure;
use serde::{Deserialize, Serialize};

use self::imports::{Import, Owner};
use self::worker::{Said, Worker};
use crate::scene::{Scene, event, key};

const IMPORTS: usize = 5;
const JOBS: u32 = 200;
const ROWS_PER_JOB: u64 = 500;

const WORKERS: usize = 3;

/// After so many jobs the workers are killed, and the store's owner.
const KILLED_AFTER: [usize; 2] = [300, 600];

const PARTITIONS: i32 = 6;

/// A part of an import, for one worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    /// The import.
    pub import: String,
    /// Which part it is, from 0.
    pub index: u32,
    /// Of how many.
    pub total: u32,
    /// Rows in it.
    pub rows: u64,
}

/// Splits imports, has them done, kills on the way, and proves from the log what became of them.
///
/// # Errors
/// The log refuses.
pub async fn run(scene: &Scene) -> Result<Report, Failure> {
    let names = Names::new(scene);
    scene
        .make(&[
            TopicSpec::new(&names.jobs, PARTITIONS),
            TopicSpec::new(&names.completions, 1),
        ])
        .await?;
    scene
        .make(&atomic_store::topics(
            &names.store,
            PARTITIONS,
            Duration::from_secs(24 * 60 * 60),
        ))
        .await?;
    split(scene, &names).await?;
    println!("{IMPORTS} imports were split into {JOBS} jobs each");
    let said = Arc::new(Said::default());
    let mut workers = start_workers(scene, &names, &said).await?;
    let mut owner = Owner::start(scene, &names)?;
    for jobs in KILLED_AFTER {
        said.set_working(true);
        said.wait_for(jobs).await;
        // What they have said and not committed is done again.
        workers.clear();
        drop(owner);
        said.set_working(false);
        println!("after {jobs} jobs the workers and the store's owner were killed, and others take over");
        workers = start_workers(scene, &names, &said).await?;
        owner = Owner::start(scene, &names)?;
    }
    said.set_working(true);
    scene
        .until(async || Ok(Report::read(scene, &names).await?.is_settled()))
        .await?;
    for worker in workers {
        worker.stop().await?;
    }
    owner.stop().await?;
    // What would be told a second time has been told by now.
    Report::read(scene, &names).await
}

/// The names of this run.
#[derive(Debug)]
struct Names {
    jobs: String,
    /// The group of the workers.
    workers: String,
    store: String,
    completions: String,
}

impl Names {
    fn new(scene: &Scene) -> Self {
        Self {
            jobs: scene.name("import-jobs"),
            workers: scene.name("import-workers"),
            store: scene.name("imports"),
            completions: scene.name("completions"),
        }
    }
}

async fn start_workers(scene: &Scene, names: &Names, said: &Arc<Said>) -> Result<Vec<Worker>, Failure> {
    let mut workers = Vec::new();
    for _ in 0..WORKERS {
        workers.push(Worker::start(scene, names, said).await?);
    }
    Ok(workers)
}

async fn split(scene: &Scene, names: &Names) -> Result<(), Failure> {
    let producer = scene.log.producer(ProducerSettings::default()).await?;
    let mut deliveries = Vec::new();
    for index in 0..JOBS {
        for import in 1..=IMPORTS {
            let job = Job {
                import: format!("import-{import}"),
                index,
                total: JOBS,
                rows: ROWS_PER_JOB,
            };
            let key = format!("{}/{index}", job.import);
            deliveries.push(producer.send(event(&names.jobs, &key, "job.split", &job)?).await?);
        }
    }
    for delivery in deliveries {
        delivery.await?;
    }
    Ok(())
}

/// What has become of the imports, from the log.
#[derive(Clone, Debug)]
pub struct Report {
    /// The states of the store.
    pub imports: BTreeMap<String, Import>,
    /// How often each import was said to be complete.
    pub completions: BTreeMap<String, usize>,
    /// How often workers said that a job is done.
    pub said: usize,
}

impl Report {
    async fn read(scene: &Scene, names: &Names) -> Result<Self, Failure> {
        let mut completions = BTreeMap::new();
        for record in scene.read(&names.completions).await? {
            *completions.entry(key(&record)).or_default() += 1;
        }
        Ok(Self {
            imports: atomic_store::states(&scene.log, &names.store).await?,
            completions,
            said: scene.read(&atomic_store::commands_topic(&names.store)).await?.len(),
        })
    }

    fn is_settled(&self) -> bool {
        self.completions.len() == IMPORTS
    }

    /// What contradicts the promise: each import has all its jobs and rows once, and was told complete once.
    pub fn contradictions(&self) -> Vec<String> {
        let mut found = Vec::new();
        for number in 1..=IMPORTS {
            let name = format!("import-{number}");
            let told = self.completions.get(&name).copied().unwrap_or(0);
            if told != 1 {
                found.push(format!("{name} was told complete {told} times"));
            }
            let import = self.imports.get(&name).cloned().unwrap_or_default();
            let (jobs, rows) = (import.done.len(), import.rows);
            if jobs != JOBS as usize || rows != u64::from(JOBS) * ROWS_PER_JOB {
                found.push(format!("{name} has {jobs} jobs and {rows} rows"));
            }
        }
        found
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f)?;
        for (name, import) in &self.imports {
            let told = self.completions.get(name).copied().unwrap_or(0);
            writeln!(
                f,
                "{name:>10}  {} of {} jobs are in, {} rows; told complete {told} time",
                import.done.len(),
                import.total,
                import.rows
            )?;
        }
        let jobs: usize = self.imports.values().map(|import| import.done.len()).sum();
        writeln!(
            f,
            "\n{jobs} jobs were said to be done {} times, and each counts once.",
            self.said
        )?;
        match self.contradictions().as_slice() {
            [] => write!(f, "Each import was told complete once, with all that is in it."),
            found => write!(f, "This contradicts the promise:\n{}", found.join("\n")),
        }
    }
}
