//! The vsock device, as flags and files give it: with the same keys.

use std::path::PathBuf;

use anyhow::{Context, bail};
use control::{VsockChange, VsockConfig};
use schemars::JsonSchema;
use serde::Deserialize;

/// A vsock device: streams between guest and host.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Vsock {
    /// The guest's context ID.
    #[schemars(range(min = 3))]
    cid: u32,
    /// The Unix socket on which the host's side says `CONNECT <port>`. What the guest connects to port N goes to the
    /// socket of this name with `_N` after it.
    pub(crate) path: PathBuf,
}

impl From<Vsock> for VsockConfig {
    fn from(Vsock { cid, path }: Vsock) -> Self {
        Self { cid, path }
    }
}

/// Parses `cid=…,path=…`.
pub(crate) fn vsock(text: &str) -> anyhow::Result<VsockConfig> {
    let VsockChange { cid, path } = change(text)?;
    Ok(VsockConfig {
        cid: cid.context("a vsock device needs a cid, like cid=3")?,
        path: path.context("a vsock device needs a path for its socket, like path=vm.sock")?,
    })
}

/// Parses what a restored vsock device has instead of what it was saved with.
pub(crate) fn change(text: &str) -> anyhow::Result<VsockChange> {
    let mut change = VsockChange::default();
    for pair in text.split(',') {
        match pair.split_once('=') {
            Some(("cid", value)) => {
                let cid = value.parse();
                change.cid = Some(cid.with_context(|| format!("cid is {value:?}"))?);
            }
            Some(("path", value)) => change.path = Some(std::path::absolute(value)?),
            _ => bail!("{pair:?} is neither cid=NUMBER nor path=PATH"),
        }
    }
    Ok(change)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may")]

    use super::*;

    #[test]
    fn a_flag_says_both_and_a_change_what_it_likes() {
        let both = vsock("cid=3,path=/v").unwrap();
        assert_eq!((both.cid, both.path), (3, "/v".into()));
        assert_eq!(change("cid=4").unwrap().path, None);
        for text in ["", "cid=3", "path=/v", "cid=x,path=/v", "cid=3,port=4"] {
            assert!(vsock(text).is_err(), "{text}");
        }
    }
}
