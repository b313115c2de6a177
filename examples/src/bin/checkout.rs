//! Payments become checkouts exactly once, although the stage is killed. With `KAFKA_BROKERS` on Kafka.

use std::process::ExitCode;

use barnabas::server::Program;
use barnabas_examples::checkout;
use barnabas_examples::scene::Scene;

fn main() -> ExitCode {
    let program = Program {
        name: "checkout",
        purpose: "payments become checkouts exactly once, although the stage is killed",
        more_help: "",
    };
    program.run_example(&[], |mut config, _, stopping| async move {
        let scene = Scene::open(&mut config).await?;
        let ended = tokio::select! {
            () = stopping.cancelled() => Ok(()),
            report = checkout::run(&scene) => report.and_then(|report| {
                println!("{report}");
                match report.contradictions().is_empty() {
                    true => Ok(()),
                    false => Err("the log contradicts exactly once".into()),
                }
            }),
        };
        scene.close().await;
        ended
    })
}
