//! Where bodies wait until they are produced: small ones in memory, within a budget that all share; the others in files of
//! the data folder, which have no name any more when the first byte is written, so that nothing is ever left behind.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::spawn_blocking;
use uuid::Uuid;

use super::chunk::{Chunk, Plan};

/// Bodies up to this size may stay in memory.
const MEMORY_BODY_BYTES: usize = 256 * 1024;
/// Bytes that are written to a file at once.
const WRITE_BYTES: usize = 128 * 1024;
/// Bytes of a body that are read back at once; a chunk may be the last of them that begins before.
const READ_BYTES: usize = 512 * 1024;

/// The place for bodies.
#[derive(Debug)]
pub(super) struct Spool {
    dir: PathBuf,
    /// One permit for each byte.
    memory: Arc<Semaphore>,
}

/// A body that is being received.
#[derive(Debug)]
pub(super) struct Upload<'a> {
    spool: &'a Spool,
    /// What is not in the file.
    buffer: Vec<u8>,
    memory: Option<OwnedSemaphorePermit>,
    file: Option<File>,
    size_bytes: u64,
}

/// A body that is complete. Its memory or file is given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Spooled {
    bytes: Bytes,
    _memory: Option<OwnedSemaphorePermit>,
    file: Option<Arc<File>>,
    /// Size of the body.
    pub(crate) size_bytes: u64,
}

impl Spool {
    /// A spool in the folder `dir`, which is made, and is this process's alone.
    ///
    /// # Errors
    /// The folder cannot be made, or what is in it cannot be removed.
    pub(super) fn new(dir: PathBuf, memory_bytes: usize) -> io::Result<Self> {
        std::fs::create_dir_all(&dir)?;
        // A process that was killed just when it had made a file left it with its name.
        for left in std::fs::read_dir(&dir)? {
            std::fs::remove_file(left?.path())?;
        }
        Ok(Self {
            dir,
            memory: Arc::new(Semaphore::new(memory_bytes.min(Semaphore::MAX_PERMITS))),
        })
    }

    /// Begins to receive a body.
    pub(super) fn upload(&self) -> Upload<'_> {
        Upload {
            spool: self,
            buffer: Vec::new(),
            memory: None,
            file: None,
            size_bytes: 0,
        }
    }

    fn create_file(&self) -> io::Result<File> {
        let path = self.dir.join(Uuid::now_v7().to_string());
        let file = File::options().read(true).write(true).create_new(true).open(&path)?;
        std::fs::remove_file(&path)?;
        Ok(file)
    }
}

impl Upload<'_> {
    /// Takes the next bytes.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(super) async fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.size_bytes += bytes.len() as u64;
        self.buffer.extend_from_slice(bytes);
        if self.file.is_none() && self.buffer.len() <= MEMORY_BODY_BYTES && self.reserve(bytes.len()) {
            return Ok(());
        }
        if self.file.is_none() {
            self.file = Some(self.spool.create_file()?);
            self.memory = None;
        }
        if self.buffer.len() >= WRITE_BYTES {
            self.write().await?;
        }
        Ok(())
    }

    /// The complete body.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(super) async fn finish(mut self) -> io::Result<Spooled> {
        if self.file.is_some() {
            self.write().await?;
            self.buffer = Vec::new();
        }
        Ok(Spooled {
            bytes: self.buffer.into(),
            _memory: self.memory,
            file: self.file.map(Arc::new),
            size_bytes: self.size_bytes,
        })
    }

    /// Whether the shared memory has room for so many more bytes, which are then taken.
    fn reserve(&mut self, bytes: usize) -> bool {
        let Ok(bytes) = u32::try_from(bytes) else { return false };
        let Ok(more) = Arc::clone(&self.spool.memory).try_acquire_many_owned(bytes) else {
            return false;
        };
        match &mut self.memory {
            Some(memory) => memory.merge(more),
            None => self.memory = Some(more),
        }
        true
    }

    async fn write(&mut self) -> io::Result<()> {
        let Some(mut file) = self.file.take() else {
            return Ok(());
        };
        let mut buffer = std::mem::take(&mut self.buffer);
        let (file, buffer) = blocking(move || {
            file.write_all(&buffer)?;
            buffer.clear();
            Ok((file, buffer))
        })
        .await?;
        self.file = Some(file);
        self.buffer = buffer;
        Ok(())
    }
}

