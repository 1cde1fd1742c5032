//! Another fermata, that keeps what is sent to it.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
};

use anyhow::{Context, Result};
use control::Destination;
use system_tests::programs;

/// Where snapshots that are sent are kept.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Keeps<'a> {
    /// In this store.
    InStore(&'a Path),
    /// In this directory, as files.
    InFiles(&'a Path),
}

/// A process that receives snapshots on this host. Dropped, it is killed.
#[derive(Debug)]
pub(crate) struct Receiver {
    process: Child,
    address: String,
    key_file: PathBuf,
}

impl Receiver {
    /// Starts one, with its key in `scratch`.
    pub(crate) fn start(keeps: Keeps<'_>, scratch: &Path) -> Result<Self> {
        let program = programs::fermata();
        let key_file = scratch.join("peer.key");
        let mut command = Command::new(&program);
        command.args(["receive", "--listen", "127.0.0.1:0", "--peer-key"]);
        command.arg(&key_file);
        match keeps {
            Keeps::InStore(store) => command.arg("--store").arg(store),
            Keeps::InFiles(directory) => command.arg("--into").arg(directory),
        };
        let started = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        let started = started.with_context(|| {
            let program = program.display();
            format!("cannot start {program}; build it with cargo build --release -p cli")
        });
        let mut process = started?;
        let said = process.stdout.take().context("its output is not piped")?;
        let mut lines = BufReader::new(said).lines();
        let first = lines.next().context("the receiver has ended")??;
        let address = first.split(' ').nth(3);
        let address = address.with_context(|| format!("it says {first:?}"))?;
        let address = address.to_owned();
        // It goes on to say what it receives.
        thread::spawn(move || lines.for_each(drop));
        Ok(Self {
            process,
            address,
            key_file,
        })
    }

    /// The snapshot `name` there.
    pub(crate) fn destination(&self, name: &str) -> Destination {
        Destination::Peer {
            address: self.address.clone(),
            key_file: self.key_file.clone(),
            name: name.to_owned(),
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // If it cannot be killed it has ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
