//! The addresses of the closed pod network that are known.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::delta::TableDelta;
use super::engine::Engine;
use super::isolation::Holder;
use super::layout::Direction;
use super::startup::PodNetwork;
use crate::model::{Notice, Pod, Sandbox};

impl Engine {
    /// Updates which of the addresses count as known. Call after their plans are updated.
    pub(super) fn update_known(
        &mut self,
        addresses: &BTreeSet<IpAddr>,
        routes_changed: bool,
        deltas: &mut [TableDelta; 2],
    ) {
        let Some(mut closed) = self.closed.take() else {
            return;
        };
        let check_all = routes_changed || closed.written != closed.ranges;
        closed.draft_ranges(deltas);
        for address in addresses {
            closed.set_known(*address, self.is_known(*address), deltas);
        }
        let mut checked: Vec<IpAddr> = addresses.iter().copied().collect();
        if check_all {
            checked.extend(&closed.known);
        }
        for address in checked {
            closed.check_place(address, self.pod_at(address), &self.routes);
        }
        self.closed = Some(closed);
    }

    /// Returns whether policies decide on the packets of an address: a pod of this node has it, by
    /// its status, and may have a sandbox. The address of a departed pod may belong to the next one
    /// by now, so that it counts only while both directions are isolated.
    fn is_known(&self, address: IpAddr) -> bool {
        let mut pods = self.inventory.isolating(address);
        // Cluster policies select by labels of namespaces: without its object, a policy that
        // denies may not select the pod yet.
        let is_selected = |pod: &Pod| {
            self.inventory.cluster().len() == 0
                || self.inventory.has_namespace_object(pod.name.namespace())
        };
        if pods.any(|pod| pod.evidence.sandbox != Sandbox::Gone && is_selected(pod)) {
            return true;
        }
        let plan = self.plans.get(&address);
        let isolates = |holders: &Vec<Holder>| {
            let mut profiles = holders.iter().map(|holder| &holder.profile);
            profiles.any(|profile| profile.policies.is_some())
        };
        self.inventory.departed(address).is_some()
            && plan.is_some_and(|plan| {
                let isolated = plan.holders.values().filter(|all| isolates(all));
                isolated.count() == Direction::ALL.len()
            })
    }

    /// Returns whether the rules drop packets of an address because no known pod has it. Returns
    /// false for networks given by interface, where an address does not show it.
    pub(crate) fn is_closed_to(&self, address: IpAddr) -> bool {
        self.closed.as_ref().is_some_and(|closed| {
            closed.form == PodNetwork::NodeCidr
                && closed.is_defined()
                && !closed.is_outside(address, &self.routes)
                && !self.is_known(address)
        })
    }

    /// Returns whether the pod network must be closed and the Node object does not say what it is. A
    /// Node that was not read yet, as while the API server is away, may say it later.
    pub(crate) fn node_lacks_pod_network(&self) -> bool {
        let closed = self.closed.as_ref();
        closed.is_some_and(|closed| closed.node_read && !closed.is_defined())
    }

    /// Returns whether the Nodes are listed and none says what the pod network is. For runs that
    /// read each list once.
    pub(crate) fn pod_network_never_known(&self) -> bool {
        let closed = self.closed.as_ref();
        closed.is_some_and(|closed| closed.node_listed && !closed.is_defined())
    }

    /// Returns why pods are not isolated from their first packet on, although they should be.
    ///
    /// # Errors
    ///
    /// If the pod network is not known, or a pod is outside of it.
    pub(crate) fn pod_network(&self) -> Result<(), String> {
        let Some(closed) = &self.closed else {
            return Ok(());
        };
        if !closed.is_defined() {
            let node = &self.settings.node;
            return Err(format!(
                "--pod-startup=closed waits for spec.podCIDRs of Node {node}"
            ));
        }
        match closed.outside.first_key_value() {
            None => Ok(()),
            Some((address, pod)) => Err(format!(
                "the address {address} of pod {pod} is outside of {}",
                closed.describe()
            )),
        }
    }

    /// Removes and returns the notices about addresses outside of the network.
    pub(super) fn take_place_notices(&mut self) -> Vec<Notice> {
        let closed = self.closed.as_mut();
        closed.map_or_else(Vec::new, |closed| std::mem::take(&mut closed.notices))
    }
}
