//! New heads.

use std::{
    fs::OpenOptions,
    io::ErrorKind,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::{
    fs::{AtFlags, CWD, RenameFlags, renameat_with},
    io::Errno,
};

use crate::{
    chain::{Chain, Mode, Rule, describe_base, open_base},
    disk::{Disk, complete},
    error::Error,
    header::{Header, LayerId, MAX_PATH_BYTES, Parent},
    layer::Layer,
    layout::{Geometry, MAX_DEPTH},
    media::{Lock, Media, sync_directory_of},
    name,
};

/// What a new disk stands on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Foundation {
    /// Zeros.
    Nothing,
    /// A raw image: a file or a block device. It may not change as long as the disk is of use.
    Raw(PathBuf),
    /// A sealed layer, of this id if one is given.
    Layer(PathBuf, Option<LayerId>),
}

impl Disk {
    /// Makes a disk of `bytes`, or as large as what it stands on, and opens it. It is durable at once.
    ///
    /// # Errors
    ///
    /// [`Error`]; [`Error::Exists`] when there is anything at `path`.
    pub fn create(
        path: &Path,
        bytes: Option<u64>,
        on: &Foundation,
        rule: &Rule<'_>,
    ) -> Result<Self, Error> {
        let path = absolute(path)?;
        if !rule(&path) {
            return Err(Error::NotAllowed { path });
        }
        let mut depth_below = 0;
        // Open and locked from here on, and not opened a second time.
        let nothing = || Chain {
            bottom: None,
            layers: Vec::new(),
        };
        let (parent, chain) = match on {
            Foundation::Nothing => (Parent::Nothing, nothing()),
            Foundation::Raw(base) => {
                let base = open_base(base, None, rule)?;
                let mut known = describe_base(&base)?;
                known.path = reference(&path, &known.path);
                let bottom = Some(base);
                (
                    Parent::Raw(known),
                    Chain {
                        bottom,
                        ..nothing()
                    },
                )
            }
            Foundation::Layer(parent, id) => {
                let chain = Chain::open(parent, Mode::Read, rule)?;
                let (parent, depth) = on_layer(&path, &chain, *id)?;
                depth_below = depth;
                (parent, chain)
            }
        };
        let bytes = match (bytes, &parent) {
            (Some(bytes), _) => bytes,
            (None, Parent::Nothing) => return Err(Error::NoSize),
            (None, parent) => parent.bytes(),
        };
        let geometry = Geometry::of(bytes).filter(|_| parent.bytes() <= bytes);
        let header = Header {
            id: new_id(&path)?,
            geometry: geometry.ok_or(Error::Size(bytes))?,
            depth: depth_below + 1,
            below: depth_below,
            parent,
        };
        let draft = Draft::write(&path, &path, &header)?;
        Self::on(chain, draft, &path, header)
    }

    /// Makes a disk at `path` that begins as the disk `from` is now, of `bytes` if it is to be larger. Of a head the layer is sealed; what
    /// can be refused is refused before, and then nothing has changed.
    ///
    /// # Errors
    ///
    /// [`Error`]; [`Error::Exists`] when there is anything at `path`.
    pub fn branch_now(
        from: &Path,
        path: &Path,
        bytes: Option<u64>,
        rule: &Rule<'_>,
    ) -> Result<Self, Error> {
        let path = absolute(path)?;
        if !rule(&path) {
            return Err(Error::NotAllowed { path });
        }
        vacant(&path)?;
        let mut from = match Self::open(from, Mode::Write, rule) {
            Ok(from) => from,
            Err(Error::Sealed { path: layer }) => {
                return Self::create(&path, bytes, &Foundation::Layer(layer, None), rule);
            }
            Err(error) => return Err(error),
        };
        let bytes = bytes.unwrap_or(from.bytes());
        let geometry = Geometry::of(bytes).filter(|_| from.bytes() <= bytes);
        let geometry = geometry.ok_or(Error::Size(bytes))?;
        let next = from.prepare()?;
        let (on, depth) = match from.stays(next.header.geometry) {
            Some(below) => (name_of(below, &path), below.header.depth),
            None => next.as_parent_of(&path),
        };
        let header = Header {
            id: new_id(&path)?,
            geometry,
            depth: depth + 1,
            below: depth,
            parent: on,
        };
        let draft = Draft::write(&path, &path, &header)?;
        let layer = from.cut(next)?.finish()?;
        drop(from);
        let chain = Chain::open(&layer.path, Mode::Read, rule)?;
        on_layer(&path, &chain, Some(layer.id))?;
        Self::on(chain, draft, &path, header)
    }

