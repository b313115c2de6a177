//! Groups with their lag, what stands still in them, commands, and who did what.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::time::Duration;

use axum::extract::{Path, Query, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::{StreamExt, TryStreamExt, stream};
use http::{HeaderMap, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{Groups, READ_AT_ONCE, operator};
use crate::log::{self, GroupDescription, Log, MemberDescription, PartitionLag, StartAt, TopicPartition};
use crate::patterns::control::{self, Action, Command, ControlRecord, Outcome, Place, blocked_topic, control_topic};
use crate::patterns::projection::projection_of_group;
use crate::patterns::scan::Scan;
use crate::server::{App, Error};

/// How long the owner of a partition may take to answer a command.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Actions of a group told at most.
const MAX_ACTIONS: usize = 1000;

/// Actions of all groups told at most.
const MAX_ALL_ACTIONS: usize = 100;

pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/v1/admin/groups", get(groups))
        .route("/v1/admin/blocked", get(blocked))
        .route("/v1/admin/groups/{group}/commands", post(command))
        .route("/v1/admin/groups/{group}/actions", get(actions))
        .route("/v1/admin/actions", get(all_actions))
}

#[derive(Serialize)]
struct Group<'a> {
    group: &'a str,
    /// The projection of which it is a generation.
    #[serde(skip_serializing_if = "Option::is_none")]
    projection: Option<&'a str>,
    members: Vec<Member<'a>>,
    /// Whether commands can be given to it.
    operated: bool,
    /// Of the partitions of which it is known.
    lag: i64,
    /// How many partitions that have records are a member's and have nothing committed.
    lag_unknown: usize,
    partitions: Vec<Lag<'a>>,
}

#[derive(Serialize)]
struct Member<'a> {
    member: &'a str,
    client: &'a str,
    host: &'a str,
}

#[derive(Serialize)]
struct Lag<'a> {
    topic: &'a str,
    partition: i32,
    /// Which member has it, if one is seen to.
    member: Option<&'a str>,
    /// Nothing yet: neither it nor the lag is known.
    committed: Option<i64>,
    end: i64,
    lag: Option<i64>,
}

impl<'a> Member<'a> {
    fn new(member: &'a MemberDescription) -> Self {
        Self {
            member: &member.member,
            client: &member.client,
            host: &member.host,
        }
    }
}

impl<'a> Group<'a> {
    fn new(group: &'a GroupDescription, operated: bool, also: Option<&'a GroupDescription>) -> Self {
        let members = group
            .members
            .iter()
            .chain(also.into_iter().flat_map(|also| &also.members));
        let owners: HashMap<_, _> = members
            .flat_map(|member| {
                member
                    .partitions
                    .iter()
                    .map(|partition| (partition, member.member.as_str()))
            })
            .collect();
        let also = also.into_iter().flat_map(|also| &also.partitions);
        let lag = |lag: &'a PartitionLag| Lag {
            member: owners.get(&lag.partition).copied(),
            topic: &lag.partition.topic,
            partition: lag.partition.partition,
            committed: lag.committed.map(|committed| committed.0),
            end: lag.end,
            lag: lag.lag(),
        };
        let partitions: Vec<_> = group.partitions.iter().chain(also).map(lag).collect();
        Self {
            group: &group.group,
            projection: None,
            members: group.members.iter().map(Member::new).collect(),
            operated,
            lag: partitions.iter().filter_map(|partition| partition.lag).sum(),
            lag_unknown: partitions.iter().filter(|partition| partition.lag.is_none()).count(),
            partitions,
        }
    }
}

async fn groups(State(app): State<App>) -> Result<Json<Value>, Error> {
    let Groups { operated, others, .. } = Groups::read(&app.log).await?;
    let own = operated.iter().filter_map(|operated| {
        let own = operated.own.as_ref()?;
        Some(Group::new(own, operated.takes_commands, operated.retries.as_ref()))
    });
    let names: HashSet<_> = operated.iter().map(|operated| operated.group.as_str()).collect();
    let others = others.iter().map(|group| Group {
        projection: projection_of_group(&group.group).filter(|name| names.contains(name)),
        ..Group::new(group, false, None)
    });
    let groups: Vec<_> = own.chain(others).collect();
    Ok(Json(json!({ "groups": groups })))
}

async fn blocked(State(app): State<App>) -> Result<Json<Value>, Error> {
    let all = Groups::read(&app.log).await?;
    let takes_commands = all.operated.into_iter().filter(|operated| operated.takes_commands);
    let groups: Vec<_> = takes_commands.map(|operated| operated.group).collect();
    app.admin.blocked.retain(|group| groups.contains(group));
    let written = written(&app.log, groups, blocked_topic).await?;
    let mut read = stream::iter(written)
        .map(|(group, end)| {
            let app = &app;
            async move {
                let places = control::blocked_places(&app.log, &group);
                let places = app.admin.blocked.get(group.clone(), vec![end], places).await?;
                Ok::<_, Error>((group, places))
            }
        })
        .buffered(READ_AT_ONCE);
    let mut blocked = Vec::new();
    while let Some((group, places)) = read.try_next().await? {
        for (place, one) in places {
            let mut one = json!(one);
            one["group"] = json!(group);
            one["place"] = json!(place);
            blocked.push(one);
        }
    }
    Ok(Json(json!({ "blocked": blocked })))
}

