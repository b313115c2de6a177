//! The subcommands: operators' view of groups, by asking a gateway that runs, and the topics that have to be there before anything runs.

use std::error::Error as StdError;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use barnabas::log::Log;
use barnabas::patterns::consumer::ConsumerBuilder;
use barnabas::patterns::retry::{RetryPolicy, RetryTopics, parse_delay};
use barnabas::server::Config;
use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;

/// What `--help` says of the subcommands.
pub const HELP: &str = "
Subcommands ask a running gateway: --gateway URL, or BARNABAS_GATEWAY, default http://127.0.0.1:8080; --json shows its answer as it is.
  groups                                    consumer groups with members and lag
  blocked ls                                partitions and keys that stand still, and why
  blocked retry|skip|dead-letter|ignore|block GROUP TOPIC PARTITION OFFSET [--key KEY | --key-base64 KEY]
                                            try the record at this offset now, pass it over, send it to the dead letters, pass over whatever
                                            fails there, or block there again
  dlq ls                                    topics of dead letters
  dlq show TOPIC [--filter TEXT] [--all] [--limit N]
  dlq redrive|discard TOPIC PARTITION-OFFSET... | --filter TEXT | --all
  topics plan|apply [--consumer GROUP --topic TOPIC [--retry 1s,5s,30s]]
                                            what would be created or changed for the gateway, or for a consumer; asks the log itself, with the
                                            gateway's settings
";

const USAGE: u8 = 64;
const UNAVAILABLE: u8 = 69;

/// How long a gateway may take to answer.
const WITHIN: Duration = Duration::from_secs(60);

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subcommand {
    /// Groups and their lag.
    Groups,
    /// What stands still.
    Blocked,
    /// Dead letters.
    Dlq,
    /// Topics that have to exist.
    Topics,
}

impl Subcommand {
    /// The subcommand of this name.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "groups" => Some(Self::Groups),
            "blocked" => Some(Self::Blocked),
            "dlq" => Some(Self::Dlq),
            "topics" => Some(Self::Topics),
            _ => None,
        }
    }
}

/// Why a subcommand did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{0}; see barnabas --help")]
    Usage(String),
    #[error("{gateway}: {cause}")]
    Unreachable {
        gateway: String,
        cause: Box<dyn StdError + Send + Sync>,
    },
    #[error("{status} {code}: {detail}")]
    Refused {
        status: StatusCode,
        code: String,
        detail: String,
    },
    #[error(transparent)]
    Other(Box<dyn StdError + Send + Sync>),
}

type Result<T> = std::result::Result<T, Error>;

/// Runs a subcommand. Returns 0 when it was done, 64 for a wrong command line, 69 for everything else.
pub fn run(command: Subcommand, arguments: Vec<String>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let ended = match runtime {
        Ok(runtime) => runtime.block_on(obey(command, arguments)),
        Err(error) => Err(Error::Other(error.into())),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("barnabas: {error}");
            ExitCode::from(if matches!(error, Error::Usage(_)) {
                USAGE
            } else {
                UNAVAILABLE
            })
        }
    }
}

async fn obey(command: Subcommand, arguments: Vec<String>) -> Result<()> {
    let mut words = Words::new(arguments);
    if command == Subcommand::Topics {
        return topics(words).await;
    }
    let gateway = Gateway {
        url: words
            .option("--gateway")?
            .or_else(|| std::env::var("BARNABAS_GATEWAY").ok()),
        json: words.flag("--json"),
    };
    match command {
        Subcommand::Groups => groups(&gateway, words).await,
        Subcommand::Blocked => blocked(&gateway, words).await,
        Subcommand::Dlq | Subcommand::Topics => dlq(&gateway, words).await,
    }
}

/// What is left of the command line.
struct Words(Vec<String>);

impl Words {
    fn new(words: Vec<String>) -> Self {
        Self(words)
    }

    fn flag(&mut self, name: &str) -> bool {
        let before = self.0.len();
        self.0.retain(|word| word != name);
        self.0.len() < before
    }

    /// The value of `--name VALUE` or `--name=VALUE`.
    fn option(&mut self, name: &str) -> Result<Option<String>> {
        let with_value = format!("{name}=");
        if let Some(index) = self.0.iter().position(|word| word.starts_with(&with_value)) {
            return Ok(Some(self.0.remove(index)[with_value.len()..].to_owned()));
        }
        let Some(index) = self.0.iter().position(|word| word == name) else {
            return Ok(None);
        };
        if index + 1 >= self.0.len() {
            return Err(Error::Usage(format!("{name} needs a value")));
        }
        self.0.remove(index);
        Ok(Some(self.0.remove(index)))
    }

