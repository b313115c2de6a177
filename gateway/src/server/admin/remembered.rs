//! What has been read of topics, so that a page that asks every two seconds does not have them read each time.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Answers by what they are about, each good for as long as the offsets stay that it was read at.
#[derive(Debug)]
pub(super) struct Remembered<K, V>(Mutex<HashMap<K, (Vec<i64>, V)>>);

impl<K, V> Default for Remembered<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash + Clone, V: Clone> Remembered<K, V> {
    /// The answer about `key` at these offsets, from `read` if it is not known.
    pub(super) async fn get<E>(
        &self,
        key: K,
        offsets: Vec<i64>,
        read: impl Future<Output = Result<V, E>>,
    ) -> Result<V, E> {
        if let Some((at, value)) = self.answers().get(&key)
            && *at == offsets
        {
            return Ok(value.clone());
        }
        let value = read.await?;
        self.answers().insert(key, (offsets, value.clone()));
        Ok(value)
    }

    /// Forgets what is about anything else than what `is_there` says.
    pub(super) fn retain(&self, mut is_there: impl FnMut(&K) -> bool) {
        self.answers().retain(|key, _| is_there(key));
    }

    fn answers(&self) -> MutexGuard<'_, HashMap<K, (Vec<i64>, V)>> {
        // Each change of the map is one step: it is whole after a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    #[tokio::test]
    async fn an_answer_is_read_again_only_when_its_offsets_have_moved() {
        let remembered = Remembered::default();
        let get = |offset: i64, value: &'static str| {
            remembered.get("topic", vec![offset], async move { Ok::<_, Infallible>(value) })
        };
        assert_eq!(get(1, "first").await, Ok("first"));
        assert_eq!(get(1, "not read").await, Ok("first"));
        assert_eq!(get(2, "second").await, Ok("second"));
        remembered.retain(|topic| *topic != "topic");
        assert_eq!(get(2, "third").await, Ok("third"));
    }
}
