//! Every service gets every order; one is in trouble, one joins late. With `KAFKA_BROKERS` on Kafka.

use std::process::ExitCode;

use barnabas::server::Program;
use barnabas_examples::orders;
use barnabas_examples::scene::Scene;

fn main() -> ExitCode {
    let program = Program {
        name: "orders",
        purpose: "every service gets every order, and no service's trouble is another's",
        more_help: "",
    };
    program.run_example(&[], |mut config, _, stopping| async move {
        let scene = Scene::open(&mut config).await?;
        let ended = tokio::select! {
            () = stopping.cancelled() => Ok(()),
            summary = orders::run(&scene) => summary.map(|summary| println!("{summary}")),
        };
        scene.close().await;
        ended
    })
}
