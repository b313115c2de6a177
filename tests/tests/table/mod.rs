//! Tables on both logs: what they say is what stands on the topic, as others read it.

mod faults;
mod load;
mod support;
mod watch;
mod writes;
