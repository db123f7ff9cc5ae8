//! Followers of a controller that writes to a model of the kernel.

mod affinity;
mod flows;
