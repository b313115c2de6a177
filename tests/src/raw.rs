//! Bytes to a gateway as they are, for what no proper client would send.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// What is given up by then is not borne for ever. Longer than every deadline of a gateway.
pub const SOON: Duration = Duration::from_secs(30);

/// Sends bytes and returns what comes until the gateway closes.
///
/// # Panics
/// If it does not within [`SOON`].
pub async fn exchange(to: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(to).await.expect("a connection");
    // The gateway may have refused before everything is sent.
    let _ = stream.write_all(bytes).await;
    read_to_close(stream).await
}

/// What comes until the gateway closes.
///
/// # Panics
/// If it does not within [`SOON`].
pub async fn read_to_close(mut stream: TcpStream) -> Vec<u8> {
    let mut answer = Vec::new();
    let read = tokio::time::timeout(SOON, stream.read_to_end(&mut answer)).await;
    let said = || String::from_utf8_lossy(&answer).into_owned();
    // A reset is an end as well as any.
    let _ = read.unwrap_or_else(|_| panic!("it was not closed in {SOON:?}; it said {:?}", said()));
    answer
}

/// The status in an answer's first line; 0 if there is none.
pub fn status_of(answer: &[u8]) -> u16 {
    let line = String::from_utf8_lossy(answer);
    line.split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .unwrap_or(0)
}
