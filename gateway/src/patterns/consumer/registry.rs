//! Which handler an event goes to: by its CloudEvents type, the header `ce_type`, with the JSON value decoded into the handler's
//! own type.
//!
//! Invariant: every record ends in a handler or in an error that names what is wrong with it. One without a type, of a type that
//! nobody asked for, or with another content than its type has, is [`HandlerError::NonRetriable`]: a dead letter.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::sync::Arc;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use serde::de::DeserializeOwned;

use super::{Context, Handler, HandlerError};
use crate::log::Record;

/// The header that says what happened, in CloudEvents' binary mode.
const EVENT_TYPE: &str = "ce_type";

/// Hands each event to the handler of its type. All members of a group have the same, for any of them may get any event.
///
/// ```
/// use barnabas::patterns::consumer::{ConsumerBuilder, Context, EventHandler, HandlerError, Registry};
///
/// #[derive(serde::Deserialize)]
/// struct OrderPlaced {
///     amount: u64,
/// }
///
/// struct Wallet;
///
/// impl EventHandler<OrderPlaced> for Wallet {
///     async fn handle(&self, _: &mut Context, order: OrderPlaced) -> Result<(), HandlerError> {
///         println!("{} to pay", order.amount);
///         Ok(())
///     }
/// }
///
/// # async fn consume(log: &barnabas::log::Log) -> Result<(), barnabas::patterns::Error> {
/// let registry = Registry::new().on::<OrderPlaced>("order.placed", Wallet);
/// let consumer = ConsumerBuilder::new("wallet", ["orders"]).start(log, registry).await?;
/// # consumer.shutdown().await
/// # }
/// ```
#[derive(Default)]
pub struct Registry {
    routes: BTreeMap<String, Box<dyn Route>>,
}

/// Handles events of one type. One that handles several types goes into the registry as an [`Arc`], once for each.
pub trait EventHandler<T>: Send + Sync + 'static {
    /// Does what the event asks for. When it returns `Ok`, the event is done.
    fn handle(&self, context: &mut Context, event: T) -> impl Future<Output = Result<(), HandlerError>> + Send;
}

impl<T: Send + 'static, H: EventHandler<T>> EventHandler<T> for Arc<H> {
    async fn handle(&self, context: &mut Context, event: T) -> Result<(), HandlerError> {
        H::handle(self, context, event).await
    }
}

impl Registry {
    /// No types yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Hands events of this type to `handler`, in the place of an earlier one for it. An event without a value is decoded as JSON's
    /// `null`.
    #[must_use]
    pub fn on<T: DeserializeOwned + Send + 'static>(
        mut self,
        event_type: impl Into<String>,
        handler: impl EventHandler<T>,
    ) -> Self {
        let content = PhantomData::<fn() -> T>;
        self.routes
            .insert(event_type.into(), Box::new(Typed { handler, content }));
        self
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.routes.keys()).finish()
    }
}

impl Handler for Registry {
    async fn handle(&self, context: &mut Context, record: &Record) -> Result<(), HandlerError> {
        let Some(event_type) = record.headers.last_str(EVENT_TYPE) else {
            return Err(HandlerError::non_retriable(format!(
                "the event has no type: header {EVENT_TYPE} is missing or not UTF-8"
            )));
        };
        let Some(route) = self.routes.get(event_type) else {
            return Err(HandlerError::non_retriable(format!(
                "events of type {event_type} are not known here"
            )));
        };
        match route.handle(context, record.value.as_deref().unwrap_or(b"null")) {
            Ok(handling) => handling.await,
            Err(error) => Err(HandlerError::non_retriable(format!(
                "the event of type {event_type} cannot be decoded: {error}"
            ))),
        }
    }
}

/// A handler, whatever its type of event.
trait Route: Send + Sync {
    /// # Errors
    /// The value is none of the handler's type.
    fn handle<'a>(&'a self, context: &'a mut Context, value: &[u8]) -> serde_json::Result<Handling<'a>>;
}

type Handling<'a> = BoxFuture<'a, Result<(), HandlerError>>;

