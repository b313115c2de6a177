//! Programs of this workspace as separate processes, to be killed, paused and started again.
//!
//! A process ends with the test that started it, however that ends: when it is dropped, or, when the test process itself is
//! killed, by a leash that another process holds. What it wrote is kept in a file and shown when the test fails.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Ends the process whose id it is given when its standard input closes without the word `done`.
const LEASH: &str = r#"read -r word; [ "$word" = done ] || kill -9 "$1""#;

/// How long a process told to stop may take. Longer than the gateway's own grace period.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(40);

/// Lines of a process's output that a failed test shows.
const SHOWN_LINES: usize = 40;

/// A running program.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    leash: Child,
    leash_input: ChildStdin,
    output: PathBuf,
}

impl Process {
    /// Starts `program` with nothing of this process's Barnabas settings; its output is added to the file `output`.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start(program: &Path, arguments: &[String], environment: &[(String, String)], output: &Path) -> Self {
        let file = File::options()
            .create(true)
            .append(true)
            .open(output)
            .expect("the output file can be written");
        let inherited = std::env::vars_os()
            .filter_map(|(name, _)| name.into_string().ok())
            .filter(|name| name.starts_with("BARNABAS_") || name == "KAFKA_BROKERS" || name == "DATABASE_URL");
        let mut command = Command::new(program);
        for name in inherited {
            command.env_remove(name);
        }
        let child = command
            .args(arguments)
            .envs(environment.iter().map(|(name, value)| (name, value)))
            // The working directory is the test's own, so that no stray settings file is read.
            .current_dir(output.parent().expect("a file is in a folder"))
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("a file handle can be copied"))
            .stderr(file)
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        let mut leash = Command::new("sh")
            .args(["-c", LEASH, "leash", &child.id().to_string()])
            // In a process group of its own: a signal to all of a terminal's or a runner's processes leaves it, to do its work.
            .process_group(0)
            .stdin(Stdio::piped())
            .spawn()
            .expect("sh starts");
        Self {
            name: program.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            leash_input: leash.stdin.take().expect("its stdin is piped"),
            child,
            leash,
            output: output.to_owned(),
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Stops it without ending it (SIGSTOP): its sockets stay open and nothing answers.
    pub fn pause(&self) {
        self.signal(libc::SIGSTOP);
    }

    /// Lets it go on after [`Process::pause`].
    pub fn resume(&self) {
        self.signal(libc::SIGCONT);
    }

    /// Ends it as a power cut would (SIGKILL).
    pub fn kill(mut self) {
        self.end_now();
    }

    /// Asks it to stop (SIGTERM).
    pub fn terminate(&self) {
        self.signal(libc::SIGTERM);
    }

    /// Asks it to stop (SIGTERM) and waits for it.
    ///
    /// # Panics
    /// If it does not stop, or not with exit status 0.
    pub fn stop(mut self) {
        self.terminate();
        let status = self.wait(STOP_TIMEOUT);
        assert!(
            status.is_some_and(|status| status.success()),
            "{} was asked to stop and ended with {status:?}\n{}",
            self.name,
            self.last_output()
        );
    }

    /// How it ended, or None when it still runs at the deadline.
    pub fn wait(&mut self, timeout: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.try_wait() {
                return Some(status);
            }
            if Instant::now() > deadline {
                return None;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// How it ended, if it has.
    pub fn try_wait(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("our own child can be waited for")
    }

    /// Bytes of memory that it holds now (RSS).
    pub fn memory_bytes(&self) -> u64 {
        self.status_kib("VmRSS:") * 1024
    }

    /// Bytes of memory that it has held at most since it started, or since [`Process::forget_peak_memory`].
    pub fn peak_memory_bytes(&self) -> u64 {
        self.status_kib("VmHWM:") * 1024
    }

    /// Begins [`Process::peak_memory_bytes`] anew.
    pub fn forget_peak_memory(&self) {
        fs::write(format!("/proc/{}/clear_refs", self.pid()), "5").expect("our own child's peak can be reset");
    }

    /// What it wrote, all of it.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.output).unwrap_or_default()).into_owned()
    }

    /// The end of what it wrote, for the message of a failed test.
    pub fn last_output(&self) -> String {
        let output = self.output();
        let lines: Vec<&str> = output.lines().collect();
        let shown = &lines[lines.len().saturating_sub(SHOWN_LINES)..];
        format!("the last lines of {}:\n{}", self.name, shown.join("\n"))
    }

    fn status_kib(&self, field: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("our own child has a status");
        status
            .lines()
            .find_map(|line| line.strip_prefix(field))
            .and_then(|value| value.split_whitespace().next())
            .and_then(|value| value.parse().ok())
            .unwrap_or_else(|| panic!("{field} is in the status of a running process:\n{status}"))
    }

    fn signal(&self, signal: libc::c_int) {
        let pid = libc::pid_t::try_from(self.child.id()).expect("a process id is a pid_t");
        // SAFETY: kill takes no memory. The pid is our own child's, which only `&mut self` reaps, so that the number has not
        // passed to another process, or is that of its remains.
        let sent = unsafe { libc::kill(pid, signal) };
        assert_eq!(
            sent,
            0,
            "signal {signal} to {}: {}",
            self.name,
            io::Error::last_os_error()
        );
    }

    fn end_now(&mut self) {
        // An error says that it has been reaped already.
        let _ = self.child.kill();
        // The leash is told before the process is reaped: it must never kill a number that has passed to another process.
        // One that is gone has nothing left to do.
        let _ = self.leash_input.write_all(b"done\n");
        self.leash.wait().expect("our own child can be waited for");
        self.child.wait().expect("our own child can be waited for");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.last_output());
        }
        self.end_now();
    }
}