    fn next(&mut self, what: &str) -> Result<String> {
        match self.0.is_empty() {
            true => Err(Error::Usage(format!("{what} is missing"))),
            false => Ok(self.0.remove(0)),
        }
    }

    fn number<T: std::str::FromStr>(&mut self, what: &str) -> Result<T> {
        let word = self.next(what)?;
        word.parse()
            .map_err(|_| Error::Usage(format!("{what}: {word} is not a number")))
    }

    fn end(self) -> Result<()> {
        match self.0.first() {
            None => Ok(()),
            Some(word) => Err(Error::Usage(format!("{word} is not expected"))),
        }
    }
}

/// The gateway that is asked.
struct Gateway {
    url: Option<String>,
    json: bool,
}

impl Gateway {
    async fn ask(&self, method: Method, path: &str, body: Option<Value>) -> Result<Value> {
        let url = self.url.as_deref().unwrap_or("http://127.0.0.1:8080");
        let unreachable = |cause: Box<dyn StdError + Send + Sync>| Error::Unreachable {
            gateway: url.to_owned(),
            cause,
        };
        let Some(authority) = url.strip_prefix("http://").map(|rest| rest.trim_end_matches('/')) else {
            return Err(Error::Usage(format!("--gateway {url}: it begins with http://")));
        };
        let address = match authority.rsplit_once(':') {
            Some((_, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => authority.to_owned(),
            _ => format!("{authority}:80"),
        };
        let exchange = async {
            let stream = TcpStream::connect(&address).await?;
            let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
            tokio::spawn(connection);
            let operator = std::env::var("USER").unwrap_or_default();
            let mut request = Request::builder()
                .method(method)
                .uri(path)
                .header(header::HOST, authority);
            if !operator.is_empty() {
                request = request.header("barnabas-operator", operator);
            }
            let body = body.map(|body| body.to_string()).unwrap_or_default();
            let request = request
                .header(header::CONTENT_TYPE, "application/json")
                .body(Full::new(Bytes::from(body)))?;
            let response = sender.send_request(request).await?;
            let status = response.status();
            let body = response.into_body().collect().await?.to_bytes();
            Ok::<_, Box<dyn StdError + Send + Sync>>((status, body))
        };
        let (status, body) = match tokio::time::timeout(WITHIN, exchange).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => return Err(unreachable(error)),
            Err(elapsed) => return Err(unreachable(elapsed.into())),
        };
        let body: Value = serde_json::from_slice(&body).map_err(|error| unreachable(error.into()))?;
        if !status.is_success() {
            return Err(Error::Refused {
                status,
                code: text(&body["code"]),
                detail: text(&body["detail"]),
            });
        }
        if self.json {
            println!("{body:#}");
        }
        Ok(body)
    }
}

async fn groups(gateway: &Gateway, words: Words) -> Result<()> {
    words.end()?;
    let body = gateway.ask(Method::GET, "/v1/admin/groups", None).await?;
    if gateway.json {
        return Ok(());
    }
    let mut rows = vec![["GROUP", "MEMBERS", "LAG", "TOPICS"].map(str::to_owned).to_vec()];
    for group in each(&body["groups"]) {
        let mut topics: Vec<_> = each(&group["partitions"]).map(|lag| text(&lag["topic"])).collect();
        topics.sort();
        topics.dedup();
        let at_least = if group["lag_unknown"] == 0 { "" } else { ">=" };
        rows.push(vec![
            text(&group["group"]),
            each(&group["members"]).count().to_string(),
            format!("{at_least}{}", text(&group["lag"])),
            topics.join(" "),
        ]);
    }
    print_table(&rows);
    Ok(())
}

async fn blocked(gateway: &Gateway, mut words: Words) -> Result<()> {
    let action = words.next("ls, retry, skip, dead-letter, ignore or block")?;
    if action == "ls" {
        words.end()?;
        return list_blocked(gateway).await;
    }
    if !["retry", "skip", "dead-letter", "ignore", "block"].contains(&action.as_str()) {
        return Err(Error::Usage(format!("blocked {action} is not known")));
    }
    let keys = [
        ("key", words.option("--key")?),
        ("key_base64", words.option("--key-base64")?),
    ];
    let group = words.next("GROUP")?;
    let mut command = json!({
        "action": action, "topic": words.next("TOPIC")?, "partition": words.number::<i32>("PARTITION")?,
        "offset": words.number::<i64>("OFFSET")?,
    });
    words.end()?;
    for (name, key) in keys {
        if let Some(key) = key {
            command[name] = json!(key);
        }
    }
    let path = format!("/v1/admin/groups/{}/commands", escaped(&group));
    gateway.ask(Method::POST, &path, Some(command)).await?;
    if !gateway.json {
        println!("done");
    }
    Ok(())
}

async fn list_blocked(gateway: &Gateway) -> Result<()> {
    let body = gateway.ask(Method::GET, "/v1/admin/blocked", None).await?;
    if gateway.json {
        return Ok(());
    }
    let mut rows = vec![
        [
            "GROUP",
            "TOPIC",
            "PARTITION",
            "KEY",
            "OFFSET",
            "STATE",
            "ATTEMPTS",
            "NEXT",
            "WAITING",
            "ERROR",
        ]
        .map(str::to_owned)
        .to_vec(),
    ];
    for blocked in each(&body["blocked"]) {
        let key = match &blocked["key_base64"] {
            Value::Null => text(&blocked["key"]),
            key => format!("base64:{}", text(key)),
        };
        let next = match blocked["due_ms"].as_i64().unwrap_or(0) {
            0 => "-".to_owned(),
            due_ms => format!("in {} s", (due_ms - now_ms()).max(0) / 1000),
        };
        let mut row = vec![
            text(&blocked["group"]),
            text(&blocked["topic"]),
            text(&blocked["partition"]),
            key,
        ];
        row.extend([
            text(&blocked["offset"]),
            text(&blocked["state"]),
            text(&blocked["attempts"]),
            next,
        ]);
        row.extend([
            text(&blocked["waiting"]),
            format!("{} {}", text(&blocked["kind"]), text(&blocked["message"])),
        ]);
        rows.push(row);
    }
    print_table(&rows);
    Ok(())
}

async fn dlq(gateway: &Gateway, mut words: Words) -> Result<()> {
    let action = words.next("ls, show, redrive or discard")?;
    match action.as_str() {
        "ls" => {
            words.end()?;
            list_dead_letter_topics(gateway).await
        }
        "show" => show_dead_letters(gateway, words).await,
        "redrive" | "discard" => {
            let filter = words.option("--filter")?;
            let all = words.flag("--all");
            let topic = words.next("TOPIC")?;
            let places: Vec<_> = words.0.iter().map(|word| place(word)).collect::<Result<_>>()?;
            let selection = match (filter, all, places.is_empty()) {
                (Some(filter), false, true) => json!({ "filter": filter }),
                (None, true, true) => json!({ "filter": "" }),
                (None, false, false) => json!({ "records": places }),
                _ => {
                    let which = "say which: PARTITION-OFFSET..., or --filter TEXT, or --all";
                    return Err(Error::Usage(which.to_owned()));
                }
            };
            let path = format!("/v1/admin/dead-letters/{}/{action}", escaped(&topic));
            let body = gateway.ask(Method::POST, &path, Some(selection)).await?;
            if !gateway.json {
                println!("{} dead letters", text(&body["records"]));
            }
            Ok(())
        }
        other => Err(Error::Usage(format!("dlq {other} is not known"))),
    }
}

fn place(word: &str) -> Result<Value> {
    let numbers = || {
        let (partition, offset) = word.split_once('-')?;
        Some((partition.parse::<i32>().ok()?, offset.parse::<i64>().ok()?))
    };
    match numbers() {
        Some((partition, offset)) => Ok(json!({ "partition": partition, "offset": offset })),
        None => Err(Error::Usage(format!("{word} is not PARTITION-OFFSET, such as 0-17"))),
    }
}

async fn list_dead_letter_topics(gateway: &Gateway) -> Result<()> {
    let body = gateway.ask(Method::GET, "/v1/admin/dead-letters", None).await?;
    if gateway.json {
        return Ok(());
    }
    let mut rows = vec![["TOPIC", "GROUP", "WAITING", "ALL"].map(str::to_owned).to_vec()];
    for topic in each(&body["topics"]) {
        rows.push(
            ["topic", "group", "waiting", "records"]
                .map(|name| text(&topic[name]))
                .to_vec(),
        );
    }
    print_table(&rows);
    Ok(())
}

async fn show_dead_letters(gateway: &Gateway, mut words: Words) -> Result<()> {
    let filter = words.option("--filter")?.unwrap_or_default();
    let limit = words.option("--limit")?.unwrap_or_else(|| "50".to_owned());
    let state = if words.flag("--all") { "all" } else { "waiting" };
    let topic = words.next("TOPIC")?;
    words.end()?;
    let path = format!(
        "/v1/admin/dead-letters/{}?limit={}&state={state}&filter={}",
        escaped(&topic),
        escaped(&limit),
        escaped(&filter)
    );
    let body = gateway.ask(Method::GET, &path, None).await?;
    if gateway.json {
        return Ok(());
    }
    for letter in each(&body["records"]) {
        let at = format!("{}-{}", text(&letter["partition"]), text(&letter["offset"]));
        println!("{at}  {}  by {}", text(&letter["state"]), text(&letter["by"]));
        for name in ["key", "key_base64", "value", "value_base64"] {
            if !letter[name].is_null() {
                println!("  {name}: {}", text(&letter[name]));
            }
        }
        for header in each(&letter["headers"]) {
            let value = if header["value"].is_null() {
                &header["value_base64"]
            } else {
                &header["value"]
            };
            println!("  {}: {}", text(&header["name"]), text(value));
        }
    }
    if !body["next"].is_null() {
        println!("and more; --limit shows up to 500, --filter fewer");
    }
    Ok(())
}

/// Says, or does, what would have to be done for topics to be as they should be.
async fn topics(mut words: Words) -> Result<()> {
    let action = words.next("plan or apply")?;
    if !["plan", "apply"].contains(&action.as_str()) {
        return Err(Error::Usage(format!("topics {action} is not known")));
    }
    let consumer = words.option("--consumer")?;
    let topic = words.option("--topic")?;
    let retry = words.option("--retry")?;
    let config = Config::load(words.0.iter().map(Into::into)).map_err(|error| Error::Usage(error.to_string()))?;
    let log = config.open_log().await.map_err(|error| Error::Other(error.into()))?;
    let planned = plan(&log, &config, consumer, topic, retry, action == "apply").await;
    log.close().await;
    planned
}

async fn plan(
    log: &Log,
    config: &Config,
    consumer: Option<String>,
    topic: Option<String>,
    retry: Option<String>,
    apply: bool,
) -> Result<()> {
    let other = |error: Box<dyn StdError + Send + Sync>| Error::Other(error);
    let wanted = match (consumer, topic) {
        (None, None) if retry.is_none() => config.topic_specs(),
        (Some(group), Some(topic)) => {
            let mut builder = ConsumerBuilder::new(group, topic.split(','));
            if let Some(retry) = retry {
                let delays: Option<Vec<_>> = retry.split(',').map(parse_delay).collect();
                let delays = delays.ok_or_else(|| Error::Usage(format!("--retry {retry}: it is like 1s,5s,2m")))?;
                builder = builder.retry(RetryPolicy::NonBlocking(RetryTopics::new(delays)));
            }
            builder.topics(log).await.map_err(|error| other(error.into()))?
        }
        _ => {
            return Err(Error::Usage(
                "--consumer and --topic go together, --retry with them".to_owned(),
            ));
        }
    };
    let plan = log.plan_topics(&wanted).await.map_err(|error| other(error.into()))?;
    for change in &plan.changes {
        println!("{change}");
    }
    if plan.changes.is_empty() {
        println!("all topics are as they should be");
    }
    if apply {
        log.apply_topics(&plan).await.map_err(|error| other(error.into()))?;
    }
    Ok(())
}

fn each(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}

/// A value as people read it: what comes from records must not steer the terminal.
fn text(value: &Value) -> String {
    let text = match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

/// For a path or query, as RFC 3986 escapes it.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => escaped.push(byte.into()),
            byte => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}

fn print_table(rows: &[Vec<String>]) {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..columns).map(width).collect();
    for row in rows {
        let cells: Vec<_> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        println!("{}", cells.join("  ").trim_end());
    }
}

fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Words {
        Words::new(line.split(' ').map(str::to_owned).collect())
    }

    #[test]
    fn options_may_stand_anywhere() {
        let mut words = words("skip g --key=a=b t --gateway http://h 0 17");
        assert_eq!(words.option("--key").expect("a value").as_deref(), Some("a=b"));
        assert_eq!(words.option("--gateway").expect("a value").as_deref(), Some("http://h"));
        assert_eq!(words.option("--none").expect("none"), None);
        assert_eq!(words.0, ["skip", "g", "t", "0", "17"]);
    }

    #[test]
    fn what_is_missing_or_too_much_is_named() {
        let said = |error: Result<()>| error.expect_err("wrong").to_string();
        assert!(said(words("a b").end()).starts_with("a is not expected"));
        assert!(
            words("--key")
                .option("--key")
                .expect_err("wrong")
                .to_string()
                .starts_with("--key needs a value")
        );
        assert!(
            words("x")
                .number::<i32>("PARTITION")
                .expect_err("wrong")
                .to_string()
                .contains("x is not a number")
        );
        assert!(place("0-x").expect_err("wrong").to_string().contains("0-x"));
    }

    #[test]
    fn text_from_records_cannot_steer_the_terminal() {
        assert_eq!(text(&json!("a\u{1b}[2Jb\n")), "a\u{fffd}[2Jb\u{fffd}");
        assert_eq!(escaped("a b/ä"), "a%20b%2F%C3%A4");
    }
}