/// Of these groups those whose topic is not empty, with where it ends.
async fn written(log: &Log, groups: Vec<String>, topic: fn(&str) -> String) -> log::Result<Vec<(String, i64)>> {
    let topics: Vec<_> = groups
        .iter()
        .map(|group| TopicPartition::new(topic(group), 0))
        .collect();
    let ends = log.offsets(&topics, StartAt::End).await?;
    Ok(groups.into_iter().zip(ends).filter(|(_, end)| *end > 0).collect())
}

/// A command as it comes: who gives it is said elsewhere.
#[derive(Deserialize)]
struct Wanted {
    action: Action,
    #[serde(flatten)]
    place: Place,
    offset: i64,
}

async fn command(
    State(app): State<App>,
    Path(group): Path<String>,
    headers: HeaderMap,
    body: axum::body::Bytes,
) -> Result<Json<Value>, Error> {
    let wanted: Wanted =
        serde_json::from_slice(&body).map_err(|error| Error::bad_request("bad-command", error.to_string()))?;
    let unknown = format!("there is no group {group} that takes commands");
    check_topic(&app.log, &blocked_topic(&group), unknown).await?;
    let command = Command {
        action: wanted.action,
        place: wanted.place,
        offset: wanted.offset,
        by: operator(&headers),
    };
    let outcome = control::operate(&app.log, &group, command, ANSWER_WITHIN).await?;
    match outcome {
        Outcome { done: true, .. } => Ok(Json(json!({ "done": true }))),
        Outcome { reason, .. } => Err(Error::refused(StatusCode::CONFLICT, "refused", reason)),
    }
}

/// Refuses a group that lacks a topic.
async fn check_topic(log: &Log, topic: &str, unknown: String) -> Result<(), Error> {
    match log.describe_topic(topic).await {
        Ok(_) => Ok(()),
        Err(log::Error::UnknownTopic(_) | log::Error::InvalidTopic { .. }) => {
            Err(Error::not_found("unknown-group", unknown))
        }
        Err(error) => Err(error.into()),
    }
}

#[derive(Deserialize)]
struct Most {
    limit: Option<usize>,
}

async fn actions(
    State(app): State<App>,
    Path(group): Path<String>,
    Query(most): Query<Most>,
) -> Result<Json<Value>, Error> {
    let unknown = format!("there is no group, store or projection {group} of which actions are kept");
    check_topic(&app.log, &control_topic(&group), unknown).await?;
    let most = most.limit.unwrap_or(100).min(MAX_ACTIONS);
    let actions = read_actions(&app.log, &group, most).await?;
    Ok(Json(json!({ "actions": actions })))
}

/// Those of all groups.
async fn all_actions(State(app): State<App>, Query(most): Query<Most>) -> Result<Json<Value>, Error> {
    let operated = Groups::read(&app.log).await?.operated;
    let groups: Vec<_> = operated.into_iter().map(|operated| operated.group).collect();
    let known = &app.admin.actions;
    known.retain(|group| groups.contains(group));
    let written = written(&app.log, groups, control_topic).await?;
    let mut read = stream::iter(written)
        .map(|(group, end)| {
            let log = &app.log;
            async move {
                let actions = read_actions(log, &group, MAX_ALL_ACTIONS);
                known.get(group.clone(), vec![end], actions).await
            }
        })
        .buffered(READ_AT_ONCE);
    let mut actions: Vec<Value> = Vec::new();
    while let Some(some) = read.try_next().await? {
        actions.extend(some);
    }
    actions.sort_by_key(|action| Reverse(action["at_ms"].as_i64()));
    actions.truncate(most.limit.unwrap_or(MAX_ALL_ACTIONS).min(MAX_ALL_ACTIONS));
    Ok(Json(json!({ "actions": actions })))
}

/// So many of a group's actions at most, newest first.
async fn read_actions(log: &Log, group: &str, most: usize) -> Result<Vec<Value>, Error> {
    let mut actions: Vec<Value> = Vec::new();
    let mut open: HashMap<Uuid, usize> = HashMap::new();
    let mut scan = Scan::new(log, &control_topic(group)).await?;
    while let Some(batch) = scan.next().await? {
        for record in &batch.records {
            match ControlRecord::read(record) {
                Some((id, ControlRecord::Outcome(outcome))) => {
                    if let Some(action) = open.remove(&id).and_then(|index| actions.get_mut(index)) {
                        action["done"] = json!(outcome.done);
                        action["reason"] = json!(outcome.reason);
                    }
                }
                Some((id, action)) => {
                    if let Some(mut action) = told(id, record.timestamp_ms, &action) {
                        action["group"] = json!(group);
                        open.insert(id, actions.len());
                        actions.push(action);
                    }
                }
                None => {}
            }
        }
    }
    Ok(actions.into_iter().rev().take(most).collect())
}

/// An action as it is told; `None`: it is an outcome.
pub(super) fn told(id: Uuid, at_ms: i64, record: &ControlRecord) -> Option<Value> {
    let mut told = match record {
        ControlRecord::Command(command) => {
            let mut told = json!(command);
            told["done"] = Value::Null;
            told
        }
        ControlRecord::Letters {
            action,
            topic,
            records,
            by,
        } => json!({ "action": action, "topic": topic, "records": records, "by": by, "done": true }),
        ControlRecord::Outcome(_) => return None,
    };
    told["id"] = json!(id.to_string());
    told["at_ms"] = json!(at_ms);
    told["reason"] = json!("");
    Some(told)
}
