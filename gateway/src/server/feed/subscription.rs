//! One client's interest in one channel, and how far it has been served.
//!
//! A subscription is *live* (the feed pushes to it) or *behind* (the replay of its partition does). `next` is the offset up to
//! which everything of the channel was pushed. Why nothing is lost or doubled when it changes from one to the other:
//! - The feed first says how far it has come (`dispatched`), then goes over the subscribers. A subscription goes live only
//!   under its lock and only if `next >= dispatched`. So a batch that the feed has not said yet will find it live, and one that
//!   it has said is either below `next` or keeps the subscription behind.
//! - The replay may have read further than the feed has come. Then a batch comes with events below `next`: they are passed over.
//! - When the outbox is full, nothing of the batch counts as pushed: the subscription is behind with `next` at the first event
//!   that was not taken, and costs nothing but itself until its client reads on.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};

use super::Gap;
use super::frame::{Format, Frame};
use super::partition::Partition;
use crate::log::{NextOffset, TopicId};
use crate::server::outbox::{Outbox, Pushed};
use crate::server::token::Token;

/// A subscription.
#[derive(Debug)]
pub(crate) struct Subscription {
    pub(super) channel: Arc<str>,
    pub(super) partition: Arc<Partition>,
    outbox: Arc<Outbox>,
    format: Format,
    /// The stream's token, when it covers several channels.
    cover: Option<(Arc<Cover>, usize)>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    next: i64,
    mode: Mode,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Live,
    Behind,
    Ended,
}

/// Events of one channel that came together, and the bytes that all its subscribers share.
#[derive(Debug)]
pub(super) struct Burst {
    pub(super) frames: Vec<Frame>,
    /// Where the batch that they came in begins.
    pub(super) from: i64,
    /// Where it ends.
    pub(super) next: i64,
    web_socket: std::sync::OnceLock<Bytes>,
    sse: std::sync::OnceLock<Bytes>,
}

impl Burst {
    pub(super) fn new(frames: Vec<Frame>, from: i64, next: i64) -> Self {
        Self {
            frames,
            from,
            next,
            web_socket: std::sync::OnceLock::new(),
            sse: std::sync::OnceLock::new(),
        }
    }

    /// All events in one piece; `None` for a format in which each stands alone.
    fn joined(&self, format: Format) -> Option<&Bytes> {
        let cell = match format {
            Format::WebSocket => &self.web_socket,
            Format::Sse => &self.sse,
            Format::Json => return None,
        };
        Some(cell.get_or_init(|| match self.frames.as_slice() {
            [one] => one.bytes(format).clone(),
            frames => {
                let mut joined = BytesMut::with_capacity(frames.iter().map(|frame| frame.bytes(format).len()).sum());
                frames
                    .iter()
                    .for_each(|frame| joined.extend_from_slice(frame.bytes(format)));
                joined.freeze()
            }
        }))
    }
}

impl Subscription {
    /// A subscription that is behind: whoever makes it sees to it that it is replayed or goes live.
    pub(super) fn new(
        channel: Arc<str>,
        partition: Arc<Partition>,
        next: i64,
        outbox: Arc<Outbox>,
        format: Format,
        cover: Option<(Arc<Cover>, usize)>,
    ) -> Self {
        let state = Mutex::new(State {
            next,
            mode: Mode::Behind,
        });
        Self {
            channel,
            partition,
            outbox,
            format,
            cover,
            state,
        }
    }

    /// From the feed: events that have just come.
    pub(super) fn deliver(self: &Arc<Self>, burst: &Burst) {
        let mut state = self.state();
        let (Mode::Live, Some(first)) = (state.mode, burst.frames.first()) else {
            return;
        };
        if let Some((cover, _)) = &self.cover {
            cover.reach(self.partition.number, burst.from);
        }
        let is_whole = state.next <= first.offset && self.cover.is_none();
        let pushed = match burst.joined(self.format) {
            Some(bytes) if is_whole => match self.outbox.push(bytes.clone(), &self.partition.behind_changed) {
                Pushed::Full => {
                    state.next = first.offset;
                    Pushed::Full
                }
                pushed => pushed,
            },
            _ => self.push_each(&mut state, &burst.frames),
        };
        match pushed {
            Pushed::Taken => state.next = state.next.max(burst.next),
            Pushed::Full => {
                state.mode = Mode::Behind;
                self.cover_live(false);
                drop(state);
                self.partition.fall_behind(self.clone());
            }
            Pushed::Closed => state.mode = Mode::Ended,
        }
    }

    /// From the replay: the next event of the channel. Returns whether it can take what follows.
    pub(super) fn replay(&self, frame: &Frame) -> bool {
        let mut state = self.state();
        if state.mode != Mode::Behind {
            return false;
        }
        let pushed = self.push_each(&mut state, std::slice::from_ref(frame));
        if pushed == Pushed::Closed {
            state.mode = Mode::Ended;
        }
        pushed == Pushed::Taken
    }

    /// From the replay: there is nothing more of the channel before `next`.
    pub(super) fn replayed_to(&self, next: i64) {
        let mut state = self.state();
        if state.mode == Mode::Behind {
            state.next = state.next.max(next);
            self.cover_to(state.next);
        }
    }

