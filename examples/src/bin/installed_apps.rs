//! Which apps are installed where, projected from another service's events. With `KAFKA_BROKERS` on Kafka, with `DATABASE_URL` in PostgreSQL.

use std::process::ExitCode;

use barnabas::server::Program;
use barnabas_examples::installed_apps::{self, Store};
use barnabas_examples::scene::Scene;

const HELP: &str = "  --serve
        goes on, and answers at the address that it prints, until it is stopped
  DATABASE_URL
        where the view stands, sqlite: or postgres: [installed-apps.sqlite in the data folder]
";

fn main() -> ExitCode {
    let program = Program {
        name: "installed-apps",
        purpose: "another service's events in a database of one's own",
        more_help: HELP,
    };
    program.run_example(&["--serve"], |mut config, given, stopping| async move {
        let scene = Scene::open(&mut config).await?;
        let store = Store::from_env(&config)?;
        // An earlier run may have been killed.
        store.clear().await?;
        let ended = match given.contains(&"--serve") {
            true => installed_apps::serve(&scene, &store, stopping).await,
            false => tokio::select! {
                () = stopping.cancelled() => Ok(()),
                report = installed_apps::run(&scene, &store) => report.and_then(|report| {
                    println!("{report}");
                    match report.is_right() {
                        true => Ok(()),
                        false => Err("the view contradicts the log".into()),
                    }
                }),
            },
        };
        let cleared = store.clear().await;
        scene.close().await;
        ended.and(cleared)
    })
}
