//! Notices about frontends that services ask for and do not get.

use std::collections::BTreeMap;
use std::mem::discriminant;

use super::claims::{Cause, Claim, Claimant, Claims, UsedAs};
use super::{Kind, Notice, ObjectName, ObjectRef, Reason, Subject};

/// How many claims of one service a notice names.
const MOST_NAMED: usize = 4;

/// One notice for each service and sort of cause, sorted by service.
pub(crate) fn notices(
    claims: &Claims,
    lost: impl IntoIterator<Item = (Claim, Claimant)>,
) -> Vec<Notice> {
    let mut by_service: BTreeMap<ObjectName, Vec<Refusal>> = BTreeMap::new();
    for (claim, claimant) in lost {
        if let Some(cause) = claims.refusal(&claim, &claimant) {
            let used_as = claimant.used_as();
            let refusals = by_service.entry(claimant.name).or_default();
            refusals.push(Refusal {
                claim,
                cause,
                used_as,
            });
        }
    }
    let mut notices = Vec::new();
    for (name, mut refusals) in by_service {
        while let Some(first) = refusals.first() {
            let sort = (discriminant(&first.cause), first.used_as);
            let is_alike = |other: &Refusal| (discriminant(&other.cause), other.used_as) == sort;
            let (alike, rest) = refusals.into_iter().partition(is_alike);
            notices.extend(notice(&name, alike));
            refusals = rest;
        }
    }
    notices
}

struct Refusal {
    claim: Claim,
    cause: Cause,
    used_as: UsedAs,
}

impl Refusal {
    /// The claim as a person knows it.
    fn what(&self) -> String {
        match (self.used_as, self.claim) {
            (UsedAs::HealthCheck, Claim::NodePort(_, port)) => {
                format!("healthCheckNodePort {port}")
            }
            (_, claim) => claim.to_string(),
        }
    }

    fn sentence(&self) -> String {
        let what = self.what();
        let leads = match self.used_as {
            UsedAs::Frontend => "lead here",
            UsedAs::HealthCheck => "answer for this one",
        };
        match &self.cause {
            Cause::Older(owner, used_as) if *used_as == self.used_as => {
                format!("{what} belongs to the older Service {owner} and does not {leads}")
            }
            Cause::Older(owner, used_as) => {
                let port = match used_as {
                    UsedAs::Frontend => "nodePort",
                    UsedAs::HealthCheck => "healthCheckNodePort",
                };
                format!("{what} is the {port} of the older Service {owner} and does not {leads}")
            }
            Cause::Stronger(owner) => {
                format!(
                    "{what} is a load balancer's address of Service {owner} and does not {leads}"
                )
            }
            Cause::ClusterIp(owner) => {
                format!("{what} does not {leads}: the address is the ClusterIP of Service {owner}")
            }
            Cause::ServiceCidr(range) => {
                format!("{what} does not {leads}: the address is in the ServiceCIDR {range}")
            }
            Cause::NodePort(owner) => {
                format!("{what} does not {leads}: Service {owner} has this NodePort on the node")
            }
            Cause::ApiServer => {
                format!("{what} does not {leads}: nftlet itself reaches the API server there")
            }
        }
    }

    fn hint(&self) -> &'static str {
        match &self.cause {
            Cause::Older(..) if self.used_as == UsedAs::HealthCheck => {
                "choose another port, or remove it there"
            }
            Cause::Older(..) | Cause::Stronger(..) => {
                "choose another address or port, or remove it there"
            }
            Cause::ClusterIp(_) | Cause::ServiceCidr(_) => {
                "remove the address from spec.externalIPs and status.loadBalancer"
            }
            Cause::NodePort(_) | Cause::ApiServer => "choose another address or port",
        }
    }
}

fn notice(name: &ObjectName, refusals: Vec<Refusal>) -> Option<Notice> {
    let (first, others) = refusals.split_first()?;
    let more = match others.len() {
        0 => String::new(),
        count => {
            let named = others.iter().take(MOST_NAMED - 1).map(Refusal::what);
            let named = named.collect::<Vec<_>>().join(", ");
            let dots = if count < MOST_NAMED { "" } else { ", ..." };
            format!(" ({count} more in the same way: {named}{dots})")
        }
    };
    Some(Notice {
        subject: Subject::Object(ObjectRef::new(Kind::Service, name.clone())),
        reason: Reason::Conflict,
        message: format!("{}{more}; {}", first.sentence(), first.hint()),
    })
}
