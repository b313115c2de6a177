//! What is on its way to one client, for every transport: a bounded queue of bytes that are shared with other clients.
//!
//! The publisher pushes; with a socket in hand it writes at once while nothing waits ([`Outbox::with_socket`]), so most pushes
//! never touch the queue. What a write leaves over stands first in the queue, and the connection's own task goes on from there.
//! A full queue takes nothing more: its subscriptions fall behind and are fed from the log when there is room again.
//!
//! Invariant: bytes leave in the order in which they were pushed, each once.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::{Buf, Bytes};
use tokio::net::TcpStream;
use tokio::sync::Notify;

/// A queue to one client.
#[derive(Debug)]
pub(crate) struct Outbox {
    socket: Option<Arc<TcpStream>>,
    limits: Limits,
    queue: Mutex<Queue>,
}

/// When a queue is full.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Bytes that may wait. One piece is always taken by an empty queue, however large.
    pub(crate) bytes: usize,
    /// Pieces that may wait.
    pub(crate) pieces: usize,
}

#[derive(Debug, Default)]
struct Queue {
    pieces: VecDeque<Bytes>,
    bytes: usize,
    closed: bool,
    /// The task that takes from the queue, while it waits.
    taker: Option<Waker>,
    /// Who has more to push when there is room again.
    refused: Vec<Arc<Notify>>,
}

/// What became of a push.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pushed {
    /// It is written or waits.
    Taken,
    /// There is no room; nothing of it was taken.
    Full,
    /// The client is gone.
    Closed,
}

impl Queue {
    /// Remembers who has more to push.
    fn refuse(&mut self, more: &Arc<Notify>) {
        if !self.refused.iter().any(|known| Arc::ptr_eq(known, more)) {
            self.refused.push(more.clone());
        }
    }
}

