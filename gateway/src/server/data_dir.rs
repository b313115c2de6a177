//! The data folder and who this node is: a folder serves one gateway at a time, and the name in it lasts as long as the folder.
//!
//! The name is part of the transactional ids, by which a restarted gateway fences what its predecessor left open. Two nodes with
//! one name would fence each other for ever, so it is chosen at random and the folder is locked.

use std::fs::{File, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use uuid::Uuid;

/// Holds the name, and is locked while a gateway runs.
const NODE_FILE: &str = "gateway-node";

/// The data folder of a running gateway.
#[derive(Debug)]
pub struct DataDir {
    /// The folder.
    pub path: PathBuf,
    /// The name of this node.
    pub node: String,
    /// Locked until dropped.
    _lock: File,
}

impl DataDir {
    /// Makes the folder if it is not there, locks it, and reads or chooses the node's name.
    ///
    /// # Errors
    /// The folder cannot be used, or another gateway uses it.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(path)?;
        let mut file = File::options()
            .read(true)
            .append(true)
            .create(true)
            .open(path.join(NODE_FILE))?;
        file.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => io::Error::other("another gateway uses it"),
            TryLockError::Error(error) => error,
        })?;
        let mut node = String::new();
        file.read_to_string(&mut node)?;
        if Uuid::try_parse(&node).is_err() {
            node = Uuid::now_v7().simple().to_string();
            file.set_len(0)?;
            file.write_all(node.as_bytes())?;
            file.sync_all()?;
        }
        Ok(Self {
            path: path.to_owned(),
            node,
            _lock: file,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_keeps_its_name_and_serves_one_gateway_at_a_time() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("new");
        let first = DataDir::open(&path).expect("a new folder");
        let name = first.node.clone();
        let refused = DataDir::open(&path).expect_err("it is in use").to_string();
        assert_eq!(refused, "another gateway uses it");
        drop(first);
        assert_eq!(DataDir::open(&path).expect("it is free").node, name);
    }
}