    /// The disk whose head is `draft` and gets the name `path`, on `chain`.
    fn on(mut chain: Chain, draft: Draft, path: &Path, header: Header) -> Result<Self, Error> {
        let below = chain.layers.last();
        let kept = below.and_then(|below| keep(below, path, header.id));
        let made = draft.publish(path).and_then(|media| {
            complete(&chain.layers, chain.layers.len())
                .and_then(|()| {
                    chain.layers.push(Arc::new(Layer::new(media, header)));
                    Self::of(chain, path, Mode::Write)
                })
                .inspect_err(|_| name::discard(path))
        });
        made.inspect_err(|_| {
            if let Some(name) = &kept {
                name::discard(name);
            }
        })
    }

    /// Makes a disk that begins as the sealed layer `on` is, of this id if one is given, and opens it. Its head lies
    /// beside that layer and has a name of its own. Dropped without anything ever written to it, it is removed.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn branch(on: &Path, id: Option<LayerId>, rule: &Rule<'_>) -> Result<Self, Error> {
        let on = on.canonicalize().map_err(Error::io("open", on))?;
        let path = name::head_on(&on, new_id(&on)?)?;
        let disk = Self::create(&path, None, &Foundation::Layer(on, id), rule)?;
        Ok(disk.fleeting())
    }
}

/// The last layer of `chain` as the parent of a layer at `path`, and its depth.
fn on_layer(path: &Path, chain: &Chain, id: Option<LayerId>) -> Result<(Parent, u32), Error> {
    let Some(layer) = chain.layers.last() else {
        return Err(Error::damaged(path, "it has no layers"));
    };
    let parent = layer.path();
    if let Some(expected) = id
        && layer.header.id != expected
    {
        return Err(Error::OtherLayer {
            path: parent.to_owned(),
            expected,
        });
    }
    if !layer.sealed()? {
        return Err(Error::NotSealed {
            path: parent.to_owned(),
        });
    }
    has_room_above(&chain.layers, parent)?;
    Ok((name_of(layer, path), layer.header.depth))
}

/// Fails unless a further layer can stand on the last of `layers`, which is at `path`.
pub(crate) fn has_room_above(layers: &[Arc<Layer>], path: &Path) -> Result<(), Error> {
    let path = || path.to_owned();
    match layers.last() {
        Some(last) if last.header.depth == u32::MAX => Err(Error::Deepest { path: path() }),
        _ if layers.len() >= MAX_DEPTH => Err(Error::TooDeep { path: path() }),
        _ => Ok(()),
    }
}

/// `layer` as the parent of a layer at `path`.
pub(crate) fn name_of(layer: &Layer, path: &Path) -> Parent {
    Parent::Layer {
        path: reference(path, layer.path()),
        id: layer.header.id,
        bytes: layer.header.geometry.bytes(),
    }
}

/// Has `layer` stay for its child at `path` in another directory, where whoever merges layers does not look for it: by a second
/// name, which it gives.
fn keep(layer: &Layer, path: &Path, child: LayerId) -> Option<PathBuf> {
    if layer.path().parent() == path.parent() {
        return None;
    }
    match second_name(layer, child) {
        Ok(name) => Some(name),
        Err(error) => {
            // It may be where nobody may write, and nobody merges.
            tracing::warn!(
                "who merges layers is not told of the new disk, and could remove what it stands on: {}",
                error.with_cause()
            );
            None
        }
    }
}

