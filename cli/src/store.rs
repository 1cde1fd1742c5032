//! The store that a command works with.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};
use control::StoreLocation;
use dedup::{CreateOptions, DEFAULT_LEVEL, Key, OpenOptions, Store};

use snapshot::StoreAt;

use crate::machine;

/// Names the store, if no option does.
const VARIABLE: &str = "FERMATA_STORE";
/// Names the key file, if no option does.
const KEY_VARIABLE: &str = "FERMATA_KEY_FILE";

/// Which store.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct StoreArgs {
    /// The directory of the store of snapshots [default, where one is needed: $FERMATA_STORE, or one of
    /// this user's].
    #[arg(long, global = true, value_name = "DIR", value_parser = machine::absolute())]
    store: Option<PathBuf>,
    /// The file with the key of an encrypted store [default: $FERMATA_KEY_FILE].
    #[arg(long, global = true, value_name = "FILE", value_parser = machine::absolute())]
    key_file: Option<PathBuf>,
}

impl StoreArgs {
    /// The store that the command line names, if it names one, which is there.
    pub(crate) fn named(&self) -> anyhow::Result<Option<StoreLocation>> {
        let Some(directory) = self.store.clone() else {
            ensure!(
                self.key_file.is_none(),
                "--key-file is the key of a store, and none is named; name it by --store"
            );
            return Ok(None);
        };
        let location = StoreLocation {
            directory,
            key_file: self.key_file()?,
        };
        open(&location)?;
        Ok(Some(location))
    }

    /// The store that is named by the command line, by the environment, or by nobody: then this user's own.
    pub(crate) fn location(&self) -> anyhow::Result<StoreLocation> {
        let directory = match self.store.clone() {
            Some(named) => named,
            None => match variable(VARIABLE)? {
                Some(named) => named,
                None => own_store()?,
            },
        };
        Ok(StoreLocation {
            directory,
            key_file: self.key_file()?,
        })
    }

    /// As [`StoreArgs::location`], for a command that adds to it: this user's own store is made by the first.
    pub(crate) fn location_to_fill(&self) -> anyhow::Result<StoreLocation> {
        let location = self.location()?;
        let nobody_named_it = self.store.is_none() && variable(VARIABLE)?.is_none();
        if nobody_named_it && location.key_file.is_none() {
            match at(&location).open() {
                Err(snapshot::Error::Store {
                    cause: dedup::Error::NoStore,
                    ..
                }) => make_or_find(&location)?,
                opened => drop(opened?),
            }
        }
        Ok(location)
    }

    /// Opens it for what needs no key, unless one is named.
    pub(crate) fn open_for_order(&self) -> anyhow::Result<Store> {
        let location = self.location()?;
        let keyless = Store::open_dir_without_key(&location.directory, OpenOptions::default())
            .with_context(|| shown(&location))?;
        // The environment's key may be another store's. What reads or writes content insists on it: else somebody who
        // puts a plain store in the place of an encrypted one would be believed, and told.
        let is_for_another = self.key_file.is_none() && !keyless.is_encrypted();
        if location.key_file.is_none() || is_for_another {
            return Ok(keyless);
        }
        open(&location)
    }

    /// Opens it.
    pub(crate) fn open(&self) -> anyhow::Result<Store> {
        open(&self.location()?)
    }

    fn key_file(&self) -> anyhow::Result<Option<PathBuf>> {
        match self.key_file.clone() {
            Some(named) => Ok(Some(named)),
            None => variable(KEY_VARIABLE),
        }
    }
}

/// Makes a store, unless somebody else was faster.
fn make_or_find(location: &StoreLocation) -> anyhow::Result<()> {
    match create(location, DEFAULT_LEVEL) {
        Err(e) if matches!(e.downcast_ref(), Some(dedup::Error::StoreExists)) => Ok(()),
        made => made.map(drop),
    }
}

/// Makes a store, encrypted if a key file is named, which compresses at this level, and opens it.
pub(crate) fn create(location: &StoreLocation, level: i32) -> anyhow::Result<Store> {
    let key = key(location)?;
    let options = OpenOptions {
        key: key.clone(),
        ..OpenOptions::default()
    };
    let create = CreateOptions {
        key,
        level,
        ..CreateOptions::default()
    };
    Store::create_dir(&location.directory, &create, options).with_context(|| shown(location))
}

fn open(location: &StoreLocation) -> anyhow::Result<Store> {
    Ok(at(location).open()?)
}

/// As the crate `snapshot` has it.
pub(crate) fn at(location: &StoreLocation) -> StoreAt<'_> {
    StoreAt {
        directory: &location.directory,
        key_file: location.key_file.as_deref(),
    }
}

fn key(location: &StoreLocation) -> anyhow::Result<Option<Key>> {
    Ok(location
        .key_file
        .as_deref()
        .map(Key::read_file)
        .transpose()?)
}

fn shown(location: &StoreLocation) -> String {
    location.directory.display().to_string()
}

fn variable(name: &str) -> anyhow::Result<Option<PathBuf>> {
    env::var_os(name)
        .filter(|value| !value.is_empty())
        .map(|value| std::path::absolute(value).context("the path is empty"))
        .transpose()
}

/// `$XDG_DATA_HOME/fermata/store`, as the XDG Base Directory Specification has it.
fn own_store() -> anyhow::Result<PathBuf> {
    let absolute = |name| {
        env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    absolute("XDG_DATA_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/share")))
        .map(|data| data.join(Path::new("fermata/store")))
        .context("no store is named, and there is no home directory for one; name it by --store")
}
