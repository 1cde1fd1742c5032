//! A `fermata serve` process with a tree of its own.

use std::{
    fs::File,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, bail};
use control::Registry;
use tempfile::TempDir;

use crate::{
    console::Console,
    http::{Client, Machine},
    programs, wait,
};

/// A server. Dropped, it is killed, and so are the machines in its run directory.
#[derive(Debug)]
pub struct Server {
    process: Child,
    /// Its client.
    pub client: Client,
    directory: TempDir,
    tree: PathBuf,
    arguments: Vec<String>,
}

impl Server {
    /// Starts a server on an empty tree, with more `arguments`, and waits until it answers.
    ///
    /// # Errors
    ///
    /// When it does not come up; with what it said.
    pub fn start(arguments: &[&str]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let tree = directory.path().join("tree");
        std::fs::create_dir(&tree)?;
        Self::launch(directory, tree, arguments)
    }

    /// Starts a server on the tree `tree`, as another host does that serves it at the same path.
    ///
    /// # Errors
    ///
    /// When it does not come up; with what it said.
    pub fn serve(tree: &Path) -> Result<Self> {
        Self::launch(tempfile::tempdir()?, tree.to_owned(), &[])
    }

    fn launch(directory: TempDir, tree: PathBuf, arguments: &[&str]) -> Result<Self> {
        let arguments: Vec<String> = arguments.iter().map(|&word| word.to_owned()).collect();
        let (process, client) = launch(directory.path(), &tree, &arguments)?;
        Ok(Self {
            process,
            client,
            directory,
            tree,
            arguments,
        })
    }

    /// Kills the server, as a crash would, and starts another on the same tree.
    ///
    /// # Errors
    ///
    /// When the new one does not come up.
    pub fn crash_and_restart(&mut self) -> Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        let (process, client) = launch(self.directory.path(), &self.tree, &self.arguments)?;
        self.process = process;
        self.client = client;
        Ok(())
    }

    /// The tree that its requests are confined to.
    pub fn tree(&self) -> PathBuf {
        self.tree.clone()
    }

    /// A path in the tree, as a request would give it.
    pub fn path(&self, name: &str) -> String {
        self.tree().join(name).display().to_string()
    }

    /// Names in the tree, also hidden ones, sorted.
    ///
    /// # Errors
    ///
    /// When the tree cannot be read.
    pub fn names(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(self.tree())? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    /// The serial console of `machine`.
    ///
    /// # Errors
    ///
    /// When the machine is not known or has no console file.
    pub fn console(&self, machine: Machine) -> Result<Console> {
        let console = self.client.vm(machine.pid)?.console;
        Ok(Console::new(
            console.context("the machine has no console file")?,
        ))
    }

    /// The directory of the registry.
    pub fn run_directory(&self) -> PathBuf {
        self.directory.path().join("run")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Nobody is left to complain to.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let machines = Registry::open(self.run_directory()).and_then(|registry| registry.list());
        for record in machines.unwrap_or_default() {
            if let Ok(Some(process)) = record.process.open() {
                let _ = process.kill();
                // What it maps and writes lies in the directory that goes away next.
                let _ = wait::until("a machine to end", || {
                    (!record.process.is_alive().unwrap_or(false)).then_some(())
                });
            }
        }
    }
}

fn launch(directory: &Path, tree: &Path, arguments: &[String]) -> Result<(Child, Client)> {
    let log = directory.join("server.log");
    let port = free_port()?;
    let mut process = Command::new(programs::fermata())
        .arg("serve")
        .arg("--root")
        .arg(tree)
        .args(["--port", &port.to_string()])
        .args(arguments)
        .env("FERMATA_RUN_DIR", directory.join("run"))
        .env("FERMATA_VMM_BIN", programs::vmm())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&log)?)
        .spawn()
        .with_context(|| {
            let program = programs::fermata();
            format!(
                "cannot run {}; `cargo build --workspace` makes it",
                program.display()
            )
        })?;
    let client = Client::new(port);
    let up = wait::until("the server to answer", || {
        let answers = client
            .get("/healthz")
            .is_ok_and(|answer| answer.status == 200);
        // It may be somebody else's answer: who has not got the port ends.
        let ended = process.try_wait().ok().flatten().is_some();
        (ended || answers).then_some(!ended)
    });
    match up {
        Ok(true) => Ok((process, client)),
        Ok(false) => bail!("the server ended: {}", std::fs::read_to_string(log)?),
        Err(error) => {
            process.kill()?;
            process.wait()?;
            Err(error)
        }
    }
}

/// A port that is free now. Somebody may take it before the server does, which then says so.
fn free_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}
