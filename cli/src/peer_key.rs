//! The key that two fermata share.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::Context;
use dedup::Key;

use crate::{machine, output};

/// Names the file, if no option does.
const VARIABLE: &str = "FERMATA_PEER_KEY";

/// Which key.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct PeerKeyArgs {
    /// The file with the key that both hosts have [default: $FERMATA_PEER_KEY]. `fermata receive` makes one.
    #[arg(long, value_name = "FILE", value_parser = machine::absolute())]
    peer_key: Option<PathBuf>,
}

impl PeerKeyArgs {
    /// The file.
    pub(crate) fn file(&self) -> anyhow::Result<PathBuf> {
        let from_environment = || env::var_os(VARIABLE).filter(|value| !value.is_empty());
        match &self.peer_key {
            Some(named) => Ok(named.clone()),
            None => from_environment()
                .map(|file| std::path::absolute(file).context("the path is empty"))
                .transpose()?
                .context("no key is named that both hosts have; name its file by --peer-key"),
        }
    }
}

/// Reads the key in `file`; if there is no such file, makes one.
pub(crate) fn read_or_make(file: &Path) -> anyhow::Result<Key> {
    if !file.exists() {
        let key = Key::create_file(file)?;
        output::say(&format!(
            "made the key file {}: who sends here needs a copy, and nobody else may have one",
            file.display()
        ));
        return Ok(key);
    }
    Ok(Key::read_file(file)?)
}
