//! Imports that are split into jobs are told complete once, although workers and the store are killed. With `KAFKA_BROKERS` on Kafka.

use std::process::ExitCode;

use barnabas::server::Program;
use barnabas_examples::scene::Scene;
use barnabas_examples::split_import;

fn main() -> ExitCode {
    let program = Program {
        name: "split-import",
        purpose: "imports that are split into jobs are told complete once, although workers and the store are killed",
        more_help: "",
    };
    program.run_example(&[], |mut config, _, stopping| async move {
        let scene = Scene::open(&mut config).await?;
        let ended = tokio::select! {
            () = stopping.cancelled() => Ok(()),
            report = split_import::run(&scene) => report.and_then(|report| {
                println!("{report}");
                match report.contradictions().is_empty() {
                    true => Ok(()),
                    false => Err("the log contradicts the promise".into()),
                }
            }),
        };
        scene.close().await;
        ended
    })
}
