//! The floor: one epoll loop that writes ready-made bytes to every subscriber and does nothing else.

use std::io::{self, ErrorKind, Read as _, Write as _};

use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};

const LISTENER: Token = Token(usize::MAX);
const UPGRADED: &[u8] =
    b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\nserver: bare\r\n\r\n";
const STREAMING: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\nserver: bare\r\n\r\n";
const ACCEPTED: &[u8] = b"HTTP/1.1 202 Accepted\r\ncontent-length: 0\r\n\r\n";

/// What a subscriber gets for each POST that comes.
pub struct Frames {
    /// On a WebSocket.
    pub web_socket: Vec<u8>,
    /// On an event stream.
    pub sse: Vec<u8>,
}

struct Connection {
    stream: TcpStream,
    /// What it is written, once it is a subscriber.
    kind: Option<Kind>,
}

#[derive(Clone, Copy)]
enum Kind {
    WebSocket,
    Sse,
}

/// Serves until it is killed, and says where on standard output.
pub fn serve(frames: &Frames) -> io::Result<()> {
    let mut poll = Poll::new()?;
    let mut events = Events::with_capacity(1024);
    let mut listener = TcpListener::bind(([127, 0, 0, 1], 0).into())?;
    poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
    println!("listening on http://{}", listener.local_addr()?);
    let mut connections: Vec<Option<Connection>> = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        poll.poll(&mut events, None)?;
        for event in &events {
            if event.token() == LISTENER {
                while let Some(mut stream) = not_yet(listener.accept())?.map(|(stream, _)| stream) {
                    stream.set_nodelay(true)?;
                    let token = Token(connections.len());
                    poll.registry().register(&mut stream, token, Interest::READABLE)?;
                    connections.push(Some(Connection { stream, kind: None }));
                }
                continue;
            }
            read(&mut connections, event.token().0, &mut buffer, frames);
        }
    }
}

/// Reads what a connection says. Requests are small and come whole.
fn read(connections: &mut [Option<Connection>], index: usize, buffer: &mut [u8], frames: &Frames) {
    while let Some(connection) = &mut connections[index] {
        let length = match not_yet(connection.stream.read(buffer)) {
            Ok(None) => return,
            Ok(Some(0)) | Err(_) => {
                connections[index] = None;
                return;
            }
            Ok(Some(length)) => length,
        };
        let said = &buffer[..length];
        let answer = if said.starts_with(b"POST") {
            for subscriber in connections.iter_mut().flatten() {
                let frame = match subscriber.kind {
                    Some(Kind::WebSocket) => &frames.web_socket,
                    Some(Kind::Sse) => &frames.sse,
                    None => continue,
                };
                // A full socket loses the frame; the measurement then waits in vain and says so.
                let _ = subscriber.stream.write(frame);
            }
            ACCEPTED
        } else if said.starts_with(b"GET /v1/ws") {
            connection.kind = Some(Kind::WebSocket);
            UPGRADED
        } else if said.starts_with(b"GET") {
            connection.kind = Some(Kind::Sse);
            STREAMING
        } else {
            continue;
        };
        if let Some(connection) = &mut connections[index]
            && connection.stream.write_all(answer).is_err()
        {
            connections[index] = None;
        }
    }
}

fn not_yet<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(done) => Ok(Some(done)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}
