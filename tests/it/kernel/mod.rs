//! What is written to the kernel, read back, and put back after changes by others.

mod audit;
mod counters;
mod diff;
mod everything;
mod features;
mod golden;
mod healing;
mod histories;
mod nflog;
mod parts;
mod tables;
