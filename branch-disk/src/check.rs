//! Whether a chain is what it says.

use std::{io::ErrorKind, path::Path};

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
            let problem = missing_below(path, &error).map_or_else(|| a_problem(error), Ok);
            checked.problems.push(problem?);
            return Ok(checked);
        }
    };
    if let Err(error) = sealed_below(&chain.layers) {
        checked.problems.push(a_problem(error)?);
    }
    let mut map = Map::default();
    for (index, layer) in chain.layers.iter().enumerate() {
        match check_layer(&chain, index, &mut map) {
            Ok(mapped) => checked.without_map += usize::from(!mapped),
            Err(error) => checked.problems.push(a_problem(error)?),
        }
        checked.layers += 1;
        tracing::debug!(path = %layer.path().display(), "checked");
    }
    Ok(checked)
}

/// Whether the layer has a map, if it should. `map` is that of all below, and then with it.
fn check_layer(chain: &Chain, index: usize, map: &mut Map) -> Result<bool, Error> {
    let Some(layer) = chain.layers.get(index) else {
        return Ok(true);
    };
    let bits = layer.bits()?;
    overlay(map, &bits, index as Owner + 1);
    let sealed = layer.sealed()?;
    match layer.descriptor()? {
        Some(descriptor) if sealed => {
            let stored = stored_map::load(&chain.layers[..=index], descriptor)?;
            let end = layer.header.geometry.sectors();
            if !stored.runs(0, end).eq(map.runs(0, end)) {
                return Err(Error::damaged(
                    layer.path(),
                    "its map is not what the bitmaps say",
                ));
            }
            Ok(true)
        }
        Some(_) => Err(Error::damaged(
            layer.path(),
            "it has a map and is not sealed",
        )),
        None => Ok(!sealed),
    }
}

/// The sentence of an error that tells that a file is not there on which the disk at `path` stands.
fn missing_below(path: &Path, error: &Error) -> Option<String> {
    match error {
        Error::Io {
            path: missing,
            source,
            ..
        } if source.kind() == ErrorKind::NotFound && missing != path && path.exists() => {
            Some(format!(
                "{} is not there, and {} stands on it; put it back",
                missing.display(),
                path.display()
            ))
        }
        _ => None,
    }
}

/// The sentence of an error that tells of the files and not of the host.
fn a_problem(error: Error) -> Result<String, Error> {
    match error {
        Error::Io { .. } | Error::InUse { .. } | Error::NotAllowed { .. } => Err(error),
        problem => Ok(problem.to_string()),
    }
}
