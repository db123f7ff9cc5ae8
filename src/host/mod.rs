//! The host: its addresses, routes, bridges and sysctls.

pub mod addresses;
pub mod bridges;
pub mod routes;
pub mod sysctls;