struct Typed<T, H> {
    handler: H,
    content: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned + Send + 'static, H: EventHandler<T>> Route for Typed<T, H> {
    fn handle<'a>(&'a self, context: &'a mut Context, value: &[u8]) -> serde_json::Result<Handling<'a>> {
        let event: T = serde_json::from_slice(value)?;
        Ok(self.handler.handle(context, event).boxed())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use bytes::Bytes;
    use serde::Deserialize;

    use super::*;
    use crate::log::{Headers, TopicPartition};

    #[derive(Deserialize)]
    struct Placed {
        order: u32,
    }

    #[derive(Deserialize)]
    struct Cancelled {
        order: u32,
        reason: String,
    }

    #[derive(Default)]
    struct Notes(Mutex<Vec<String>>);

    impl Notes {
        fn note(&self, text: String) {
            self.0.lock().expect("no panic").push(text);
        }
    }

    impl EventHandler<Placed> for Notes {
        async fn handle(&self, _: &mut Context, event: Placed) -> Result<(), HandlerError> {
            self.note(format!("{} placed", event.order));
            Ok(())
        }
    }

    impl EventHandler<Cancelled> for Notes {
        async fn handle(&self, _: &mut Context, event: Cancelled) -> Result<(), HandlerError> {
            self.note(format!("{} cancelled: {}", event.order, event.reason));
            Err(HandlerError::retriable("the bank is away"))
        }
    }

    impl EventHandler<()> for Notes {
        async fn handle(&self, _: &mut Context, (): ()) -> Result<(), HandlerError> {
            self.note("the day is over".to_owned());
            Ok(())
        }
    }

    /// Handles one event, and returns what was noted and what the error says.
    async fn handle(event_type: Option<Bytes>, value: Option<&'static str>) -> (Vec<String>, Result<(), HandlerError>) {
        let notes = Arc::new(Notes::default());
        let registry = Registry::new()
            .on::<Placed>("order.placed", notes.clone())
            .on::<Cancelled>("order.cancelled", notes.clone())
            .on::<()>("day.over", notes.clone());
        let record = Record {
            offset: 0,
            timestamp_ms: 0,
            key: None,
            value: value.map(Bytes::from),
            headers: event_type.map_or_else(Headers::new, |event_type| Headers::new().with(EVENT_TYPE, event_type)),
        };
        let mut context = Context::new(TopicPartition::new("orders", 0));
        let ended = registry.handle(&mut context, &record).await;
        let noted = std::mem::take(&mut *notes.0.lock().expect("no panic"));
        (noted, ended)
    }

    async fn dead_letter(event_type: Option<Bytes>, value: Option<&'static str>) -> String {
        match handle(event_type, value).await {
            (noted, Err(HandlerError::NonRetriable(cause))) if noted.is_empty() => cause.to_string(),
            other => panic!("{other:?} is no dead letter"),
        }
    }

    #[tokio::test]
    async fn each_event_goes_to_the_handler_of_its_type() {
        let (noted, ended) = handle(Some("order.placed".into()), Some(r#"{"order":7}"#)).await;
        assert_eq!(noted, ["7 placed"]);
        assert!(ended.is_ok());
        let (noted, ended) = handle(
            Some("order.cancelled".into()),
            Some(r#"{"order":7,"reason":"too late"}"#),
        )
        .await;
        assert_eq!(noted, ["7 cancelled: too late"]);
        assert!(
            matches!(ended, Err(HandlerError::Retriable(_))),
            "what a handler says is passed on"
        );
        let (noted, _) = handle(Some("day.over".into()), None).await;
        assert_eq!(noted, ["the day is over"], "an event needs no value");
    }

    #[tokio::test]
    async fn what_no_handler_can_take_is_a_dead_letter_that_says_why() {
        assert_eq!(
            dead_letter(None, Some("{}")).await,
            "the event has no type: header ce_type is missing or not UTF-8"
        );
        assert_eq!(
            dead_letter(Some(Bytes::from_static(b"\xff")), Some("{}")).await,
            "the event has no type: header ce_type is missing or not UTF-8"
        );
        assert_eq!(
            dead_letter(Some("order.lost".into()), Some("{}")).await,
            "events of type order.lost are not known here"
        );
        assert_eq!(
            dead_letter(Some("order.cancelled".into()), Some(r#"{"order":7}"#)).await,
            "the event of type order.cancelled cannot be decoded: missing field `reason` at line 1 column 11"
        );
        let without_value = dead_letter(Some("order.placed".into()), None).await;
        assert!(
            without_value.starts_with("the event of type order.placed cannot be decoded: invalid type: null"),
            "{without_value}"
        );
        let not_json = dead_letter(Some("order.placed".into()), Some("{")).await;
        assert!(not_json.contains("order.placed cannot be decoded: EOF"), "{not_json}");
    }
}
