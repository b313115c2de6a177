//! Which topics a consumer consumes: those that it names, and those whose names match its pattern.

use std::time::Duration;

use regex::Regex;

use crate::log::Log;
use crate::patterns::Error;
use crate::patterns::retry::parse_delay;

/// Topics by name and by pattern.
#[derive(Clone, Debug)]
pub(super) struct Subscription {
    pub(super) topics: Vec<String>,
    pub(super) pattern: Option<String>,
    /// How often it is looked whether other topics match.
    pub(super) interval: Duration,
}

impl Subscription {
    /// The topics there are now, without order.
    ///
    /// # Errors
    /// [`Error::Setting`] for a pattern that is none; [`Error::Log`] when the log does not answer.
    pub(super) async fn names(&self, log: &Log) -> Result<Vec<String>, Error> {
        let mut names = self.topics.clone();
        if let Some(pattern) = self.whole()? {
            let found = log.topics().await?;
            let wanted = |name: &String| pattern.is_match(name) && !is_beside(name) && !names.contains(name);
            let found: Vec<_> = found.into_keys().filter(wanted).collect();
            names.extend(found);
        }
        Ok(names)
    }

    /// The pattern, for whole names.
    fn whole(&self) -> Result<Option<Regex>, Error> {
        let compiled = self
            .pattern
            .as_ref()
            .map(|pattern| Regex::new(&format!("^(?:{pattern})$")));
        compiled.transpose().map_err(|error| Error::Setting {
            setting: "pattern",
            reason: error.to_string(),
        })
    }
}

/// Whether consumers have made a topic for what they could not do: of whatever group it is, it is not meant.
fn is_beside(name: &str) -> bool {
    let is_retry = || {
        let (_, delay) = name.rsplit_once(".retry.")?;
        parse_delay(delay.split_once('-').map_or(delay, |(delay, _)| delay))
    };
    let ends = [".dlt", ".redrive", ".blocked", ".control", ".dead-letters"];
    ends.iter().any(|end| name.ends_with(end)) || is_retry().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_for_whole_names() {
        let subscription = |pattern: &str| Subscription {
            topics: Vec::new(),
            pattern: Some(pattern.to_owned()),
            interval: Duration::ZERO,
        };
        let pattern = subscription("orders|bills").whole().expect("a pattern").expect("one");
        assert!(pattern.is_match("orders") && pattern.is_match("bills"));
        assert!(!pattern.is_match("orders-old") && !pattern.is_match("unpaid-bills"));
        assert!(matches!(
            subscription("orders(").whole(),
            Err(Error::Setting { setting: "pattern", .. })
        ));
    }

    #[test]
    fn topics_of_what_failed_are_not_meant() {
        for name in [
            "orders.g.dlt",
            "orders.g.redrive",
            "orders.g.retry.5s",
            "orders.g.retry.5s-2",
            "g.blocked",
        ] {
            assert!(is_beside(name), "{name}");
        }
        for name in ["orders", "orders.retry", "orders.retry.policy", "dlt"] {
            assert!(!is_beside(name), "{name}");
        }
    }
}