/// A program of this workspace, which stands beside the running test.
///
/// # Panics
/// If it is not built: `tests/run` builds it first, and so does `cargo build --workspace`.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("the path of the running test");
    let folder = test
        .ancestors()
        .find(|folder| folder.ends_with("deps"))
        .and_then(Path::parent)
        .or(test.parent())
        .expect("a test runs from Cargo's build folder");
    let program = folder.join(name);
    assert!(
        program.exists(),
        "{} is not built: run `cargo build --workspace` first, as tests/run does",
        program.display()
    );
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper(folder: &Path) -> Process {
        let arguments = ["-c".to_owned(), "echo here; exec sleep 600".to_owned()];
        Process::start(Path::new("/bin/sh"), &arguments, &[], &folder.join("output"))
    }

    fn runs(pid: u32) -> bool {
        Path::new(&format!("/proc/{pid}")).exists()
    }

    #[test]
    fn a_process_ends_with_its_handle() {
        let folder = tempfile::tempdir().expect("a folder");
        let process = sleeper(folder.path());
        let pid = process.pid();
        assert!(runs(pid) && process.memory_bytes() > 0);
        drop(process);
        assert!(!runs(pid));
    }

    #[test]
    fn the_leash_ends_a_process_whose_test_is_gone() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut process = sleeper(folder.path());
        // What the system does to the leash when the test process is killed: its input closes.
        let mut other = Command::new("true").stdin(Stdio::piped()).spawn().expect("true starts");
        let unused = other.stdin.take().expect("its stdin is piped");
        drop(std::mem::replace(&mut process.leash_input, unused));
        let status = process.wait(Duration::from_secs(10)).expect("it has ended");
        assert!(!status.success());
        other.wait().expect("our own child can be waited for");
    }

    #[test]
    fn output_is_kept_over_a_restart() {
        let folder = tempfile::tempdir().expect("a folder");
        for times in 1..=2 {
            let process = sleeper(folder.path());
            let deadline = Instant::now() + Duration::from_secs(10);
            while process.output().lines().count() < times {
                assert!(Instant::now() < deadline, "{}", process.output());
                std::thread::sleep(Duration::from_millis(5));
            }
            process.kill();
        }
    }
}
