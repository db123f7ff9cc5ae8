//! The command that compares two sides.

use std::env;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::collected::{Collected, OfAgent};
use super::objects::{manifests, service_settings};
use super::{Error, print, reach, single_threaded};
use crate::engine::Engine as _;
use crate::insight::Style;
use crate::insight::diff::{Diff, compiled, json, markdown, text};
use crate::netlink::{self, Nftables};
use crate::nft::Ruleset;
use crate::policies;
use crate::services;
use crate::settings::{self, DiffOutput, Settings};

/// The exit status of sides that differ.
const DIFFERENT: u8 = 3;

/// Why sides cannot be compared.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SideError {
    #[error("{0} cannot be both sides; name a dump, agent, cluster or kernel as one of them")]
    Twice(&'static str),
    #[error("nftlet diff names manifests as A or B; leave out --manifests")]
    Manifests,
    #[error("{} has no objects that nftlet reads; name another file or directory", .0.display())]
    NoObjects(PathBuf),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Side {
    /// The objects of the agent on this node.
    Agent,
    /// Those of the API server.
    Cluster,
    /// The tables in force on this node.
    Kernel,
    /// Manifests or a dump.
    Files(PathBuf),
}

impl Side {
    fn of(name: &str) -> Self {
        match name {
            "agent" => Self::Agent,
            "cluster" => Self::Cluster,
            "kernel" => Self::Kernel,
            path => Self::Files(path.into()),
        }
    }
}

/// Compares two sides. Returns the exit status of the answer.
pub(super) fn answer(
    asked: &settings::Diff,
    settings: &Settings,
    node_name: &str,
    style: Style,
) -> Result<ExitCode, Error> {
    let sides = [&asked.a, &asked.b].map(|name| Side::of(name));
    check(&sides, settings)?;
    let runtime = single_threaded()?;
    let read = runtime.block_on(read(&sides, settings, node_name));
    // An unanswered DNS query would delay the exit.
    runtime.shutdown_background();
    let names = [&*asked.a, &*asked.b];
    let diff = match &read? {
        [Some(a), Some(b)] => Diff::new(names, [&a.facts(), &b.facts()]),
        [Some(a), None] => {
            let wanted = compiled(&a.facts());
            let in_force = in_force(&wanted)?;
            Diff::of_rules(names, a.facts().node, &wanted, in_force)
        }
        [None, b] => {
            let b = b.as_ref().ok_or(SideError::Twice("the kernel"))?;
            let wanted = compiled(&b.facts());
            Diff::of_rules(names, b.facts().node, &in_force(&wanted)?, wanted)
        }
    };
    print(|out| match asked.output {
        DiffOutput::Text => text(&diff, style, out),
        DiffOutput::Markdown => markdown(&diff, out),
        DiffOutput::Json => json(&diff, out),
    })?;
    Ok(match diff.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(DIFFERENT),
    })
}

fn check(sides: &[Side; 2], settings: &Settings) -> Result<(), SideError> {
    if !settings.manifests.is_empty() {
        return Err(SideError::Manifests);
    }
    let [a, b] = sides;
    if a != b {
        return Ok(());
    }
    match a {
        Side::Agent => Err(SideError::Twice("the agent")),
        Side::Kernel => Err(SideError::Twice("the kernel")),
        Side::Files(path) if path == Path::new("-") => Err(SideError::Twice("standard input")),
        Side::Cluster | Side::Files(_) => Ok(()),
    }
}

/// Reads the objects of both sides; the kernel has none.
async fn read(
    sides: &[Side; 2],
    settings: &Settings,
    node_name: &str,
) -> Result<[Option<Collected>; 2], Error> {
    let mut of_agent = None;
    let mut node = settings.node_name(env::var("NODE_NAME").ok(), "");
    let mut settings = settings.clone();
    if sides.contains(&Side::Agent) {
        // Both sides are compiled as by the agent.
        let asked = OfAgent::ask(&settings.socket, true).await?;
        node.clone_from(&asked.node);
        settings = Settings {
            kubeconfig: settings.kubeconfig,
            master: settings.master,
            ..asked.settings.clone()
        };
        of_agent = Some(asked.collect().await?);
    } else if sides.contains(&Side::Kernel) {
        node_name.clone_into(&mut node);
    } else if node.is_empty() {
        settings = reach::of_cluster(&settings);
    }
    let mut read = [None, None];
    for (side, read) in sides.iter().zip(&mut read) {
        *read = match side {
            Side::Agent => of_agent.take(),
            Side::Kernel => None,
            Side::Cluster => Some(objects(None, &settings, &node).await?),
            Side::Files(path) => Some(objects(Some(path), &settings, &node).await?),
        };
    }
    Ok(read)
}

/// Reads the objects of manifests, or else of the API server.
async fn objects(
    path: Option<&PathBuf>,
    settings: &Settings,
    node: &str,
) -> Result<Collected, Error> {
    let settings = Settings {
        manifests: path.cloned().into_iter().collect(),
        ..settings.clone()
    };
    let services = service_settings(&settings)?;
    let manifests = manifests(&settings, node);
    let collected = Collected::read(&settings, node, &services, manifests, true).await?;
    let missing = [collected.store.missing(), collected.engine.missing()].concat();
    if let Some(path) = path.filter(|_| !missing.is_empty()) {
        return Err(SideError::NoObjects(path.clone()).into());
    }
    Ok(collected)
}

/// Reads the tables in force.
fn in_force(wanted: &Ruleset) -> Result<Ruleset, netlink::Error> {
    Nftables::open()?.read(&[services::TABLE, policies::TABLE], wanted)
}
