//! Health placeholder until merged.
#[derive(Clone, Default)]
/// x
pub struct Health;
impl Health {
    /// x
    pub fn new() -> Self {
        Self
    }
    /// x
    pub fn queued(&self) {}
    /// x
    pub fn synced(&self) {}
    /// x
    pub fn failed(&self, _: &str) {}
    /// x
    pub fn node_going_away(&self, _: bool) {}
}
