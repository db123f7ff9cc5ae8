//! Notices about frontends that services claim and do not get.

use std::collections::BTreeMap;
use std::mem::discriminant;

use super::claims::{Claim, Claimant, Claims, ConflictCause, UsedAs};
use crate::model::{Kind, Notice, ObjectName, ObjectRef, Reason, Subject};

/// The maximum number of claims that a notice names.
const MOST_NAMED: usize = 4;

/// The conflicts of services.
#[derive(Debug, Default)]
pub(crate) struct Conflicts(BTreeMap<ObjectName, Vec<ConflictGroup>>);

/// The claims of a service that it does not get for the same kind of cause.
#[derive(Debug)]
struct ConflictGroup {
    /// The first claims.
    named: Vec<Conflict>,
    count: usize,
}

impl Conflicts {
    /// Adds those of the claims that their claimants do not own.
    pub(crate) fn add(
        &mut self,
        claims: &Claims,
        lost: impl IntoIterator<Item = (Claim, Claimant)>,
    ) {
        for (claim, claimant) in lost {
            let Some(cause) = claims.conflict(&claim, &claimant) else {
                continue;
            };
            let used_as = claimant.used_as();
            let conflict = Conflict {
                claim,
                cause,
                used_as,
            };
            let of_service = self.0.entry(claimant.name).or_default();
            let mut others = of_service.iter_mut();
            match others.find(|group| group.fits(&conflict)) {
                Some(group) => group.add(conflict),
                None => of_service.push(ConflictGroup {
                    named: vec![conflict],
                    count: 1,
                }),
            }
        }
    }

    /// Returns one notice for each service and kind of cause, sorted by service.
    pub(crate) fn notices(self) -> Vec<Notice> {
        let mut notices = Vec::new();
        for (name, mut causes) in self.0 {
            causes.sort_by_key(|group| group.named.first().map(|conflict| conflict.claim));
            notices.extend(causes.iter().filter_map(|group| group.notice(&name)));
        }
        notices
    }
}

impl ConflictGroup {
    fn fits(&self, conflict: &Conflict) -> bool {
        let sort = |conflict: &Conflict| (discriminant(&conflict.cause), conflict.used_as);
        self.named.first().map(sort) == Some(sort(conflict))
    }

    fn add(&mut self, conflict: Conflict) {
        self.count += 1;
        let place = self.named.partition_point(|it| it.claim <= conflict.claim);
        if place < MOST_NAMED {
            self.named.insert(place, conflict);
            self.named.truncate(MOST_NAMED);
        }
    }

    fn notice(&self, name: &ObjectName) -> Option<Notice> {
        let (first, others) = self.named.split_first()?;
        let more = match self.count - 1 {
            0 => String::new(),
            count => {
                let named = others.iter().map(Conflict::what);
                let named = named.collect::<Vec<_>>().join(", ");
                let dots = if count < MOST_NAMED { "" } else { ", ..." };
                format!(" (and {count} more: {named}{dots})")
            }
        };
        Some(Notice {
            subject: Subject::Object(ObjectRef::new(Kind::Service, name.clone())),
            reason: Reason::Conflict,
            message: format!("{}{more}; {}", first.sentence(), first.hint()),
        })
    }
}

#[derive(Debug)]
struct Conflict {
    claim: Claim,
    cause: ConflictCause,
    used_as: UsedAs,
}

impl Conflict {
    /// Returns the claim in the terms of a Service object.
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
            UsedAs::Frontend => "lead to this Service",
            UsedAs::HealthCheck => "answer for this Service",
        };
        match &self.cause {
            ConflictCause::Older(owner, used_as) if *used_as == self.used_as => {
                format!("{what} belongs to the older Service {owner} and does not {leads}")
            }
            ConflictCause::Older(owner, used_as) => {
                let port = match used_as {
                    UsedAs::Frontend => "nodePort",
                    UsedAs::HealthCheck => "healthCheckNodePort",
                };
                format!("{what} is the {port} of the older Service {owner} and does not {leads}")
            }
            ConflictCause::Stronger(owner) => {
                format!(
                    "{what} is a load balancer's address of Service {owner} and does not {leads}"
                )
            }
            ConflictCause::ClusterIp(owner) => {
                format!("{what} does not {leads}: the address is the ClusterIP of Service {owner}")
            }
            ConflictCause::ServiceCidr(range) => {
                format!("{what} does not {leads}: the address is in the ServiceCIDR {range}")
            }
            ConflictCause::NodePort(owner) => {
                format!("{what} does not {leads}: the NodePort of Service {owner} answers there")
            }
            ConflictCause::ApiServer => {
                format!("{what} does not {leads}: nftlet itself reaches the API server there")
            }
        }
    }

    fn hint(&self) -> &'static str {
        match &self.cause {
            ConflictCause::Older(..) if self.used_as == UsedAs::HealthCheck => {
                "choose another port, or remove it from that Service"
            }
            ConflictCause::Older(..) | ConflictCause::Stronger(..) => {
                "choose another address or port, or remove it from that Service"
            }
            ConflictCause::ClusterIp(_) | ConflictCause::ServiceCidr(_) => {
                "remove the address from spec.externalIPs and status.loadBalancer"
            }
            ConflictCause::NodePort(_) | ConflictCause::ApiServer => {
                "choose another address or port"
            }
        }
    }
}
