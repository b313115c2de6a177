//! A PostgreSQL of one's own, asked through `psql`, which shares no code with the importer.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::kafka::free_ports;
use crate::process::Process;

/// A server that does not answer by then has failed to start.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// Where Debian keeps the programs of each version.
const DEBIAN_VERSIONS: &str = "/usr/lib/postgresql";

/// Users as whom the server runs when this is root, which it refuses: the first that there is.
const USERS: [&str; 2] = ["postgres", "nobody"];

/// The name of its only user and the database.
const NAME: &str = "barnabas";

/// A server with an empty database. Ends, and its data goes, when dropped.
#[derive(Debug)]
pub struct Postgres {
    programs: Programs,
    port: u16,
    // Before the folder, so that it is ended first.
    process: Option<Process>,
    folder: TempDir,
}

impl Postgres {
    /// Starts a server and returns when it answers.
    ///
    /// # Panics
    /// If PostgreSQL is not installed, or does not start.
    pub fn start() -> Self {
        let programs = Programs::find();
        let [port] = free_ports();
        let folder = tempfile::Builder::new()
            .prefix("barnabas-postgres-")
            .tempdir()
            .expect("a temporary folder for PostgreSQL's data");
        if let Some(User { id, group }) = programs.user {
            chown(folder.path(), Some(id), Some(group)).expect("root can give a folder away");
        }
        let data = folder.path().join("data");
        let made = programs.run("initdb", |command| {
            command
                .args([
                    "--auth=trust",
                    "--no-sync",
                    "--encoding=UTF8",
                    "--username",
                    NAME,
                    "--pgdata",
                ])
                .arg(&data)
        });
        assert!(
            made.status.success(),
            "initdb: {}",
            String::from_utf8_lossy(&made.stderr)
        );
        let server = programs.command("postgres");
        let mut arguments: Vec<String> = server
            .get_args()
            .map(|argument| argument.to_string_lossy().into())
            .collect();
        arguments.extend([
            "-D".to_owned(),
            data.display().to_string(),
            "-p".to_owned(),
            port.to_string(),
        ]);
        for setting in ["listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off"] {
            arguments.extend(["-c".to_owned(), setting.to_owned()]);
        }
        let process = Process::start(
            Path::new(server.get_program()),
            &arguments,
            &[],
            &folder.path().join("output"),
        );
        let postgres = Self {
            programs,
            port,
            process: Some(process),
            folder,
        };
        let deadline = Instant::now() + START_TIMEOUT;
        while !postgres
            .psql("postgres", &format!("CREATE DATABASE {NAME}"))
            .status
            .success()
        {
            let output = postgres.process.as_ref().map(Process::last_output).unwrap_or_default();
            assert!(Instant::now() < deadline, "PostgreSQL does not answer\n{output}");
            std::thread::sleep(Duration::from_millis(50));
        }
        postgres
    }

    /// Where it listens.
    pub fn address(&self) -> std::net::SocketAddr {
        ([127, 0, 0, 1], self.port).into()
    }

    /// Its database as an importer is told of it, reached at an address: its own, or that of a proxy before it.
    pub fn url(&self, at: std::net::SocketAddr) -> String {
        format!("postgres://{NAME}@{at}/{NAME}?sslmode=disable")
    }

    /// The rows of an answer, with `|` between the columns.
    ///
    /// # Panics
    /// If there is none.
    pub fn query(&self, sql: &str) -> Vec<String> {
        let output = self.psql(NAME, sql);
        assert!(
            output.status.success(),
            "{sql}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        lines(&output)
    }

    /// As [`Postgres::query`]; `None`: the server refuses.
    pub fn try_query(&self, sql: &str) -> Option<Vec<String>> {
        let output = self.psql(NAME, sql);
        output.status.success().then(|| lines(&output))
    }

    fn psql(&self, database: &str, sql: &str) -> Output {
        let port = self.port.to_string();
        self.programs.run("psql", |command| {
            command
                .args([
                    "--no-psqlrc",
                    "--tuples-only",
                    "--no-align",
                    "--host",
                    "127.0.0.1",
                    "--port",
                    &port,
                ])
                .args(["--username", NAME, "--dbname", database, "--command", sql])
        })
    }
}

fn lines(output: &Output) -> Vec<String> {
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().map(str::to_owned).collect()
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // A kill would leave its children behind for a moment, and what they hold.
        let data = self.folder.path().join("data");
        self.programs.run("pg_ctl", |command| {
            command
                .args(["stop", "--silent", "--mode=immediate", "--pgdata"])
                .arg(&data)
        });
        self.process = None;
    }
}

/// Where PostgreSQL's programs are, and as whom they run.
#[derive(Debug)]
struct Programs {
    folder: PathBuf,
    /// None: as who runs the test.
    user: Option<User>,
}

#[derive(Clone, Copy, Debug)]
struct User {
    id: u32,
    group: u32,
}

impl Programs {
    fn find() -> Self {
        let versions = fs::read_dir(DEBIAN_VERSIONS)
            .into_iter()
            .flatten()
            .filter_map(Result::ok);
        let newest = versions.max_by_key(|version| version.file_name().to_string_lossy().parse::<u32>().unwrap_or(0));
        let debian = newest.map(|version| version.path().join("bin"));
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folder = debian
            .into_iter()
            .chain(std::env::split_paths(&path))
            .find(|folder| folder.join("initdb").exists() && folder.join("postgres").exists())
            .expect("PostgreSQL is needed: Debian's package postgresql, as tests/run installs it");
        let is_root = fs::metadata("/proc/self").expect("Linux").uid() == 0;
        let user = is_root.then(|| {
            let users = fs::read_to_string("/etc/passwd").expect("the users of this machine");
            let user = |name| users.lines().find_map(|line| user_of(line, name));
            USERS.into_iter().find_map(user).expect("a user who is not root")
        });
        Self { folder, user }
    }

    fn command(&self, program: &str) -> Command {
        let program = self.folder.join(program);
        let Some(User { id, group }) = self.user else {
            return Command::new(program);
        };
        let mut command = Command::new("setpriv");
        command
            .arg(format!("--reuid={id}"))
            .arg(format!("--regid={group}"))
            .arg("--clear-groups")
            .arg(program);
        command
    }

    fn run(&self, program: &str, with: impl FnOnce(&mut Command) -> &mut Command) -> Output {
        let mut command = self.command(program);
        // The present folder may be one that the other user cannot enter.
        let output = with(&mut command).current_dir("/").output();
        output.unwrap_or_else(|error| panic!("{program}: {error}"))
    }
}

/// A line of `/etc/passwd`, if it is that of the user.
fn user_of(line: &str, name: &str) -> Option<User> {
    let mut fields = line.split(':');
    (fields.next()? == name).then_some(())?;
    let id = fields.nth(1)?.parse().ok()?;
    let group = fields.next()?.parse().ok()?;
    Some(User { id, group })
}
