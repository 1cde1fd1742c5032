//! A head and everything below it, open.

use std::{
    io::ErrorKind,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use crate::{
    bits::Bits,
    error::Error,
    header::{Header, Parent, RawBase},
    layer::Layer,
    layout::{MAX_DEPTH, SECTOR_BYTES},
    map::{Map, Owner},
    media::{Lock, Media},
    stored_map,
};

/// How often a chain is opened again whose files were not to be had, and after which time: whoever merges layers locks what
/// is to be removed for a moment.
const MERGE_TRIES: u32 = 5;
const MERGE_TIME: Duration = Duration::from_millis(20);

/// What a disk is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Its head, which is not sealed, is written to.
    Write,
    /// It is only read; any layer can be the topmost.
    Read,
}

/// Which files may be part of a disk, by their canonical paths: a layer comes from somebody, and names files.
pub type Rule<'a> = dyn Fn(&Path) -> bool + 'a;

/// The [`Rule`] of who opens only what is its own.
pub fn anything(_: &Path) -> bool {
    true
}

/// What is below all layers.
#[derive(Debug)]
pub(crate) struct Bottom {
    pub(crate) media: Media,
    /// Bytes, a multiple of [`SECTOR_BYTES`].
    pub(crate) bytes: u64,
}

/// The files of a disk.
#[derive(Debug)]
pub(crate) struct Chain {
    pub(crate) bottom: Option<Bottom>,
    /// By depth, the lowest first.
    pub(crate) layers: Vec<Arc<Layer>>,
}

impl Chain {
    /// Opens the layer at `path` and all below it.
    pub(crate) fn open(path: &Path, mode: Mode, rule: &Rule<'_>) -> Result<Self, Error> {
        let path = permitted(path, rule)?;
        let mut tries = 0..MERGE_TRIES;
        loop {
            match Self::try_open(&path, mode, rule) {
                Err(error) if is_of_a_merge(&error, &path, mode) && tries.next().is_some() => {
                    std::thread::sleep(MERGE_TIME);
                }
                opened => return opened,
            }
        }
    }

    fn try_open(path: &Path, mode: Mode, rule: &Rule<'_>) -> Result<Self, Error> {
        let (write, lock) = match mode {
            Mode::Write => (true, Lock::Alone),
            Mode::Read => (false, Lock::Shared),
        };
        let head = Layer::open(path, write, Lock::Not)?;
        let locked = head.media.lock(lock);
        // Rather than that others are in the way.
        if write && head.sealed()? {
            let path = path.to_owned();
            return Err(Error::Sealed { path });
        }
        locked?;
        head.media.has_a_name()?;
        let (bottom, mut layers) = below(&head.header, path, rule)?;
        layers.push(Arc::new(head));
        Ok(Self { bottom, layers })
    }
}

/// Whether it can be that somebody merges layers, so that other files are what a moment ago these were.
fn is_of_a_merge(error: &Error, head: &Path, mode: Mode) -> bool {
    match error {
        Error::InUse { path } => mode == Mode::Read || path != head,
        Error::Io { path, source, .. } => {
            source.kind() == ErrorKind::NotFound && (path != head || head.exists())
        }
        Error::NotThere { .. } => true,
        _ => false,
    }
}

/// Checks that what stands on a layer without a seal owns nothing: a crash leaves no other, as a layer's bits are made
/// durable only after the seals below. Returns how many layers are sealed; `layers` ends with the head.
pub(crate) fn sealed_below(layers: &[Arc<Layer>]) -> Result<usize, Error> {
    let mut sealed = layers.len().saturating_sub(1);
    for pair in layers.windows(2).rev() {
        let [parent, child] = pair else { continue };
        if parent.sealed()? {
            break;
        }
        if !child.bits()?.is_empty() {
            return Err(Error::damaged(
                parent.path(),
                "it has a child and is not sealed",
            ));
        }
        sealed -= 1;
    }
    Ok(sealed)
}

/// For `map_err`: that `parent`, on which `child` stands, is not there, if that is why it was not opened.
fn not_there(parent: &Path, child: &Path) -> impl FnOnce(Error) -> Error {
    move |error| match error {
        Error::Io { source, .. } if source.kind() == ErrorKind::NotFound => Error::NotThere {
            path: parent.to_owned(),
            child: child.into(),
        },
        error => error,
    }
}

