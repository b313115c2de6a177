//! The warden: ends claims that will never be answered, so that their keys are free again.
//!
//! Invariant: a claim is released only when its producer can commit nothing any more. This node's earlier producers were fenced
//! when the present ones were made; another node's producer is fenced here first.

use std::time::{Duration, Instant};

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::ledger::Ledger;
use crate::log::{self, Log, Producer};

/// How often live claims are looked at while there are some.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Who doubts.
#[derive(Debug)]
pub(super) struct Warden {
    pub(super) ledger: Ledger,
    pub(super) log: Log,
    /// For releases.
    pub(super) producer: Producer,
}

impl Warden {
    /// Ends what is doubtful until `ended`.
    pub(super) async fn run(self, ended: CancellationToken) {
        tokio::select! {
            () = ended.cancelled() => {}
            () = self.watch() => {}
        }
    }

    async fn watch(&self) {
        loop {
            self.ledger.appeared().await;
            while self.ledger.has_live_claims() {
                let before = Instant::now();
                sleep(LOOK_EVERY).await;
                if before.elapsed() > 2 * LOOK_EVERY {
                    // It was this process that stood still: first it hears what the others have said meanwhile.
                    continue;
                }
                for (holder, claims) in self.ledger.doubtful() {
                    if let Err(error) = self.end(&holder, claims).await {
                        tracing::warn!(%error, holder, "claims to keys cannot be ended yet: {error}");
                    }
                }
            }
        }
    }

    /// Releases claims of one producer, each of a key, when nothing more can come of them.
    async fn end(&self, holder: &str, claims: Vec<(String, String)>) -> log::Result<()> {
        if !self.ledger.is_own(holder) {
            tracing::warn!(
                holder,
                claims = claims.len(),
                "a gateway has not answered requests in time; it is fenced"
            );
            // When this returns, what was open under the id is committed or aborted, and nothing more will be.
            self.log.transactional_producer(holder).await?;
        }
        self.ledger.release(&self.producer, claims).await
    }
}
