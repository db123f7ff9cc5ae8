//! The integration tests.

mod agent;
mod circles;
mod compatibility;
mod deploy;
mod documents;
mod insight;
mod kernel;
mod laboratory;
mod layering;
mod policies;
mod services;
mod source;
mod support;
mod timed;