impl Spooled {
    /// The values of the next chunks from `from` on: as many as are read at once, none at the end.
    ///
    /// # Errors
    /// The file cannot be read.
    pub(super) async fn read_chunks(&self, plan: &Plan, from: usize) -> io::Result<Vec<Bytes>> {
        let mut size_bytes = 0;
        let chunks = plan.chunks[from..].iter().copied().take_while(|chunk| {
            let fits = size_bytes < READ_BYTES;
            size_bytes += chunk.len as usize + plan.header.len();
            fits
        });
        let Some(file) = self.file.clone() else {
            return Ok(chunks.map(|chunk| self.value_in_memory(&plan.header, chunk)).collect());
        };
        let chunks: Vec<Chunk> = chunks.collect();
        if chunks.is_empty() {
            return Ok(Vec::new());
        }
        let header = plan.header.clone();
        blocking(move || {
            chunks
                .into_iter()
                .map(|chunk| value_in_file(&file, &header, chunk))
                .collect()
        })
        .await
    }

    fn value_in_memory(&self, header: &Bytes, chunk: Chunk) -> Bytes {
        let start = chunk.start as usize;
        let rows = self.bytes.slice(start..start + chunk.len as usize);
        if header.is_empty() {
            return rows;
        }
        [&header[..], &rows[..]].concat().into()
    }
}

fn value_in_file(file: &File, header: &Bytes, chunk: Chunk) -> io::Result<Bytes> {
    let mut value = Vec::with_capacity(header.len() + chunk.len as usize);
    value.extend_from_slice(header);
    value.resize(header.len() + chunk.len as usize, 0);
    file.read_exact_at(&mut value[header.len()..], chunk.start)?;
    Ok(value.into())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    spawn_blocking(work).await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use super::super::chunk::{Cutter, Limits};
    use super::*;
    use crate::server::config::BodyFormat;

    const LIMITS: Limits = Limits { rows: 100, bytes: 4096 };

    async fn values(spool: &Spool, body: &[u8], piece: usize) -> (Vec<Bytes>, bool) {
        let mut upload = spool.upload();
        let mut cutter = Cutter::new(BodyFormat::Csv, LIMITS);
        for piece in body.chunks(piece) {
            cutter.push(piece).expect("rows");
            upload.push(piece).await.expect("space");
        }
        let plan = cutter.finish().expect("a plan");
        let spooled = upload.finish().await.expect("space");
        let mut values = Vec::new();
        loop {
            let more = spooled.read_chunks(&plan, values.len()).await.expect("a body");
            if more.is_empty() {
                assert_eq!(values.len(), plan.chunks.len());
                return (values, spooled.file.is_some());
            }
            values.extend(more);
        }
    }

    #[tokio::test]
    async fn a_body_is_read_back_the_same_from_memory_and_from_a_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let body = format!("a,b\n{}", "first,second\n".repeat(15_000)).into_bytes();
        let enough = Spool::new(folder.path().to_owned(), body.len()).expect("a spool");
        let too_little = Spool::new(folder.path().to_owned(), body.len() - 1).expect("a spool");
        let (in_memory, is_in_file) = values(&enough, &body, 1000).await;
        assert!(!is_in_file);
        assert!(in_memory.iter().all(|value| value.starts_with(b"a,b\nfirst,second\n")));
        let (in_file, is_in_file) = values(&too_little, &body, 1000).await;
        assert!(is_in_file);
        assert_eq!(in_memory, in_file);
        assert_eq!(enough.memory.available_permits(), body.len());
        assert_eq!(too_little.memory.available_permits(), body.len() - 1);
    }

    #[test]
    fn what_a_killed_process_left_is_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join(Uuid::now_v7().to_string()), "").expect("a file");
        Spool::new(folder.path().to_owned(), 0).expect("a spool");
        assert_eq!(std::fs::read_dir(folder.path()).expect("the folder").count(), 0);
    }

    #[tokio::test]
    async fn a_file_has_no_name_and_a_large_body_is_in_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let spool = Spool::new(folder.path().to_owned(), usize::MAX).expect("a spool");
        let mut upload = spool.upload();
        upload.push(&vec![b'x'; MEMORY_BODY_BYTES]).await.expect("space");
        assert!(upload.file.is_none());
        upload.push(b"x").await.expect("space");
        assert!(upload.file.is_some());
        assert_eq!(std::fs::read_dir(folder.path()).expect("the folder").count(), 0);
    }
}
