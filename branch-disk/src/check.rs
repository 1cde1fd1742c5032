//! Whether a chain is what it says.

use std::path::Path;

use crate::{
    chain::{Chain, Mode, Rule, overlay, sealed_below},
    error::Error,
    map::{Map, Owner},
    stored_map,
};

/// What a check has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Layers that were looked at.
    pub layers: usize,
    /// What is wrong, in sentences that name the file.
    pub problems: Vec<String>,
    /// Sealed layers that lack a map of their own: slower to open, but right.
    pub without_map: usize,
}

/// Reads everything of a chain but its data, and compares every map with the bitmaps that it sums up.
///
/// # Errors
///
/// [`Error`] when a file cannot be looked at; what is wrong with one is no error but a problem.
pub fn check(path: &Path, rule: &Rule<'_>) -> Result<Checked, Error> {
    let mut checked = Checked::default();
    let chain = match Chain::open(path, Mode::Read, rule) {
        Ok(chain) => chain,
        Err(error) => {
            checked.problems.push(a_problem(error)?);
            return Ok(checked);
        }
    };
    if let Err(error) = sealed_below(&chain.layers) {
        checked.problems.push(a_problem(error)?);
    }
    let mut map = Some(Map::default());
    for (index, layer) in chain.layers.iter().enumerate() {
        match check_layer(&chain, index, &mut map) {
            Ok(mapped) => checked.without_map += usize::from(!mapped),
            Err(error) => {
                let problem = a_problem(error)?;
                if !checked.problems.contains(&problem) {
                    checked.problems.push(problem);
                }
            }
        }
        checked.layers += 1;
        tracing::debug!(path = %layer.path().display(), "checked");
    }
    Ok(checked)
}

/// Whether the layer has a map, if it should. `map` is that of all below, and then with it; `None` when it cannot be told what they own.
fn check_layer(chain: &Chain, index: usize, map: &mut Option<Map>) -> Result<bool, Error> {
    let Some(layer) = chain.layers.get(index) else {
        return Ok(true);
    };
    // What is damaged below says nothing of this layer.
    let below = map.take();
    let stored = match layer.descriptor()? {
        Some(descriptor) if layer.sealed()? => {
            Some(stored_map::load(&chain.layers[..=index], descriptor))
        }
        _ => None,
    };
    let bits = layer.bits();
    let summed = below.zip(bits.as_ref().ok()).map(|(mut map, bits)| {
        overlay(&mut map, bits, index as Owner + 1);
        map
    });
    let Some(stored) = stored else {
        *map = summed;
        bits?;
        return Ok(!layer.sealed()?);
    };
    let stored = match (stored, summed) {
        (Ok(stored), Some(summed)) => {
            let end = layer.header.geometry.sectors();
            let same = stored.runs(0, end).eq(summed.runs(0, end));
            *map = Some(summed);
            same.then_some(())
                .ok_or("its map is not what the bitmaps say")
        }
        // The map may be the one that is right.
        (Ok(stored), None) => {
            *map = Some(stored);
            Ok(())
        }
        (Err(error), summed) => {
            *map = summed;
            bits?;
            return Err(error);
        }
    };
    bits?;
    stored.map_err(|what| Error::damaged(layer.path(), what))?;
    Ok(true)
}

/// The sentence of an error that tells of the files and not of the host.
fn a_problem(error: Error) -> Result<String, Error> {
    match error {
        Error::Io { .. } | Error::InUse { .. } | Error::NotAllowed { .. } => Err(error),
        problem => Ok(problem.to_string()),
    }
}
