//! What a client can say: frames of one command each, several of them in one message, one a line.

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::server::event::PlainEvent;

/// A command.
#[derive(Debug)]
pub(super) enum Command {
    /// `{}`: the answer to a ping, or one of the client's own.
    Pong,
    Connect,
    Subscribe(Subscribe),
    Unsubscribe(Unsubscribe),
    Publish(Publish),
    Refresh,
}

/// Who the client is. Nobody has to say so while there is no authentication.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Connect {
    /// Accepted so that clients need not know how a gateway is set up.
    #[serde(rename = "jwt")]
    _jwt: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Subscribe {
    pub(super) channel: String,
    pub(super) after: Option<String>,
    pub(super) since: Option<String>,
    pub(super) last: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Unsubscribe {
    pub(super) channel: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Publish {
    channel: String,
    #[serde(rename = "type")]
    event_type: String,
    data: Option<Box<RawValue>>,
    id: Option<String>,
    subject: Option<String>,
}

impl Publish {
    /// The channel and the event.
    pub(super) fn into_parts(self) -> (String, PlainEvent) {
        let Self {
            channel,
            event_type,
            data,
            id,
            subject,
        } = self;
        (
            channel,
            PlainEvent {
                event_type,
                data,
                id,
                subject,
            },
        )
    }
}

/// A frame as it comes.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Frame {
    id: Option<u64>,
    connect: Option<Connect>,
    subscribe: Option<Subscribe>,
    unsubscribe: Option<Unsubscribe>,
    publish: Option<Publish>,
    refresh: Option<Connect>,
}

/// Text that is not a command.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BadCommand;

/// The commands of a message with their ids.
pub(super) fn read_commands(text: &str) -> impl Iterator<Item = Result<(Option<u64>, Command), BadCommand>> + '_ {
    text.lines().map(|line| {
        let Frame {
            id,
            connect,
            subscribe,
            unsubscribe,
            publish,
            refresh,
        } = serde_json::from_str(line).map_err(|_| BadCommand)?;
        let command = match (connect, subscribe, unsubscribe, publish, refresh) {
            (None, None, None, None, None) if id.is_none() => Command::Pong,
            (Some(_), None, None, None, None) => Command::Connect,
            (None, Some(subscribe), None, None, None) => Command::Subscribe(subscribe),
            (None, None, Some(unsubscribe), None, None) => Command::Unsubscribe(unsubscribe),
            (None, None, None, Some(publish), None) => Command::Publish(publish),
            (None, None, None, None, Some(_)) => Command::Refresh,
            _ => return Err(BadCommand),
        };
        Ok((id, command))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_commands_share_a_message() {
        let text = "{\"id\":1,\"connect\":{}}\n{\"id\":2,\"subscribe\":{\"channel\":\"c\",\"last\":1}}\n{}";
        let commands: Vec<_> = read_commands(text).map(|command| command.expect("a command")).collect();
        assert!(matches!(&commands[0], (Some(1), Command::Connect)));
        assert!(
            matches!(&commands[1], (Some(2), Command::Subscribe(ask)) if ask.channel == "c" && ask.last == Some(1))
        );
        assert!(matches!(&commands[2], (None, Command::Pong)));
    }

    #[test]
    fn what_is_not_one_command_is_refused() {
        for text in [
            "x",
            "[]",
            "{\"id\":1}",
            "{\"id\":1,\"subscribe\":{}}",
            "{\"id\":1,\"subscribe\":{\"channel\":\"c\",\"afer\":\"t\"}}",
            "{\"id\":1,\"connect\":{},\"unsubscribe\":{\"channel\":\"c\"}}",
            "{\"id\":1,\"jump\":{}}",
        ] {
            assert!(read_commands(text).any(|command| command.is_err()), "{text}");
        }
    }
}
