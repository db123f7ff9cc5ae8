//! Who can connect to whom, in the whole cluster.
//!
//! Policies distinguish pods by few things. So the addresses of pods are grouped first, and the judge
//! that explains one connection is asked about one pair of each two groups:
//!
//! ```text
//!  pods ──> classes: the same answers to all conditions of policies,
//!             │      the same policies and named ports
//!             ├─> decisions: ports that each class allows to or from each other one
//!             │
//!  rows ──────┴─> cells: of pods, workloads or namespaces ──> matrix, lines, JSON, page
//! ```
//!
//! Services do not count: their addresses are translated before policies are asked.

mod asked_ports;
mod classes;
mod columns;
mod decisions;
mod expect;
mod exposed;
mod json;
mod page;
mod port_set;
mod reasons;
mod rows;
mod subjects;
mod text;

pub(crate) use asked_ports::asked_ports;
pub(crate) use columns::Columns;
pub(crate) use expect::{ExpectError, Expectation, check, expectations};
pub(crate) use exposed::exposed;
pub(crate) use json::{exposed_json, json};
pub(crate) use page::page;
pub(crate) use port_set::PortSet;
pub(crate) use rows::{Cell, Reach, ReachError, Row};
pub(crate) use subjects::{By, INTERNET};
pub(crate) use text::{exposed as exposed_text, lines, matrix};
