//! Three services, each with a table of its own, one made from the other. With `KAFKA_BROKERS` on Kafka.

use std::process::ExitCode;

use barnabas::server::Program;
use barnabas_examples::countries;
use barnabas_examples::scene::Scene;

const HELP: &str = "  --serve
        goes on, with a page that shows the three tables live, until it is stopped
";

fn main() -> ExitCode {
    let program = Program {
        name: "countries",
        purpose: "three services, each with a table of its own, one made from the other",
        more_help: HELP,
    };
    program.run_example(&["--serve"], |mut config, given, stopping| async move {
        let address = config.listen.address;
        let scene = Scene::open(&mut config).await?;
        let ended = match given.contains(&"--serve") {
            true => countries::serve(&scene, address, stopping).await,
            false => tokio::select! {
                () = stopping.cancelled() => Ok(()),
                report = countries::run(&scene) => report.map(|report| println!("{report}")),
            },
        };
        scene.close().await;
        ended
    })
}