/// What `header`, of the layer at `head`, stands on; the layers by depth.
fn below(
    header: &Header,
    head: &Path,
    rule: &Rule<'_>,
) -> Result<(Option<Bottom>, Vec<Arc<Layer>>), Error> {
    let mut layers = Vec::new();
    let mut header = header.clone();
    let mut path = head.to_owned();
    let mut below_sealed = false;
    let bottom = loop {
        let (parent, id, bytes) = match &header.parent {
            Parent::Nothing => break None,
            Parent::Raw(base) => {
                let base_path = resolve(&path, &base.path);
                let opened = open_base(&base_path, Some(base), rule);
                break Some(opened.map_err(not_there(&base_path, &path))?);
            }
            Parent::Layer {
                path: parent,
                id,
                bytes,
            } => (resolve(&path, parent), *id, *bytes),
        };
        let opened = permitted(&parent, rule)
            .and_then(|parent| Ok((Layer::open(&parent, false, Lock::Shared)?, parent)));
        let (layer, parent) = opened.map_err(not_there(&parent, &path))?;
        if layer.header.id != id {
            return Err(Error::OtherLayer {
                path: parent,
                expected: id,
            });
        }
        // So a chain ends, whoever made it.
        if layer.header.depth != header.below || layer.header.geometry.bytes() != bytes {
            return Err(Error::damaged(&path, "its parent contradicts it"));
        }
        let sealed = layer.sealed()?;
        if below_sealed && !sealed {
            return Err(Error::damaged(
                &parent,
                "it lies below a sealed layer and is not sealed",
            ));
        }
        below_sealed = sealed;
        header = layer.header.clone();
        path = parent;
        layers.push(Arc::new(layer));
        if layers.len() >= MAX_DEPTH {
            return Err(Error::damaged(
                head,
                "it stands on more layers than there can be",
            ));
        }
    };
    layers.reverse();
    Ok((bottom, layers))
}

/// Opens a raw image to stand on; `known` is what it was, if it already stands under a layer.
pub(crate) fn open_base(
    path: &Path,
    known: Option<&RawBase>,
    rule: &Rule<'_>,
) -> Result<Bottom, Error> {
    let path = permitted(path, rule)?;
    let media = Media::open(&path, false, Lock::Shared, true)?;
    let bytes = media.bytes()?;
    let bottom = Bottom { media, bytes };
    if let Some(known) = known {
        let now = describe_base(&bottom)?;
        let same_file = (known.device, known.inode) == (now.device, now.inode);
        if bytes != known.bytes || (same_file && now.modified_ns != known.modified_ns) {
            return Err(Error::BaseChanged { path });
        }
    }
    if !bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(Error::BaseSize { path, bytes });
    }
    Ok(bottom)
}

/// What is written down of a raw image.
pub(crate) fn describe_base(base: &Bottom) -> Result<RawBase, Error> {
    let path = base.media.path();
    let metadata = base
        .media
        .file()
        .metadata()
        .map_err(Error::io("look at", path))?;
    // The node of a block device does not tell of writes to the device.
    let modified = metadata
        .is_file()
        .then(|| metadata.modified().ok())
        .flatten();
    let modified = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    Ok(RawBase {
        path: path.to_owned(),
        bytes: base.bytes,
        device: metadata.dev(),
        inode: metadata.ino(),
        modified_ns: modified.map_or(0, |time| time.as_nanos() as u64),
    })
}

/// The canonical path of what may be opened.
pub(crate) fn permitted(path: &Path, rule: &Rule<'_>) -> Result<PathBuf, Error> {
    let path = path.canonicalize().map_err(Error::io("open", path))?;
    if rule(&path) {
        Ok(path)
    } else {
        Err(Error::NotAllowed { path })
    }
}

/// What a layer at `path` means by `named`.
fn resolve(path: &Path, named: &Path) -> PathBuf {
    path.with_file_name("").join(named)
}

/// The map of `layers`, by depth: the highest that has one, and what those above it own.
pub(crate) fn whole_map(layers: &[Arc<Layer>]) -> Result<Map, Error> {
    let mut mapped = 0;
    let mut map = Map::default();
    for (index, layer) in layers.iter().enumerate().rev() {
        if layer.sealed()?
            && let Some(descriptor) = layer.descriptor()?
        {
            mapped = index + 1;
            map = stored_map::load(&layers[..mapped], descriptor)?;
            break;
        }
    }
    for (layer, owner) in layers.iter().zip(1..).skip(mapped) {
        overlay(&mut map, &layer.bits()?, owner);
    }
    Ok(map)
}

/// What `bits` say is `owner`'s.
pub(crate) fn overlay(map: &mut Map, bits: &Bits, owner: Owner) {
    bits.each_run(|start, end| map.set(start, end, owner));
}
