//! From a request for forks to what they begin as.

use api_types::{ErrorCode, ForkRequest};
use control::{GuestClock, NetChange, Source, VsockChange, of_their_own};

use super::{attached, guest_clock, net_change, saved_files, within};
use crate::{ServerConfig, error::ApiError, tree::Tree};

/// What a `POST /fork` comes to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Fork {
    pub(crate) of: Forked,
    pub(crate) count: u32,
    pub(crate) clock: GuestClock,
    /// What the network devices are attached to, with what stands for a fork's number.
    pub(crate) net_changes: Vec<NetChange>,
}

/// What is forked.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Forked {
    /// The machine whose VMM has this process id.
    Machine(u32),
    /// A saved one.
    Saved(Source),
}

pub(crate) fn fork(
    config: &ServerConfig,
    tree: &Tree,
    request: &ForkRequest,
) -> Result<Fork, ApiError> {
    let ForkRequest {
        pid,
        cpu_snapshot_path,
        memory_snapshot_path,
        count,
        nets,
        clock,
    } = request;
    let saved = cpu_snapshot_path.is_some() || memory_snapshot_path.is_some();
    let of = match pid {
        Some(_) if saved => {
            return Err(ApiError::new(
                ErrorCode::BadRequest,
                "pid and the two paths both say what is forked; leave one out",
            ));
        }
        Some(pid) => Forked::Machine(*pid),
        None => Forked::Saved(saved_files(
            config,
            tree,
            cpu_snapshot_path,
            memory_snapshot_path,
        )?),
    };
    let count = count.unwrap_or(1);
    within("count", count.into(), 1, config.limits.vms as u64)?;
    let net_changes: Vec<_> = attached(nets)?.into_iter().map(net_change).collect();
    of_their_own(&net_changes, &VsockChange::default(), count)
        .map_err(|not| ApiError::new(ErrorCode::BadRequest, not.to_string()))?;
    Ok(Fork {
        of,
        count,
        clock: guest_clock(*clock),
        net_changes,
    })
}
