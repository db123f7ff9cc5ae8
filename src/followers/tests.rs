//! Followers of a reconciler that writes to a model of the kernel.

mod affinity;
mod flows;
