//! The host: its addresses, routes, bridges and sysctls.

pub(crate) mod addresses;
pub(crate) mod bridges;
pub(crate) mod routes;
pub(crate) mod sysctls;
