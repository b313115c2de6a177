//! A warehouse whose stock is a fold of the log, now and at any time before. With `KAFKA_BROKERS` on Kafka.

use std::process::ExitCode;

use barnabas::server::event::rfc3339;
use barnabas::server::program::Failure;
use barnabas::server::{ConfigError, Program};
use barnabas_examples::inventory;
use barnabas_examples::scene::Scene;

const HELP: &str = "  at TIME
        prints the stock as it was at that time, such as 2026-11-22T10:00:00Z; it needs a log that was kept, so --data-dir or
        KAFKA_BROKERS
  Where --data-dir or KAFKA_BROKERS names a log, what happens stays there: the topics inventory.commands and inventory.events, and those
  of the group inventory.warehouse.
";

fn main() -> ExitCode {
    let program = Program {
        name: "inventory",
        purpose: "a warehouse whose stock is a fold of what has happened, now and at any time before",
        more_help: HELP,
    };
    program.run_example_command("at", |mut config, at, stopping| async move {
        let at_ms = at.as_deref().map(parse).transpose()?;
        let scene = Scene::open_kept(&mut config).await?;
        let ended = tokio::select! {
            () = stopping.cancelled() => Ok(()),
            ended = async {
                match at_ms {
                    Some(at_ms) => print_stock(&scene, at_ms).await,
                    None => play(&scene).await,
                }
            } => ended,
        };
        scene.close().await;
        ended
    })
}

async fn play(scene: &Scene) -> Result<(), Failure> {
    let report = inventory::run(scene).await?;
    println!("{report}");
    match report.contradictions().is_empty() {
        true => Ok(()),
        false => Err("the log contradicts the stock".into()),
    }
}

async fn print_stock(scene: &Scene, at_ms: i64) -> Result<(), Failure> {
    if !scene.is_kept() {
        return Err(refused("needs a log that was kept: --data-dir or KAFKA_BROKERS").into());
    }
    match inventory::at(scene, at_ms).await {
        Ok(stock) => println!("The stock at {}:\n{stock}", rfc3339(at_ms)),
        Err(failure) if inventory::is_nothing_there(&failure) => {
            return Err(refused("there was never a warehouse on this log; `inventory` alone opens one").into());
        }
        Err(failure) => return Err(failure),
    }
    Ok(())
}

fn parse(time: &str) -> Result<i64, ConfigError> {
    match time.parse::<jiff::Timestamp>() {
        Ok(time) => Ok(time.as_millisecond()),
        Err(error) => Err(refused(&format!(
            "{time} is not a time such as 2026-11-22T10:00:00Z: {error}"
        ))),
    }
}

fn refused(reason: &str) -> ConfigError {
    ConfigError {
        setting: "at".to_owned(),
        reason: reason.to_owned(),
    }
}