/// Gives `layer` the second name for who has this id, durably; gives the name.
pub(crate) fn second_name(layer: &Layer, id: LayerId) -> Result<PathBuf, Error> {
    let name = name::kept(layer.path(), id);
    match link(&layer.media, &name) {
        // Whoever has made it may not have come to have it durable.
        Ok(()) | Err(Errno::EXIST) => {}
        // It was merged, and another file is what it was.
        Err(Errno::NOENT) => {
            std::fs::hard_link(layer.path(), &name).map_err(Error::io("name", &name))?;
        }
        Err(errno) => return Err(Error::errno("name", &name)(errno)),
    }
    sync_directory_of(&name)?;
    Ok(name)
}

/// Fails if there is anything at `path`, before much is done for it in vain.
pub(crate) fn vacant(path: &Path) -> Result<(), Error> {
    match path.symlink_metadata() {
        Ok(_) => Err(Error::Exists {
            path: path.to_owned(),
        }),
        Err(_) => Ok(()),
    }
}

/// How a layer at `path` names `other`: both are absolute.
pub(crate) fn reference(path: &Path, other: &Path) -> PathBuf {
    match other.file_name() {
        Some(name) if path.parent() == other.parent() => name.into(),
        _ => other.to_owned(),
    }
}

/// The absolute path of what need not be there yet.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf, Error> {
    let directory = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => Path::new("/"),
    };
    let directory = directory
        .canonicalize()
        .map_err(Error::io("open", directory))?;
    let name = path.file_name().ok_or_else(|| Error::Path {
        path: path.to_owned(),
    })?;
    Ok(directory.join(name))
}

pub(crate) fn new_id(path: &Path) -> Result<LayerId, Error> {
    LayerId::random().map_err(Error::io("make an id for", path))
}

/// A layer, or an image, without its name. Dropped, it is removed.
#[derive(Debug)]
pub(crate) struct Draft {
    pub(crate) media: Option<Media>,
    path: PathBuf,
}

impl Draft {
    /// Writes an empty layer that is to become `path`, and makes it durable. Until then it is called as drafts of `head` are.
    pub(crate) fn write(path: &Path, head: &Path, header: &Header) -> Result<Self, Error> {
        Self::called(name::draft(head, header.id), path, header, None)
    }

    /// As [`Draft::write`], of the next head at `path` after `head`, whose owner and permissions it has.
    pub(crate) fn after(head: &Media, path: &Path, header: &Header) -> Result<Self, Error> {
        Self::called(name::draft(path, header.id), path, header, Some(head))
    }

    /// As [`Draft::write`], of a name that nobody else has who writes the same layer.
    pub(crate) fn of_its_own(path: &Path, header: &Header) -> Result<Self, Error> {
        Self::called(name::draft(path, new_id(path)?), path, header, None)
    }

    /// An empty file that is to become the image `path`.
    pub(crate) fn of_an_image(path: &Path) -> Result<Self, Error> {
        let draft = name::draft(path, new_id(path)?);
        let media = locked(&draft, path)?;
        #[cfg(test)]
        crate::tape::linked(media.file(), &draft);
        Ok(Self {
            media: Some(media),
            path: draft,
        })
    }

