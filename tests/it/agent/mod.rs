//! The whole process: what it reads, answers, logs, writes and holds.

mod bounds;
mod config;
mod descriptors;
mod events;
mod inputs;
mod logging;
mod ports;
mod process;
mod rules;
mod server;
mod signals;
mod socket;
mod without_services;
