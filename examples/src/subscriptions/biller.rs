//! Has renewals paid: asks the provider over HTTP, and says so on the topic of receipts.

use std::net::SocketAddr;

use barnabas::patterns::consumer::{Context, EventHandler, HandlerError};
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::Renewal;
use crate::scene::event;

pub(super) struct Biller {
    provider: SocketAddr,
    receipts: String,
}

impl Biller {
    pub(super) fn new(provider: SocketAddr, receipts: &str) -> Self {
        Self {
            provider,
            receipts: receipts.to_owned(),
        }
    }

    /// Asks the provider for a payment. It may be asked twice for the same one, after a crash or when its answer was lost: the
    /// idempotency key tells it so.
    async fn pay(&self, renewal: &Renewal) -> Result<StatusCode, Box<dyn std::error::Error + Send + Sync>> {
        let request = Request::post("/payments")
            .header("host", self.provider.to_string())
            .header("idempotency-key", format!("{}/{}", renewal.user, renewal.month))
            .body(Full::<Bytes>::from(serde_json::to_vec(renewal)?))?;
        let stream = TcpStream::connect(self.provider).await?;
        let (mut provider, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // It ends with the request.
        tokio::spawn(connection);
        Ok(provider.send_request(request).await?.status())
    }
}

impl EventHandler<Renewal> for Biller {
    async fn handle(&self, context: &mut Context, renewal: Renewal) -> Result<(), HandlerError> {
        let status = self.pay(&renewal).await.map_err(HandlerError::retriable)?;
        let (Renewal { user, month, .. }, attempt) = (&renewal, context.attempt());
        if status.is_success() {
            println!("{user:>10}  month {month}  paid, attempt {attempt}");
            let receipt = event(&self.receipts, user, "renewal.paid", &renewal);
            context.send(receipt.map_err(HandlerError::non_retriable)?);
            return Ok(());
        }
        println!("{user:>10}  month {month}  not paid, attempt {attempt}: the provider says {status}");
        let error = format!("the provider says {status}");
        match status {
            // Nothing will make it a good request.
            StatusCode::BAD_REQUEST => Err(HandlerError::non_retriable(error)),
            _ => Err(HandlerError::retriable(error)),
        }
    }
}
