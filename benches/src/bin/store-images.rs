//! Part of `cargo xtask bench store`: makes the images of guests that the store is measured with.

use std::path::PathBuf;

use anyhow::{Context, Result};
use benches::images::{self, Bench, Set};
use clap::{Parser, Subcommand};

/// Memory that behaves like a file system.
const SCRATCH: &str = "/dev/shm";

#[derive(Parser)]
#[command(about = "Boots guests that do some work, and keeps their memories")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Print the names of the sets that are not complete in a directory
    Missing {
        /// Where finished images are
        directory: PathBuf,
    },
    /// Make a set, where a Linux guest boots; its files go to the share
    Make {
        /// Its name
        set: String,
    },
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::Missing { directory } => {
            for set in Set::ALL.into_iter().filter(|set| !set.is_in(&directory)) {
                println!("{}", set.name());
            }
            Ok(())
        }
        Command::Make { set } => {
            let scratch =
                tempfile::tempdir_in(SCRATCH).context("cannot make a scratch directory")?;
            let bench = Bench::new(scratch.path())?;
            match Set::named(&set)? {
                Set::Life => images::life(&bench),
                Set::Boot(work) => images::boot(&bench, work),
                Set::Small => images::small(&bench),
                Set::Course => images::course(&bench),
            }
        }
    }
}
