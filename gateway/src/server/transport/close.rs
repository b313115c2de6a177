//! Why a WebSocket is closed: codes of RFC 6455 and our own, each with a reason that tells the client when to come back.
//!
//! 4000 to 4499: the client may reconnect. 4500 to 4999: it must not, for it would fail again.

use bytes::{BufMut as _, Bytes, BytesMut};
use serde_json::json;
use tokio_tungstenite::tungstenite::Error as WebSocketError;
use tokio_tungstenite::tungstenite::error::{CapacityError, ProtocolError};

/// A close code and its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Close {
    pub(super) code: u16,
    pub(super) name: &'static str,
    /// Whether the client should come back.
    retry: bool,
}

impl Close {
    /// Not WebSocket as RFC 6455 has it.
    pub(super) const PROTOCOL: Self = Self::new(1002, "protocol", false);
    /// A binary message, where text is spoken.
    pub(super) const TEXT_ONLY: Self = Self::new(1003, "text-only", false);
    /// Text that is not UTF-8.
    pub(super) const NOT_UTF8: Self = Self::new(1007, "not-utf8", false);
    /// A message that is too large.
    pub(super) const TOO_LARGE: Self = Self::new(1009, "too-large", false);
    /// The gateway stops or restarts.
    pub(super) const SHUTDOWN: Self = Self::new(1012, "shutdown", true);
    /// No answer to a ping.
    pub(super) const NO_PONG: Self = Self::new(4001, "no-pong", true);
    /// It asks, and does not read the answers.
    pub(super) const NOT_READING: Self = Self::new(4002, "not-reading", true);
    /// More messages than are allowed.
    pub(super) const TOO_MANY_MESSAGES: Self = Self::new(4003, "too-many-messages", true);
    /// What it has missed must be said to it anew.
    pub(super) const RESUME: Self = Self::new(4004, "resume", true);
    /// A message that is not a command.
    pub(super) const BAD_MESSAGE: Self = Self::new(4501, "bad-message", false);
    /// It did not say `connect` first, or not in time.
    pub(super) const NEVER_CONNECTED: Self = Self::new(4502, "never-connected", false);

    const fn new(code: u16, name: &'static str, retry: bool) -> Self {
        Self { code, name, retry }
    }

    /// What a read error means; `None` when the connection is simply gone.
    pub(super) fn of(error: &WebSocketError) -> Option<Self> {
        match error {
            WebSocketError::Capacity(CapacityError::MessageTooLong { .. }) => Some(Self::TOO_LARGE),
            WebSocketError::Utf8(_) => Some(Self::NOT_UTF8),
            WebSocketError::Protocol(ProtocolError::ResetWithoutClosingHandshake) => None,
            WebSocketError::Protocol(_) | WebSocketError::Capacity(_) => Some(Self::PROTOCOL),
            _ => None,
        }
    }

    /// The close frame. The reason is JSON of at most 123 bytes.
    pub(super) fn frame(self, retry_ms: u64) -> Bytes {
        const FIN_CLOSE: u8 = 0x88;
        let mut reason = json!({"code": self.name});
        if self.retry {
            reason["retry_ms"] = retry_ms.into();
        }
        let reason = reason.to_string();
        let mut frame = BytesMut::with_capacity(reason.len() + 4);
        frame.put_u8(FIN_CLOSE);
        frame.put_u8(reason.len() as u8 + 2);
        frame.put_u16(self.code);
        frame.put_slice(reason.as_bytes());
        frame.freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_close_frame_fits_and_says_when_to_come_back() {
        for close in [
            Close::SHUTDOWN,
            Close::NEVER_CONNECTED,
            Close::TOO_MANY_MESSAGES,
            Close::PROTOCOL,
        ] {
            let frame = close.frame(u64::MAX);
            assert!(frame.len() <= 127 && usize::from(frame[1]) == frame.len() - 2);
            let reason: serde_json::Value = serde_json::from_slice(&frame[4..]).expect("JSON");
            assert_eq!(reason["code"], close.name);
            let should_retry = close.code == 1012 || (4000..4500).contains(&close.code);
            assert_eq!(reason.get("retry_ms").is_some(), should_retry);
        }
    }
}