    /// Pushes what is not pushed yet, event by event; on [`Pushed::Full`] `next` is the first that was not taken.
    fn push_each(&self, state: &mut State, frames: &[Frame]) -> Pushed {
        let from = state.next;
        for frame in frames.iter().filter(|frame| frame.offset >= from) {
            let bytes = match &self.cover {
                Some((cover, _)) if self.format == Format::Sse => {
                    self.cover_to(frame.offset + 1);
                    frame.sse_with_id(&cover.token().to_string())
                }
                _ => frame.bytes(self.format).clone(),
            };
            match self.outbox.push(bytes, &self.partition.behind_changed) {
                Pushed::Taken => state.next = frame.offset + 1,
                Pushed::Full => {
                    state.next = frame.offset;
                    self.cover_to(frame.offset);
                    return Pushed::Full;
                }
                Pushed::Closed => return Pushed::Closed,
            }
        }
        Pushed::Taken
    }

    /// Goes live if it has caught up with the feed. Returns whether it needs the replay no longer.
    pub(super) fn try_go_live(&self) -> bool {
        let mut state = self.state();
        if state.mode == Mode::Behind && self.outbox.is_closed() {
            state.mode = Mode::Ended;
        }
        // While the partition is not fed there is nothing to be live with; the replay goes on.
        if state.mode == Mode::Behind && self.partition.is_fed() && state.next >= self.partition.dispatched() {
            state.mode = Mode::Live;
            self.cover_live(true);
        }
        state.mode != Mode::Behind
    }

    /// The offset to replay from, if its client can take something now.
    pub(super) fn wants(&self) -> Option<i64> {
        let state = self.state();
        (state.mode == Mode::Behind && self.outbox.has_room(&self.partition.behind_changed)).then_some(state.next)
    }

    /// Says that the events before `start` are gone, and goes on from there.
    pub(super) fn skip_to(&self, start: i64, gap: impl FnOnce(i64) -> Gap) {
        let mut state = self.state();
        if state.mode == Mode::Behind && state.next < start {
            let gap = gap(state.next);
            self.outbox
                .push_control(gap.write(&self.channel, self.format, self.cover.is_none()));
            state.next = start;
            self.cover_to(start);
        }
    }

    /// Ends it where it stands, and the client's connection too.
    pub(super) fn send_away(&self) {
        self.end();
        self.outbox.close();
    }

    pub(super) fn is_live(&self) -> bool {
        self.state().mode == Mode::Live
    }

    /// Ends it, and returns up to where everything was pushed.
    pub(super) fn end(&self) -> i64 {
        let mut state = self.state();
        // To a live one belongs all that the feed is done with, whether or not there was something for it.
        if std::mem::replace(&mut state.mode, Mode::Ended) == Mode::Live {
            state.next = state.next.max(self.partition.completed());
        }
        state.next
    }

    fn cover_live(&self, is_live: bool) {
        if let Some((cover, index)) = &self.cover {
            cover.set_live(*index, is_live);
        }
    }

    fn cover_to(&self, next: i64) {
        if let Some((cover, index)) = &self.cover {
            cover.set(*index, next);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The positions of a stream of several channels. Its token resumes all of them.
#[derive(Debug)]
pub(crate) struct Cover {
    topic_id: TopicId,
    places: Mutex<Vec<Place>>,
}

/// How far one channel of a stream is.
#[derive(Clone, Copy, Debug)]
struct Place {
    partition: i32,
    next: i64,
    is_live: bool,
}

impl Cover {
    pub(crate) fn new(topic_id: TopicId, positions: impl IntoIterator<Item = (i32, i64)>) -> Self {
        let place = |(partition, next)| Place {
            partition,
            next,
            is_live: false,
        };
        Self {
            topic_id,
            places: Mutex::new(positions.into_iter().map(place).collect()),
        }
    }

    /// The lowest position of each partition: two channels of one partition stand apart within a batch and while one is
    /// replayed, and what the other has seen already comes again then rather than never.
    pub(crate) fn token(&self) -> Token {
        let mut lowest = BTreeMap::new();
        for Place { partition, next, .. } in self.places().iter() {
            let lowest = lowest.entry(*partition).or_insert(NextOffset(*next));
            *lowest = NextOffset(*next).min(*lowest);
        }
        Token::of(self.topic_id, lowest)
    }

    /// The feed has come to a batch that begins at `from`: so have all live channels of the partition.
    fn reach(&self, partition: i32, from: i64) {
        let mut places = self.places();
        for place in places
            .iter_mut()
            .filter(|place| place.partition == partition && place.is_live)
        {
            place.next = place.next.max(from);
        }
    }

    fn set(&self, index: usize, next: i64) {
        if let Some(place) = self.places().get_mut(index) {
            place.next = next;
        }
    }

    fn set_live(&self, index: usize, is_live: bool) {
        if let Some(place) = self.places().get_mut(index) {
            place.is_live = is_live;
        }
    }

    fn places(&self) -> MutexGuard<'_, Vec<Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::outbox::Limits;

    #[test]
    fn one_that_is_sent_away_ends_where_it_stood_wherever_the_feed_goes_on() {
        let partition = Arc::new(Partition::new(0, 0));
        partition.publish_completed(5);
        partition.publish_dispatched(5);
        let limits = Limits { bytes: 100, pieces: 10 };
        let outbox = Arc::new(Outbox::new(limits));
        let subscription = Subscription::new("c".into(), partition.clone(), 5, outbox, Format::Json, None);
        assert!(subscription.try_go_live());
        partition.publish_completed(7);
        subscription.send_away();
        partition.publish_completed(20);
        assert_eq!(subscription.end(), 7);
    }
}
