//! Says back what it hears, for conformance suites: upgrade, limits, read loop and close codes are those of `/v1/ws`.

use tokio_tungstenite::tungstenite::Message;

use super::Connection;
use crate::server::feed::{web_socket_frame, web_socket_text};

impl Connection {
    pub(super) fn echoing(mut self) -> Self {
        self.echoes = true;
        self.has_connected = true;
        self
    }

    pub(super) fn echo(&mut self, message: &Message) {
        const FIN_BINARY: u8 = 0x82;
        self.pong();
        let frame = match message {
            Message::Text(text) => web_socket_text(text.as_bytes()),
            Message::Binary(bytes) => web_socket_frame(FIN_BINARY, bytes),
            Message::Ping(_) | Message::Pong(_) | Message::Close(_) | Message::Frame(_) => return,
        };
        self.outbox.push_control(frame);
    }
}
