//! Reading request bodies: piece by piece, up to a limit, and given up when nothing comes.

use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use http_body_util::BodyExt as _;
use hyper::body::Body as _;
use tokio::time::{Instant, timeout, timeout_at};

use super::Error;
use super::idempotency::Fingerprinter;

/// How long the rest of a refused body is read, so that the client has sent it and reads the answer: browsers show a network
/// error for an answer that comes while they send.
const DRAIN: Duration = Duration::from_secs(30);

/// A body that is being read.
#[derive(Debug)]
pub(super) struct Incoming {
    body: Body,
    received: u64,
    max_bytes: u64,
    stall_timeout: Duration,
    is_compressed: bool,
    /// Sees the body go by, if somebody wants its fingerprint.
    fingerprint: Option<Fingerprinter>,
    /// The client asked whether to send, and sends only when it is read from.
    awaits_continue: bool,
}

impl Incoming {
    /// The body of a request with these headers.
    pub(super) fn new(headers: &HeaderMap, body: Body, stall_timeout: Duration) -> Self {
        Self {
            body,
            received: 0,
            max_bytes: 0,
            stall_timeout,
            is_compressed: headers
                .get(header::CONTENT_ENCODING)
                .is_some_and(|coding| coding != "identity"),
            fingerprint: None,
            awaits_continue: headers.contains_key(header::EXPECT),
        }
    }

    /// Takes the fingerprint of the body while it is read.
    pub(super) fn fingerprint(&mut self, fingerprint: Fingerprinter) {
        self.fingerprint = Some(fingerprint);
    }

    /// The fingerprint, if one was taken. The body must have been read to its end.
    pub(super) fn take_fingerprint(&mut self) -> Option<Fingerprinter> {
        self.fingerprint.take()
    }

    /// Takes up to `max_bytes`; nothing without it.
    ///
    /// # Errors
    /// 413 when the body's announced length is above it, 415 when the body is compressed.
    pub(super) fn allow(&mut self, max_bytes: u64) -> Result<(), Error> {
        if self.is_compressed {
            return Err(Error::refused(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "content-encoding",
                "compressed bodies are not accepted",
            ));
        }
        if self.body.size_hint().lower() > max_bytes {
            return Err(too_large(max_bytes));
        }
        self.max_bytes = max_bytes;
        Ok(())
    }

    /// The next piece; `None` at the end.
    ///
    /// # Errors
    /// 413 above the limit, 408 when nothing has come for the stall timeout, 400 when the client breaks off.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            let frame = match timeout(self.stall_timeout, self.body.frame()).await {
                Ok(None) => return Ok(None),
                Ok(Some(Ok(frame))) => frame,
                Ok(Some(Err(error))) => {
                    return Err(Error::bad_request(
                        "body-broken-off",
                        format!("the body broke off: {error}"),
                    ));
                }
                Err(_) => {
                    return Err(Error::refused(
                        StatusCode::REQUEST_TIMEOUT,
                        "body-stalled",
                        format!("nothing of the body has come for {} s", self.stall_timeout.as_secs()),
                    ));
                }
            };
            // Trailers mean nothing here.
            let Ok(bytes) = frame.into_data() else { continue };
            self.received += bytes.len() as u64;
            if self.received > self.max_bytes {
                return Err(too_large(self.max_bytes));
            }
            if let Some(fingerprint) = &mut self.fingerprint {
                fingerprint.update(&bytes);
            }
            return Ok(Some(bytes));
        }
    }

    /// The whole body, for those that are small.
    ///
    /// # Errors
    /// Those of [`Incoming::next`].
    pub(super) async fn read_all(&mut self) -> Result<Bytes, Error> {
        let announced = usize::try_from(self.body.size_hint().lower()).unwrap_or(0);
        let mut all = Vec::with_capacity(announced);
        while let Some(bytes) = self.next().await? {
            all.extend_from_slice(&bytes);
        }
        Ok(all.into())
    }

    /// Reads what is left of a refused body and forgets it, for a bounded time.
    pub(super) async fn drain(mut self) {
        if self.awaits_continue && self.received == 0 {
            return;
        }
        let deadline = Instant::now() + DRAIN;
        self.max_bytes = u64::MAX;
        while let Ok(Ok(Some(_))) = timeout_at(deadline, self.next()).await {}
    }
}

fn too_large(max_bytes: u64) -> Error {
    Error::refused(
        StatusCode::PAYLOAD_TOO_LARGE,
        "body-too-large",
        format!("the body is larger than {max_bytes} bytes"),
    )
}

/// The media type of a request, in lower case, and its `charset` if it names one.
pub(super) fn media_type(headers: &HeaderMap) -> (String, Option<String>) {
    let value = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default()
        .to_ascii_lowercase();
    let mut parts = value.split(';').map(str::trim);
    let media_type = parts.next().unwrap_or_default().to_owned();
    let charset = parts
        .find_map(|parameter| parameter.strip_prefix("charset="))
        .map(|charset| charset.trim_matches('"').to_owned());
    (media_type, charset)
}
