//! A proxy before a Kafka broker that cuts connections between a request and its answer: the broker has done what it was asked for,
//! and the client cannot know.
//!
//! ```text
//! client ── request ──▶ cutter ── request ──▶ broker
//!        ◀── reset ────        ◀── answer ──
//! ```
//! It reads the sizes and first fields of requests and answers (<https://kafka.apache.org/protocol>), and nothing else.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A request whose answer can be cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Request {
    Produce,
    AddOffsetsToTransaction,
    CommitOffsetsInTransaction,
    EndTransaction,
}

impl Request {
    fn of_key(key: i16) -> Option<Self> {
        Some(match key {
            0 => Self::Produce,
            25 => Self::AddOffsetsToTransaction,
            26 => Self::EndTransaction,
            28 => Self::CommitOffsetsInTransaction,
            _ => return None,
        })
    }
}

/// A running proxy. It ends, with all its connections, when dropped.
#[derive(Debug)]
pub struct AckCutter {
    shared: Arc<Shared>,
    stopping: CancellationToken,
    tasks: TaskTracker,
}

#[derive(Debug)]
struct Shared {
    broker: SocketAddr,
    /// One of how many answers is cut off; 0: none.
    one_of: Mutex<u32>,
    cut: Mutex<HashMap<Request, usize>>,
}

impl AckCutter {
    /// Passes connections on to a broker, and cuts nothing yet.
    ///
    /// # Panics
    /// If it cannot listen.
    pub async fn start(address: SocketAddr, broker: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.expect("the proxy's port is free");
        let cutter = Self {
            shared: Arc::new(Shared {
                broker,
                one_of: Mutex::default(),
                cut: Mutex::default(),
            }),
            stopping: CancellationToken::new(),
            tasks: TaskTracker::new(),
        };
        let (shared, stopping, tasks) = (cutter.shared.clone(), cutter.stopping.clone(), cutter.tasks.clone());
        cutter.tasks.spawn(async move {
            loop {
                tokio::select! {
                    () = stopping.cancelled() => return,
                    accepted = listener.accept() => {
                        let Ok((client, _)) = accepted else { continue };
                        tasks.spawn(connection(client, shared.clone(), stopping.clone()));
                    }
                }
            }
        });
        cutter
    }

    /// From now on cuts off one of so many answers, at random; 0: none.
    pub fn cut_one_of(&self, answers: u32) {
        *lock(&self.shared.one_of) = answers;
    }

    /// How many answers to requests of a kind were cut off.
    pub fn cut(&self, request: Request) -> usize {
        lock(&self.shared.cut).get(&request).copied().unwrap_or(0)
    }

    /// How many answers were cut off.
    pub fn cut_in_all(&self) -> usize {
        lock(&self.shared.cut).values().sum()
    }
}

impl Drop for AckCutter {
    fn drop(&mut self) {
        self.stopping.cancel();
        self.tasks.close();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn connection(mut client: TcpStream, shared: Arc<Shared>, stopping: CancellationToken) {
    let Ok(mut broker) = TcpStream::connect(shared.broker).await else {
        return;
    };
    // Sockets that refuse are gone already.
    let _ = (client.set_nodelay(true), broker.set_nodelay(true));
    // Of requests under way, the number by which the broker answers.
    let asked: Mutex<HashMap<i32, Request>> = Mutex::default();
    {
        let (client_reads, client_writes) = client.split();
        let (broker_reads, broker_writes) = broker.split();
        // An error is the end of a connection by one of its sides, which the other learns by the drop below.
        tokio::select! {
            () = stopping.cancelled() => {}
            _ = pass_requests(client_reads, broker_writes, &asked) => {}
            _ = pass_answers(broker_reads, client_writes, &asked, &shared) => {}
        }
    }
    // As above.
    let _ = client.set_zero_linger();
}

async fn pass_requests(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    asked: &Mutex<HashMap<i32, Request>>,
) -> io::Result<()> {
    loop {
        let frame = read_frame(&mut from).await?;
        if let Some((key, _version, id)) = request_head(&frame)
            && let Some(request) = Request::of_key(key)
        {
            lock(asked).insert(id, request);
        }
        to.write_all(&frame).await?;
    }
}

async fn pass_answers(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    asked: &Mutex<HashMap<i32, Request>>,
    shared: &Shared,
) -> io::Result<()> {
    loop {
        let frame = read_frame(&mut from).await?;
        let request = number(&frame, 4).and_then(|id| lock(asked).remove(&id));
        let one_of = *lock(&shared.one_of);
        if let Some(request) = request
            && one_of > 0
            && rand::random_range(0..one_of) == 0
        {
            *lock(&shared.cut).entry(request).or_default() += 1;
            return Ok(());
        }
        to.write_all(&frame).await?;
    }
}

/// A request or an answer, with the four bytes before it that say its size.
async fn read_frame(from: &mut ReadHalf<'_>) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; 4];
    from.read_exact(&mut frame).await?;
    let size = number(&frame, 0).and_then(|size| usize::try_from(size).ok());
    let size = size.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    frame.resize(4 + size, 0);
    from.read_exact(&mut frame[4..]).await?;
    Ok(frame)
}

/// What a request asks for, in which version, and the number that its answer will carry.
fn request_head(frame: &[u8]) -> Option<(i16, i16, i32)> {
    let short = |at: usize| Some(i16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?));
    Some((short(4)?, short(6)?, number(frame, 8)?))
}

fn number(frame: &[u8], at: usize) -> Option<i32> {
    Some(i32::from_be_bytes(frame.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A request of two bytes more than its head, and the answer to one with this number.
    fn request(key: u8, id: u8) -> Vec<u8> {
        vec![0, 0, 0, 10, 0, key, 0, 1, 0, 0, 0, id, 7, 7]
    }

    fn answer(id: u8) -> Vec<u8> {
        vec![0, 0, 0, 5, 0, 0, 0, id, 9]
    }

    #[tokio::test]
    async fn the_answer_is_cut_off_and_the_request_is_not() {
        let broker = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let [port] = crate::kafka::free_ports();
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let cutter = AckCutter::start(address, broker.local_addr().expect("an address")).await;
        cutter.cut_one_of(1);
        let mut client = TcpStream::connect(address).await.expect("a connection");
        let (mut server, _) = broker.accept().await.expect("a connection");
        let mut read = vec![0; 14];
        let metadata = request(3, 1);
        client.write_all(&metadata).await.expect("sent");
        server.read_exact(&mut read).await.expect("it comes");
        assert_eq!(read, metadata);
        server.write_all(&answer(1)).await.expect("answered");
        let mut answered = vec![0; 9];
        client.read_exact(&mut answered).await.expect("other answers pass");
        assert_eq!(answered, answer(1));
        let end = request(26, 2);
        client.write_all(&end).await.expect("sent");
        server.read_exact(&mut read).await.expect("it comes");
        assert_eq!(read, end);
        server.write_all(&answer(2)).await.expect("answered");
        let error = client.read_u8().await.expect_err("a reset");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert_eq!((cutter.cut(Request::EndTransaction), cutter.cut_in_all()), (1, 1));
    }
}
