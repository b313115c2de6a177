//! A small HTTP client: one connection per request, nothing retried, nothing followed.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST, HeaderMap};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// A test that waits longer than this for a head, or for a whole answer, has failed.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// The body of a request.
pub type Body = BoxBody<Bytes, std::convert::Infallible>;

/// A request that got no answer: the connection was refused, or broke off.
pub type Broken = Box<dyn std::error::Error + Send + Sync>;

/// A whole answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The fields of the head.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

impl Answer {
    /// The body as JSON.
    ///
    /// # Panics
    /// If it is not.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// A field of the head as text, empty if there is none.
    pub fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    }

    /// The stable name of what is wrong, from a problem document; empty in any other answer.
    pub fn code(&self) -> String {
        let problem: serde_json::Value = serde_json::from_slice(&self.body).unwrap_or_default();
        problem["code"].as_str().unwrap_or_default().to_owned()
    }
}

/// A request for `path`, to be given a body and sent.
pub fn request(method: Method, path: &str) -> hyper::http::request::Builder {
    Request::builder().method(method).uri(path)
}

/// A body that is known whole.
pub fn whole(body: impl Into<Bytes>) -> Body {
    Full::new(body.into()).boxed()
}

/// A body that is sent in pieces, chunked, as they come.
pub fn pieces(pieces: impl Stream<Item = Bytes> + Send + Sync + 'static) -> Body {
    BodyExt::boxed(StreamBody::new(pieces.map(|piece| Ok(Frame::data(piece)))))
}

/// Sends a request and reads the whole answer.
///
/// # Errors
/// The connection was refused, or broke off before the answer's end.
///
/// # Panics
/// If the answer is not there after [`ANSWER_TIMEOUT`].
pub async fn send(to: SocketAddr, request: Request<Body>) -> Result<Answer, Broken> {
    let what = format!("{} {}", request.method(), request.uri());
    let answer = async {
        let (head, body) = open(to, request).await?.into_parts();
        Ok(Answer {
            status: head.status,
            headers: head.headers,
            body: body.collect().await?.to_bytes(),
        })
    };
    tokio::time::timeout(ANSWER_TIMEOUT, answer)
        .await
        .unwrap_or_else(|_| panic!("{what} was not answered in {ANSWER_TIMEOUT:?}"))
}

/// Sends a request and returns the answer's head, with a body that is still coming. The connection ends with the body.
///
/// # Errors
/// The connection was refused, or broke off before the head's end.
pub async fn open(to: SocketAddr, mut request: Request<Body>) -> Result<hyper::Response<Incoming>, Broken> {
    let host = to.to_string().parse().expect("an address is a header's value");
    request.headers_mut().entry(HOST).or_insert(host);
    let stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // It ends when the answer has been read, or dropped.
    tokio::spawn(connection);
    Ok(sender.send_request(request).await?)
}

/// `GET path`.
///
/// # Errors
/// As [`send`].
pub async fn get(to: SocketAddr, path: &str) -> Result<Answer, Broken> {
    send(to, request(Method::GET, path).body(whole("")).expect("a request")).await
}

/// `POST path` with a body of a type.
///
/// # Errors
/// As [`send`].
pub async fn post(to: SocketAddr, path: &str, content_type: &str, body: impl Into<Bytes>) -> Result<Answer, Broken> {
    let request = request(Method::POST, path)
        .header(CONTENT_TYPE, content_type)
        .body(whole(body))
        .expect("a request");
    send(to, request).await
}
