//! The gateway alone.

use std::process::ExitCode;

use barnabas::server::{self, Program};

fn main() -> ExitCode {
    let program = Program {
        name: "barnabas",
        purpose: "carries events between Kafka and the browser",
        more_help: "",
    };
    program.run(|config, stopping| async move {
        let log = config.open_log().await?;
        let served = server::run(config, log.clone(), stopping).await;
        log.close().await;
        Ok(served?)
    })
}