impl Outbox {
    /// A queue that somebody takes from.
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            socket: None,
            limits,
            queue: Mutex::default(),
        }
    }

    /// A queue in front of a socket that is written to directly.
    pub(crate) fn with_socket(limits: Limits, socket: Arc<TcpStream>) -> Self {
        Self {
            socket: Some(socket),
            limits,
            queue: Mutex::default(),
        }
    }

    /// Hands bytes over. `more` is notified when there is room again after [`Pushed::Full`].
    pub(crate) fn push(&self, bytes: Bytes, more: &Arc<Notify>) -> Pushed {
        let mut queue = self.queue();
        if queue.closed {
            return Pushed::Closed;
        }
        let is_over = queue.bytes + bytes.len() > self.limits.bytes || queue.pieces.len() >= self.limits.pieces;
        if is_over && !queue.pieces.is_empty() {
            queue.refuse(more);
            return Pushed::Full;
        }
        self.write_or_queue(queue, bytes)
    }

    /// Hands over what the transport itself has to say, limits or not: answers, heartbeats, farewells. A transport whose client
    /// can ask for ever more answers ends it when [`Outbox::is_flooded`].
    pub(crate) fn push_control(&self, bytes: Bytes) -> Pushed {
        let queue = self.queue();
        if queue.closed {
            return Pushed::Closed;
        }
        self.write_or_queue(queue, bytes)
    }

    /// Hands over the very last, also after the queue was closed.
    pub(crate) fn push_farewell(&self, bytes: Bytes) {
        self.write_or_queue(self.queue(), bytes);
    }

    fn write_or_queue(&self, mut queue: MutexGuard<'_, Queue>, mut bytes: Bytes) -> Pushed {
        if let Some(socket) = &self.socket
            && queue.pieces.is_empty()
        {
            match socket.try_write(&bytes) {
                Ok(written) => bytes.advance(written),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // The connection's task sees the same error and ends; what it would have sent is lost with it.
                Err(_) => queue.closed = true,
            }
            if bytes.is_empty() {
                return Pushed::Taken;
            }
        }
        queue.bytes += bytes.len();
        queue.pieces.push_back(bytes);
        let taker = queue.taker.take();
        drop(queue);
        if let Some(taker) = taker {
            taker.wake();
        }
        Pushed::Taken
    }

    /// Takes the next piece; `None` once the queue is closed and empty.
    pub(crate) fn poll_take(&self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let mut queue = self.queue();
        let Some(piece) = queue.pieces.pop_front() else {
            if queue.closed {
                return Poll::Ready(None);
            }
            queue.taker = Some(cx.waker().clone());
            return Poll::Pending;
        };
        queue.bytes -= piece.len();
        self.wake_refused(&mut queue);
        Poll::Ready(Some(piece))
    }

    /// Takes the next piece; `None` once the queue is closed and empty. Cancel safe.
    pub(crate) async fn take(&self) -> Option<Bytes> {
        std::future::poll_fn(|cx| self.poll_take(cx)).await
    }

    /// Waits until something is queued, or the queue closed. Cancel safe.
    pub(crate) async fn waits(&self) {
        std::future::poll_fn(|cx| {
            let mut queue = self.queue();
            if queue.pieces.is_empty() && !queue.closed {
                queue.taker = Some(cx.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(())
        })
        .await;
    }

    /// Writes what is queued as far as the socket takes it. Returns whether that was all.
    ///
    /// # Errors
    /// Those of the socket; there is nothing more to be sent then.
    pub(crate) fn flush(&self) -> io::Result<bool> {
        let Some(socket) = &self.socket else { return Ok(true) };
        let mut queue = self.queue();
        while let Some(piece) = queue.pieces.front_mut() {
            match socket.try_write(piece) {
                Ok(written) => {
                    piece.advance(written);
                    if piece.is_empty() {
                        queue.pieces.pop_front();
                    }
                    queue.bytes -= written;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wake_refused(&mut queue);
                    return Ok(false);
                }
                Err(error) => {
                    queue.closed = true;
                    return Err(error);
                }
            }
        }
        self.wake_refused(&mut queue);
        Ok(true)
    }

    /// Takes nothing more. What is queued can still be taken.
    pub(crate) fn close(&self) {
        let mut queue = self.queue();
        queue.closed = true;
        let taker = queue.taker.take();
        let refused = std::mem::take(&mut queue.refused);
        drop(queue);
        if let Some(taker) = taker {
            taker.wake();
        }
        refused.iter().for_each(|more| more.notify_one());
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.queue().closed
    }

    /// Whether the queue is half empty, so that it is worth feeding. If not, `more` is notified when it is.
    pub(crate) fn has_room(&self, more: &Arc<Notify>) -> bool {
        let mut queue = self.queue();
        let has_room = self.is_half_empty(&queue);
        if !has_room {
            queue.refuse(more);
        }
        has_room
    }

    /// Whether twice as much waits as may be pushed: what the transport had to say itself is as much as all the events.
    pub(crate) fn is_flooded(&self) -> bool {
        self.queue().bytes > 2 * self.limits.bytes
    }

    fn is_half_empty(&self, queue: &Queue) -> bool {
        queue.bytes <= self.limits.bytes / 2 && queue.pieces.len() <= self.limits.pieces / 2
    }

    fn wake_refused(&self, queue: &mut Queue) {
        if self.is_half_empty(queue) {
            std::mem::take(&mut queue.refused)
                .iter()
                .for_each(|more| more.notify_one());
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { bytes: 10, pieces: 4 };

    #[tokio::test]
    async fn a_full_queue_refuses_and_tells_when_there_is_room() {
        let (outbox, more) = (Outbox::new(LIMITS), Arc::new(Notify::new()));
        assert_eq!(
            outbox.push(Bytes::from_static(b"larger than all"), &more),
            Pushed::Taken
        );
        assert_eq!(outbox.push(Bytes::from_static(b"x"), &more), Pushed::Full);
        assert_eq!(outbox.push_control(Bytes::from_static(b"!")), Pushed::Taken);
        assert_eq!(outbox.take().await.as_deref(), Some(&b"larger than all"[..]));
        more.notified().await;
        assert!(outbox.has_room(&more));
        assert_eq!(outbox.push(Bytes::from_static(b"x"), &more), Pushed::Taken);
        outbox.close();
        assert_eq!(outbox.push(Bytes::from_static(b"y"), &more), Pushed::Closed);
        assert_eq!(outbox.take().await.as_deref(), Some(&b"!"[..]));
        assert_eq!(outbox.take().await.as_deref(), Some(&b"x"[..]));
        assert_eq!(outbox.take().await, None);
    }

    #[tokio::test]
    async fn who_finds_no_room_is_told_of_it_although_nothing_was_refused() {
        let (outbox, more) = (Outbox::new(LIMITS), Arc::new(Notify::new()));
        assert_eq!(outbox.push(Bytes::from_static(b"more than half"), &more), Pushed::Taken);
        assert!(!outbox.has_room(&more));
        outbox.take().await;
        more.notified().await;
        assert!(outbox.has_room(&more));
    }

    #[tokio::test]
    async fn a_farewell_is_the_last_of_a_closed_queue() {
        let (outbox, more) = (Outbox::new(LIMITS), Arc::new(Notify::new()));
        outbox.push(Bytes::from_static(b"x"), &more);
        outbox.close();
        outbox.push_farewell(Bytes::from_static(b"bye"));
        assert_eq!(outbox.take().await.as_deref(), Some(&b"x"[..]));
        assert_eq!(outbox.take().await.as_deref(), Some(&b"bye"[..]));
        assert_eq!(outbox.take().await, None);
    }

    #[tokio::test]
    async fn a_socket_gets_every_byte_in_order_however_slowly_it_reads() {
        use tokio::io::AsyncReadExt as _;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let mut client = TcpStream::connect(listener.local_addr().expect("an address"))
            .await
            .expect("a connection");
        let socket = Arc::new(listener.accept().await.expect("a connection").0);
        let outbox = Outbox::with_socket(
            Limits {
                bytes: 64 * 1024 * 1024,
                pieces: usize::MAX,
            },
            socket.clone(),
        );
        let more = Arc::new(Notify::new());
        let expected: Vec<u8> = (0..8 * 1024 * 1024u32).map(|i| (i / 1000) as u8).collect();
        for piece in expected.chunks(100_000) {
            assert_eq!(outbox.push(Bytes::copy_from_slice(piece), &more), Pushed::Taken);
        }
        let reading = tokio::spawn(async move {
            let mut read = Vec::new();
            client.read_to_end(&mut read).await.expect("bytes");
            read
        });
        while !outbox.flush().expect("written") {
            socket.writable().await.expect("writable");
        }
        drop((outbox, socket));
        assert!(reading.await.expect("read") == expected);
    }
}
