//! The wall clock of this process, which can be off as that of a machine can: for everything in it that asks what time it is.
//!
//! The program's own `clock_gettime` stands before libc's, as the linker has it. Monotonic time stays as it is, and so does what
//! librdkafka gives its waits to the kernel by (`gettimeofday`).

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// How far it is ahead, in milliseconds.
static AHEAD_MS: AtomicI64 = AtomicI64::new(0);

/// Puts the clock so many milliseconds ahead of the machine's, or behind it.
///
/// # Panics
/// If nobody notices: then the tests of it would prove nothing.
pub fn set_ahead(ms: i64) {
    AHEAD_MS.store(ms, Ordering::Relaxed);
    let (before_ms, now_ms, after_ms) = (machine_ms(), now_ms(), machine_ms());
    assert!(
        (before_ms + ms..=after_ms + ms).contains(&now_ms),
        "the clock says {now_ms}, {ms} ms ahead of {before_ms}"
    );
}

/// What time it is by this process's clock, in milliseconds since the Unix epoch.
pub fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// The same by the machine's clock, which is that of all processes of a test.
pub fn machine_ms() -> i64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a timespec that lives over the call.
    let result = unsafe { ask(libc::CLOCK_REALTIME, &raw mut time) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    time.tv_sec * 1000 + time.tv_nsec / 1_000_000
}

/// Asks the kernel.
///
/// # Safety
/// As `clock_gettime` of libc: `time` is valid for writing a timespec.
unsafe fn ask(clock: libc::clockid_t, time: *mut libc::timespec) -> libc::c_int {
    // SAFETY: the call has these two arguments, and the caller vouches for `time`.
    let result = unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) };
    if result == 0 { 0 } else { -1 }
}

/// What everything that is linked into this program calls in place of libc's.
///
/// # Safety
/// As of libc.
// SAFETY: it has the signature and the meaning of the function that it stands before.
#[unsafe(no_mangle)]
unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> libc::c_int {
    // SAFETY: the caller vouches for `time` as it has to for libc.
    let result = unsafe { ask(clock, time) };
    if result == 0 && clock == libc::CLOCK_REALTIME {
        let ahead_ms = AHEAD_MS.load(Ordering::Relaxed);
        // SAFETY: the kernel has just written it.
        let time = unsafe { &mut *time };
        time.tv_sec += ahead_ms.div_euclid(1000);
        time.tv_nsec += ahead_ms.rem_euclid(1000) * 1_000_000;
        if time.tv_nsec >= 1_000_000_000 {
            time.tv_sec += 1;
            time.tv_nsec -= 1_000_000_000;
        }
    }
    result
}
