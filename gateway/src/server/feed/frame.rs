//! An event as each transport writes it, made once and shared by all who get it.

use std::fmt::Write as _;
use std::sync::OnceLock;

use bytes::{BufMut as _, Bytes, BytesMut};
use serde_json::value::RawValue;

use super::super::event::{Event, rfc3339};

/// How a transport writes events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// A WebSocket text frame around `{"event":…}`.
    WebSocket,
    /// A message of an event stream.
    Sse,
    /// The JSON object alone.
    Json,
}

/// One event, ready to be sent.
#[derive(Debug)]
pub(crate) struct Frame {
    /// Where it stands in its partition.
    pub(crate) offset: i64,
    token: String,
    json: Bytes,
    web_socket: OnceLock<Bytes>,
    sse: OnceLock<Bytes>,
}

impl Frame {
    pub(crate) fn new(offset: i64, token: String, event: &Event) -> Self {
        let json = Bytes::from(to_json(event, &token));
        Self {
            offset,
            token,
            json,
            web_socket: OnceLock::new(),
            sse: OnceLock::new(),
        }
    }

    /// The event as one transport writes it.
    pub(crate) fn bytes(&self, format: Format) -> &Bytes {
        match format {
            Format::WebSocket => self.web_socket.get_or_init(|| {
                let mut payload = BytesMut::with_capacity(self.json.len() + 10);
                payload.put_slice(b"{\"event\":");
                payload.put_slice(&self.json);
                payload.put_slice(b"}");
                web_socket_text(&payload)
            }),
            Format::Sse => self.sse.get_or_init(|| self.sse_with_id(&self.token)),
            Format::Json => &self.json,
        }
    }

    /// The event as a message of an event stream, under another token than its own: that of a stream of several channels.
    pub(crate) fn sse_with_id(&self, id: &str) -> Bytes {
        sse_message("event", Some(id), &self.json)
    }
}

/// A message of an event stream. `data` has no line breaks.
pub(crate) fn sse_message(event: &str, id: Option<&str>, data: &[u8]) -> Bytes {
    let mut message = BytesMut::with_capacity(data.len() + 64);
    message.put_slice(b"event: ");
    message.put_slice(event.as_bytes());
    if let Some(id) = id {
        message.put_slice(b"\nid: ");
        message.put_slice(id.as_bytes());
    }
    message.put_slice(b"\ndata: ");
    message.put_slice(data);
    message.put_slice(b"\n\n");
    message.freeze()
}

/// The id of an event stream, without a message: where a client that comes back goes on.
pub(crate) fn sse_id(id: &str) -> Bytes {
    format!("id: {id}\n\n").into()
}

/// A text frame.
pub(crate) fn web_socket_text(payload: &[u8]) -> Bytes {
    const FIN_TEXT: u8 = 0x81;
    web_socket_frame(FIN_TEXT, payload)
}

/// An unmasked frame as servers send them (RFC 6455, section 5.2).
pub(crate) fn web_socket_frame(first_byte: u8, payload: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(payload.len() + 10);
    frame.put_u8(first_byte);
    match payload.len() {
        length @ 0..126 => frame.put_u8(length as u8),
        length @ 126..65_536 => {
            frame.put_u8(126);
            frame.put_u16(length as u16);
        }
        length => {
            frame.put_u8(127);
            frame.put_u64(length as u64);
        }
    }
    frame.put_slice(payload);
    frame.freeze()
}

/// The event as browsers get it: CloudEvents' names, on one line.
fn to_json(event: &Event, token: &str) -> String {
    let data = event.data.as_deref().map_or("null", RawValue::get);
    let mut json = String::with_capacity(data.len() + 192);
    let mut member = |name: &str, value: &str| {
        json.push(if json.is_empty() { '{' } else { ',' });
        json.push('"');
        json.push_str(name);
        json.push_str("\":");
        push_json_string(&mut json, value);
    };
    member("channel", &event.channel);
    member("token", token);
    member("id", &event.id);
    member("type", &event.event_type);
    member("time", &rfc3339(event.time_ms));
    if let Some(subject) = &event.subject {
        member("subject", subject);
    }
    if event.data.is_some() {
        json.push_str(",\"data\":");
        // Line breaks stand only between JSON's tokens, never within a string, so that they can be blanks.
        json.extend(data.chars().map(|c| if matches!(c, '\n' | '\r') { ' ' } else { c }));
    }
    json.push('}');
    json
}

fn push_json_string(json: &mut String, text: &str) {
    json.push('"');
    for c in text.chars() {
        match c {
            '"' => json.push_str("\\\""),
            '\\' => json.push_str("\\\\"),
            c if c < ' ' || c == '\u{7f}' => {
                // Writing to a String cannot fail.
                let _ = write!(json, "\\u{:04x}", u32::from(c));
            }
            c => json.push(c),
        }
    }
    json.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame() -> Frame {
        let mut event = Event::new("c", "quote \" and \\ and \n");
        event.data = Some(RawValue::from_string("{\n  \"a\": \"x\\ny\"\r\n}".to_owned()).expect("JSON"));
        Frame::new(7, "tok".to_owned(), &event)
    }

    #[test]
    fn an_event_is_one_line_of_json() {
        let frame = frame();
        let json = std::str::from_utf8(frame.bytes(Format::Json)).expect("UTF-8");
        assert!(!json.contains(['\n', '\r']));
        let value: serde_json::Value = serde_json::from_str(json).expect("JSON");
        assert_eq!(value["type"], "quote \" and \\ and \n");
        assert_eq!(value["data"]["a"], "x\ny");
        assert_eq!((&value["channel"], &value["token"]), (&"c".into(), &"tok".into()));
        assert!(value.get("subject").is_none());
    }

    #[test]
    fn a_message_of_an_event_stream_carries_the_token_as_its_id() {
        let frame = frame();
        let text = std::str::from_utf8(frame.bytes(Format::Sse)).expect("UTF-8");
        let lines: Vec<&str> = text.split('\n').collect();
        assert_eq!(lines[..2], ["event: event", "id: tok"]);
        assert!(lines[2].starts_with("data: {"));
        assert_eq!(lines[3..], ["", ""]);
        assert!(frame.sse_with_id("all").starts_with(b"event: event\nid: all\n"));
    }

    #[test]
    fn frames_of_every_length_say_their_length() {
        for (length, header) in [(5, 2), (125, 2), (126, 4), (65_535, 4), (65_536, 10)] {
            let frame = web_socket_text(&vec![b'x'; length]);
            assert_eq!((frame.len(), frame[0]), (length + header, 0x81));
        }
    }
}
