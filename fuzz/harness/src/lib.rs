//! What fuzz targets share: an input read as a program, a bound on memory, and inputs to begin with.
//!
//! `fuzz/run` builds and runs all targets of all crates; each crate's are in its `fuzz/src/bin`. There is no corpus in the
//! repository: a target that has inputs to begin with writes them itself. Checksums are taken on trust in a fuzzer's build
//! (`--cfg fuzzing`), so that it comes to what is behind them.

mod heap;
mod input;

pub use heap::{Heap, bounded};
pub use input::Input;

/// Writes inputs to begin with into the directory that `FUZZ_SEEDS` names, if it does.
///
/// # Panics
///
/// If it cannot be written to.
pub fn write_seeds(seeds: impl IntoIterator<Item = Vec<u8>>) {
    let Some(directory) = std::env::var_os("FUZZ_SEEDS").map(std::path::PathBuf::from) else {
        return;
    };
    for (number, seed) in seeds.into_iter().enumerate() {
        std::fs::write(directory.join(format!("seed{number}")), seed)
            .expect("the directory can be written");
    }
}
