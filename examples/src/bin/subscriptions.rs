//! Schedule and forget: renewals are paid in the end, though the payment provider is away. With `KAFKA_BROKERS` on Kafka.

use std::process::ExitCode;

use barnabas::patterns::retry::RetryPolicy;
use barnabas::server::program::Failure;
use barnabas::server::{Config, Program, Server};
use barnabas_examples::scene::Scene;
use barnabas_examples::subscriptions::{self, Pace};
use tokio_util::sync::CancellationToken;

const HELP: &str = "  --non-blocking
        what fails waits on retry topics instead of in its place; the order of a user is given up
  --serve
        goes on, with a gateway whose dashboard shows what is blocked, until it is stopped
";

fn main() -> ExitCode {
    let program = Program {
        name: "subscriptions",
        purpose: "renewals that are paid in the end, though the payment provider is away",
        more_help: HELP,
    };
    let switches = ["--non-blocking", "--serve"];
    program.run_example(&switches, |mut config, given, stopping| async move {
        let scene = Scene::open(&mut config).await?;
        let retry = match given.contains(&"--non-blocking") {
            true => subscriptions::non_blocking(),
            false => subscriptions::blocking(),
        };
        let ended = match given.contains(&"--serve") {
            true => serve(config, &scene, retry, stopping).await,
            false => tokio::select! {
                () = stopping.cancelled() => Ok(()),
                ended = subscriptions::run(&scene, retry, Pace::default()) => ended.map(|report| println!("{report}")),
            },
        };
        scene.close().await;
        ended
    })
}

/// The same without an end, and a gateway beside it.
async fn serve(config: Config, scene: &Scene, retry: RetryPolicy, stopping: CancellationToken) -> Result<(), Failure> {
    let server = Server::start(config, scene.log.clone(), stopping.clone()).await?;
    println!("http://{}", server.address());
    let renewals = async {
        let ended = tokio::select! {
            () = stopping.cancelled() => Ok(()),
            ended = subscriptions::run_on(scene, retry, Pace::default()) => ended,
        };
        // Without them there is nothing to look at.
        stopping.cancel();
        ended
    };
    let ((), ended) = tokio::join!(server.serve(), renewals);
    ended
}