    fn called(
        draft: PathBuf,
        path: &Path,
        header: &Header,
        after: Option<&Media>,
    ) -> Result<Self, Error> {
        let page = header.encode().ok_or_else(|| Error::Path {
            path: path.to_owned(),
        })?;
        // It will have a longer name, by which its children will have to name it.
        name::sealed(path, header.id)?;
        if path.as_os_str().len() + 64 > MAX_PATH_BYTES {
            return Err(Error::Path {
                path: path.to_owned(),
            });
        }
        // From here on it is removed if anything fails.
        let draft = Self {
            media: Some(locked(&draft, path)?),
            path: draft,
        };
        if let Some(media) = &draft.media {
            let bytes = header.geometry.map_at();
            media
                .file()
                .set_len(bytes)
                .map_err(Error::io("create", path))?;
            #[cfg(test)]
            {
                crate::tape::created(media.file());
                crate::tape::linked(media.file(), &draft.path);
            }
            if let Some(Err(error)) = after.map(|after| media.belong_as(after)) {
                // Whoever may write to somebody else's disk need not be able to give files away.
                tracing::warn!(
                    "{} becomes the caller's own: {}",
                    path.display(),
                    error.with_cause()
                );
            }
            media.write(&page[..], 0)?;
            media
                .file()
                .sync_all()
                .map_err(Error::io("make durable", path))?;
            #[cfg(test)]
            crate::tape::synced(media.file());
        }
        Ok(draft)
    }

    /// Where it is as long as it has no name.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Changes its lock.
    pub(crate) fn lock(&self, lock: Lock) -> Result<(), Error> {
        self.media.as_ref().map_or(Ok(()), |media| media.lock(lock))
    }

    /// Gives it its name, which nothing may have, and gives its file. It does not keep the name if that cannot be made durable.
    pub(crate) fn publish(mut self, path: &Path) -> Result<Media, Error> {
        match self.link(path) {
            // A file system without hard links, to which an image may be exported.
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::PermissionDenied => {
                self.rename_to(path)?;
            }
            linked => linked?,
        }
        let media = self.media.take();
        name::discard(&self.path);
        sync_directory_of(path).inspect_err(|_| name::discard(path))?;
        media.ok_or_else(|| Error::damaged(path, "its draft is gone"))
    }

    /// Gives it a further name, which nothing may have.
    pub(crate) fn link(&self, path: &Path) -> Result<(), Error> {
        let Some(media) = &self.media else {
            return Ok(());
        };
        link(media, path).map_err(not_named(path))
    }

    /// Gives it another name, which nothing may have.
    fn rename_to(&self, path: &Path) -> Result<(), Error> {
        renameat_with(CWD, &self.path, CWD, path, RenameFlags::NOREPLACE).map_err(not_named(path))
    }

    /// Gives it the name of what it follows.
    pub(crate) fn replace(mut self, path: &Path) -> Result<Media, (Error, Self)> {
        if let Err(source) = std::fs::rename(&self.path, path) {
            return Err((Error::io("rename a layer to", path)(source), self));
        }
        #[cfg(test)]
        crate::tape::renamed(&self.path, path);
        match self.media.take() {
            Some(media) => Ok(media),
            None => Err((Error::damaged(path, "its draft is gone"), self)),
        }
    }
}

/// A new file `draft`, which is to become `path`, and which nobody takes for what a crash has left.
fn locked(draft: &Path, path: &Path) -> Result<Media, Error> {
    loop {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(draft)
            .map_err(Error::io("create", path))?;
        // Who removes what was left may have come between the two, and removes it.
        file.lock().map_err(Error::io("lock", draft))?;
        let media = Media::new(file, path);
        if media.names()? > 0 {
            return Ok(media);
        }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Renamed, it gave its file away.
        if self.media.is_some() {
            name::discard(&self.path);
        }
    }
}

/// Why what was to be called `path` is not.
fn not_named(path: &Path) -> impl FnOnce(Errno) -> Error {
    move |errno| match errno {
        Errno::EXIST => Error::Exists {
            path: path.to_owned(),
        },
        errno => Error::errno("name", path)(errno),
    }
}

/// Gives an open file a further name.
pub(crate) fn link(media: &Media, path: &Path) -> Result<(), Errno> {
    let ours = format!("/proc/self/fd/{}", media.file().as_raw_fd());
    rustix::fs::linkat(CWD, &ours, CWD, path, AtFlags::SYMLINK_FOLLOW)?;
    #[cfg(test)]
    crate::tape::linked(media.file(), path);
    Ok(())
}
