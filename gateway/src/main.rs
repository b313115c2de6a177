//! The gateway alone, or, with a subcommand, what operators do with one that runs.

mod cli;

use std::process::ExitCode;

use barnabas::server::{self, Program};

fn main() -> ExitCode {
    let program = Program {
        name: "barnabas",
        purpose: "carries events between Kafka and the browser",
        more_help: cli::HELP,
    };
    let mut arguments = std::env::args().skip(1);
    if let Some(command) = arguments.next().and_then(|name| cli::Subcommand::named(&name)) {
        return cli::run(command, arguments.collect());
    }
    program.run(|config, stopping| async move {
        let log = config.open_log().await?;
        let served = server::run(config, log.clone(), stopping).await;
        log.close().await;
        Ok(served?)
    })
}
