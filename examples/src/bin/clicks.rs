//! Counts per minute of what visitors do, exact though the counter is killed; with a page that shows its own. With `KAFKA_BROKERS` on
//! Kafka.

use std::process::ExitCode;

use barnabas::server::config::OpenTopic;
use barnabas::server::program::Failure;
use barnabas::server::{Config, Program, Server};
use barnabas_examples::clicks;
use barnabas_examples::scene::Scene;
use tokio_util::sync::CancellationToken;

const HELP: &str = "  --serve
        a page that sends its own events and draws the last 15 minutes, until it is stopped
";

fn main() -> ExitCode {
    let program = Program {
        name: "clicks",
        purpose: "counts per minute of what visitors do, exact though the counter is killed",
        more_help: HELP,
    };
    program.run_example(&["--serve"], |mut config, given, stopping| async move {
        let scene = Scene::open(&mut config).await?;
        let ended = match given.is_empty() {
            false => serve(config, &scene, stopping).await,
            true => tokio::select! {
                () = stopping.cancelled() => Ok(()),
                report = clicks::run(&scene) => report.and_then(|report| {
                    println!("{report}");
                    match report.contradictions().is_empty() {
                        true => Ok(()),
                        false => Err("the minutes contradict the sender's count".into()),
                    }
                }),
            },
        };
        scene.close().await;
        ended
    })
}

/// The gateway with the page, and the counter beside it.
async fn serve(mut config: Config, scene: &Scene, stopping: CancellationToken) -> Result<(), Failure> {
    let topic = clicks::events_topic(scene).await?;
    config.events.topics.push(OpenTopic::telemetry(&topic));
    let notifications = config.topics.notifications();
    let server = Server::start(config, scene.log.clone(), stopping.clone()).await?;
    println!("http://{}/clicks/?topic={topic}", server.address());
    let counting = async {
        let ended = tokio::select! {
            () = stopping.cancelled() => Ok(()),
            ended = clicks::serve(scene, notifications) => ended,
        };
        // Without it there is nothing to look at.
        stopping.cancel();
        ended
    };
    let ((), ended) = tokio::join!(server.serve(), counting);
    ended
}
