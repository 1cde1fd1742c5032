//! A disk that is open.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{
    bits::Bits,
    chain::{Bottom, Chain, Mode, Rule, overlay, sealed_below, whole_map},
    create::{Draft, Foundation, second_name},
    error::Error,
    header::{LayerId, Parent},
    io::{Sink, Source, Space},
    layer::Layer,
    layout::{Geometry, SECTOR_BYTES},
    map::{BOTTOM, Map, Owner},
    media::Lock,
    name,
    seal::{Cut, LayerRef, Next, Plan, Seal, is},
};

/// A disk that is open. Dropped, it is flushed as well as can be.
#[derive(Debug)]
pub struct Disk {
    /// The head's.
    pub(crate) path: PathBuf,
    pub(crate) bottom: Option<Arc<Bottom>>,
    /// By depth; the last is the head.
    pub(crate) layers: Vec<Arc<Layer>>,
    pub(crate) geometry: Geometry,
    pub(crate) map: Map,
    /// What the head owns.
    pub(crate) bits: Bits,
    /// Whether the head's file may have anything that is not durable.
    pub(crate) unsynced: bool,
    /// Layers whose sealing is not finished, from the lowest.
    pub(crate) seals: Vec<Arc<Seal>>,
    pub(crate) mode: Mode,
    /// A sync has failed: what is durable cannot be known any more.
    pub(crate) failed: bool,
    pub(crate) lookups: AtomicU64,
    /// Nobody knows its name: it goes if nothing comes of it.
    pub(crate) fleeting: bool,
    /// Something was written to it.
    pub(crate) touched: bool,
    /// Another has taken its head's place, and nobody needs what is in it.
    pub(crate) replaced: bool,
}

/// What a disk has done since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// How often the map was asked.
    pub lookups: u64,
    /// Reads of the raw image below all layers.
    pub base_reads: u64,
    /// Reads of layers.
    pub layer_reads: u64,
}

/// A layer that a snapshot may need which has no content of its disks, and of which nobody else can tell.
#[derive(Debug)]
#[must_use]
pub struct ToKeep(Arc<Layer>);

impl ToKeep {
    /// Has it stay, if it is sealed, by a second name, also when whoever made it merges it. This may sync a directory; the disk may be in
    /// use meanwhile.
    ///
    /// # Errors
    ///
    /// [`Error`]: the layer may go then.
    pub fn keep(self) -> Result<(), Error> {
        let Self(layer) = self;
        if layer.sealed()? {
            second_name(&layer, layer.header.id)?;
        }
        Ok(())
    }
}

impl Disk {
    /// Opens a disk by its head or, to be read, by any of its layers.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn open(path: &Path, mode: Mode, rule: &Rule<'_>) -> Result<Self, Error> {
        let chain = Chain::open(path, mode, rule)?;
        if let [below @ .., head] = &*chain.layers
            && mode == Mode::Write
        {
            // The next head would get this name, and be its own parent.
            let path = head.path();
            if name::sealed(path, head.header.id).is_ok_and(|sealed| sealed == path) {
                return Err(Error::SealedName {
                    path: path.to_owned(),
                });
            }
            complete(below, sealed_below(&chain.layers)?)?;
        }
        Self::of(chain, path, mode)
    }

    /// A disk that stands on nothing and has no name yet. The draft, which has it locked, must outlive it.
    pub(crate) fn of_draft(draft: &Draft) -> Result<Self, Error> {
        let head = Layer::open(draft.path(), true, Lock::Not)?;
        let layers = vec![Arc::new(head)];
        let bottom = None;
        Self::of(Chain { bottom, layers }, draft.path(), Mode::Write)
    }

    /// A disk of layers that are open, as [`Disk::open`] makes it of those that are durable.
    pub(crate) fn of(chain: Chain, path: &Path, mode: Mode) -> Result<Self, Error> {
        let Chain { bottom, layers } = chain;
        let (Some(head), below) = (layers.last(), &layers[..layers.len() - 1]) else {
            return Err(Error::damaged(path, "it has no layers"));
        };
        let bits = head.bits()?;
        sealed_below(&layers)?;
        let (path, geometry) = (head.path().to_owned(), head.header.geometry);
        let map = if mode == Mode::Read && head.descriptor()?.is_some() {
            whole_map(&layers)?
        } else {
            let mut map = whole_map(below)?;
            overlay(&mut map, &bits, layers.len() as Owner);
            map
        };
        Ok(Self {
            path,
            bottom: bottom.map(Arc::new),
            geometry,
            layers,
            map,
            bits,
            // Another process may have written and not synced.
            unsynced: true,
            seals: Vec::new(),
            mode,
            failed: false,
            lookups: AtomicU64::new(0),
            fleeting: false,
            touched: false,
            replaced: false,
        })
    }

    /// Its layer `id`, to be kept.
    pub fn to_keep(&self, id: LayerId) -> Option<ToKeep> {
        let layer = self.layers.iter().find(|layer| layer.header.id == id)?;
        Some(ToKeep(Arc::clone(layer)))
    }

    /// When nothing is ever written to it, it is removed as it is dropped.
    pub(crate) fn fleeting(mut self) -> Self {
        self.fleeting = true;
        self
    }

    /// The head's absolute path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size of the disk.
    pub fn bytes(&self) -> u64 {
        self.geometry.bytes()
    }

    /// The id of the topmost layer.
    pub fn id(&self) -> Option<LayerId> {
        self.layers.last().map(|head| head.header.id)
    }

    /// The ids of the layers below its head, the lowest first.
    pub fn sealed_layers(&self) -> Vec<LayerId> {
        let below = &self.layers[..self.layers.len().saturating_sub(1)];
        below.iter().map(|layer| layer.header.id).collect()
    }

    /// Whether anything was written to it since it was opened.
    pub fn is_touched(&self) -> bool {
        self.touched
    }

    /// Removes its head, with what was written to it. It must not be used any more.
    pub fn abandon(&mut self) {
        if self.mode == Mode::Write && !self.replaced {
            self.replaced = true;
            name::discard(&self.path);
        }
    }

    /// Whether it is open for reading only.
    pub fn read_only(&self) -> bool {
        self.mode == Mode::Read
    }

    /// Reads at `offset` until `sink` is full; both whole sectors.
    ///
    /// # Errors
    ///
    /// `InvalidInput` beyond the disk; what the host says.
    pub fn read(&self, offset: u64, sink: &mut (impl Sink + ?Sized)) -> io::Result<()> {
        let (mut at, end) = self.sectors(offset, sink.len())?;
        while at < end {
            self.lookups.fetch_add(1, Ordering::Relaxed);
            let run = self.map.run_at(at, end);
            let (offset, len) = (at * SECTOR_BYTES, (run.end - at) * SECTOR_BYTES);
            match run.owner.checked_sub(1) {
                None => self.read_bottom(offset, len, sink)?,
                Some(index) => {
                    let layer = self.layers.get(usize::from(index));
                    let layer = layer.ok_or(io::ErrorKind::InvalidData)?;
                    let data_at = layer.header.geometry.data_at();
                    layer.media.fill(sink, data_at + offset, len)?;
                }
            }
            at = run.end;
        }
        Ok(())
    }

    /// What is below all layers: the base, and zeros where it has ended.
    fn read_bottom(
        &self,
        offset: u64,
        len: u64,
        sink: &mut (impl Sink + ?Sized),
    ) -> io::Result<()> {
        let mut there = 0;
        if let Some(base) = &self.bottom {
            there = base.bytes.saturating_sub(offset).min(len);
            if there > 0 {
                base.media.fill(sink, offset, there)?;
            }
        }
        sink.zero(len - there);
        Ok(())
    }

    /// Writes all of `source` at `offset`; both whole sectors. Nothing is read for it.
    ///
    /// # Errors
    ///
    /// `InvalidInput` beyond the disk; what the host says. The sectors then have their old or their new content, each.
    pub fn write(&mut self, offset: u64, source: &mut (impl Source + ?Sized)) -> io::Result<()> {
        let (start, end) = self.sectors(offset, source.len())?;
        let head = self.writable()?;
        let at = head.header.geometry.data_at() + offset;
        self.unsynced = true;
        head.media.drain(source, at)?;
        self.own(start, end);
        Ok(())
    }

    /// Makes `len` bytes at `offset` read as zeros, and gives their space back.
    ///
    /// # Errors
    ///
    /// As of [`Disk::write`].
    pub fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.write_zeroes(offset, len, Space::Free)
    }

    /// Makes `len` bytes at `offset` read as zeros.
    ///
    /// # Errors
    ///
    /// As of [`Disk::write`].
    pub fn write_zeroes(&mut self, offset: u64, len: u64, space: Space) -> io::Result<()> {
        let (start, end) = self.sectors(offset, len)?;
        if start == end {
            return Ok(());
        }
        let head = self.writable()?;
        if space == Space::Free && self.is_zeros(start, end) {
            return Ok(());
        }
        // Also where the head owns nothing: a process that ended early may have left something there.
        let at = head.header.geometry.data_at() + offset;
        self.unsynced = true;
        head.media.zero(at, len, space)?;
        self.own(start, end);
        Ok(())
    }

    /// Whether these sectors are zeros because nothing is there.
    fn is_zeros(&self, start: u64, end: u64) -> bool {
        let run = self.map.run_at(start, end);
        let base = self.bottom.as_ref().map_or(0, |base| base.bytes);
        run.owner == BOTTOM && run.end == end && base <= start * SECTOR_BYTES
    }

    fn own(&mut self, start: u64, end: u64) {
        self.touched = true;
        self.map.set(start, end, self.layers.len() as Owner);
        self.bits.set(start, end);
    }

    /// The first byte at or after `offset` that may be other than zero; the disk's end, if none is.
    pub(crate) fn next_data(&self, offset: u64) -> u64 {
        if offset >= self.bytes() {
            return self.bytes();
        }
        let base = self.bottom.as_ref().map_or(0, |base| base.bytes);
        let end = self.geometry.sectors();
        let run = self.map.run_at(offset / SECTOR_BYTES, end);
        match run.owner {
            BOTTOM if offset >= base => run.end * SECTOR_BYTES,
            _ => offset,
        }
    }

    /// Makes everything durable that was written before.
    ///
    /// # Errors
    ///
    /// What the host says. It can be tried again; but if it was a sync that failed, then every write, every flush and every
    /// cut fails from then on.
    pub fn flush(&mut self) -> Result<(), Error> {
        if self.mode == Mode::Read {
            return Ok(());
        }
        self.trusted()?;
        for seal in &self.seals {
            if let Err(error) = seal.make_durable() {
                self.failed = seal.has_failed();
                return Err(error);
            }
        }
        self.seals.retain(|seal| !seal.is_finished());
        if self.unsynced {
            self.sync_head()?;
        }
        if self.bits.is_dirty() {
            // Also if this fails: pages that were written must be durable before anything is written over their twins.
            self.unsynced = true;
            if let Some(head) = self.layers.last() {
                self.bits.write(&head.media, head.header.id)?;
            }
            self.sync_head()?;
        }
        Ok(())
    }

    fn sync_head(&mut self) -> Result<(), Error> {
        if let Some(head) = self.layers.last() {
            head.media.sync().inspect_err(|_| self.failed = true)?;
        }
        self.unsynced = false;
        Ok(())
    }

    /// Fails if a sync has.
    fn trusted(&self) -> Result<(), Error> {
        if self.failed {
            return Err(Error::damaged(&self.path, "an earlier sync of it failed"));
        }
        Ok(())
    }

    /// From which the next head can be made, without holding this disk up.
    pub fn plan(&self) -> Plan {
        Plan {
            path: self.path.clone(),
            layers: self.layers.clone(),
            geometry: self.geometry,
        }
    }

    /// Makes the next head ready.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn prepare(&self) -> Result<Next, Error> {
        self.plan().prepare()
    }

    /// The layer below the head, if that is the cut and the head stays before a next one of this geometry.
    pub(crate) fn stays(&self, next: Geometry) -> Option<&Layer> {
        match &*self.layers {
            [.., below, _] if self.bits.is_empty() => {
                let same = below.header.geometry == self.geometry && next == self.geometry;
                same.then_some(below)
            }
            _ => None,
        }
    }

    /// Ends the head and goes on with `next`, in constant time. When nothing was written to the head and it is as large as the
    /// layer below and as `next`, it stays and the cut is that layer. When this fails, nothing has changed.
    ///
    /// # Errors
    ///
    /// [`Error`]; [`Error::OtherLayer`] when `next` is not the next of this head.
    pub fn cut(&mut self, mut next: Next) -> Result<Cut, Error> {
        self.trusted()?;
        let Some(head) = self.layers.last() else {
            return Err(Error::damaged(&self.path, "it has no layers"));
        };
        let follows =
            matches!(&next.header.parent, Parent::Layer { id, .. } if *id == head.header.id);
        if !follows || self.mode == Mode::Read {
            return Err(Error::OtherLayer {
                path: self.path.clone(),
                expected: head.header.id,
            });
        }
        if let Some(below) = self.stays(next.header.geometry) {
            let layer = LayerRef {
                path: below.path().to_owned(),
                id: below.header.id,
            };
            return Ok(Cut {
                layer,
                seals: self.seals.clone(),
            });
        }
        // Whatever somebody has put in its place is not to be replaced.
        if !is(&self.path, head)? {
            return Err(Error::OtherLayer {
                path: self.path.clone(),
                expected: head.header.id,
            });
        }
        let Some(draft) = next.draft.take() else {
            return Err(Error::damaged(&self.path, "its draft is gone"));
        };
        let media = draft.replace(&self.path).map_err(|(error, draft)| {
            next.draft = Some(draft);
            error
        })?;
        head.rename(&next.sealed);
        self.geometry = next.header.geometry;
        let bits = std::mem::replace(&mut self.bits, Bits::none(self.geometry));
        let layers = std::mem::take(&mut next.layers);
        let seal = Seal::new(layers, Arc::clone(head), next.sealed.clone(), bits);
        let layer = seal.reference();
        self.seals.push(Arc::new(seal));
        let header = next.header.clone();
        self.layers.push(Arc::new(Layer::new(media, header)));
        self.unsynced = false;
        Ok(Cut {
            layer,
            seals: self.seals.clone(),
        })
    }

    /// Makes a disk that [`Disk::branch`] has made what it was then: as the sealed layer `on`, and of its size. What was written
    /// since is lost, but for what was sealed. Where nothing was written, nothing is done; else its head is removed and another made,
    /// which syncs files.
    ///
    /// # Errors
    ///
    /// [`Error`]; the disk must not be used then.
    pub fn start_over(&mut self, on: &LayerRef, rule: &Rule<'_>) -> Result<(), Error> {
        if self.is_as(on.id) {
            return Ok(());
        }
        // They belong to snapshots.
        for seal in &self.seals {
            if let Err(error) = seal.make_durable() {
                tracing::warn!(path = %self.path.display(), "a sealed layer may not be durable: {}", error.with_cause());
            }
        }
        if let Some(head) = self.layers.last()
            && !is(&self.path, head)?
        {
            return Err(Error::OtherLayer {
                path: self.path.clone(),
                expected: head.header.id,
            });
        }
        name::discard(&self.path);
        let on = Foundation::Layer(on.path.clone(), Some(on.id));
        let anew = Self::create(&self.path, None, &on, rule)?.fleeting();
        let mut old = std::mem::replace(self, anew);
        old.replaced = true;
        Ok(())
    }

    /// Whether it has the content and the size of the layer `id` because it stands on that, and nothing was written to its head.
    fn is_as(&self, id: LayerId) -> bool {
        match &*self.layers {
            [.., below, _] => {
                self.bits.is_empty()
                    && below.header.id == id
                    && below.header.geometry == self.geometry
            }
            _ => false,
        }
    }

    /// What it has done since it was opened.
    pub fn counts(&self) -> Counts {
        Counts {
            lookups: self.lookups.load(Ordering::Relaxed),
            base_reads: self.bottom.as_ref().map_or(0, |base| base.media.reads()),
            layer_reads: self.layers.iter().map(|layer| layer.media.reads()).sum(),
        }
    }

    pub(crate) fn layers(&self) -> &[Arc<Layer>] {
        &self.layers
    }

    pub(crate) fn bottom(&self) -> Option<&Bottom> {
        self.bottom.as_deref()
    }

    /// The head, if it may be written to.
    fn writable(&self) -> io::Result<Arc<Layer>> {
        if self.mode == Mode::Read {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        if self.failed {
            return Err(io::Error::other("an earlier sync failed"));
        }
        self.layers
            .last()
            .cloned()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// The sectors from and before which `len` bytes at `offset` lie.
    fn sectors(&self, offset: u64, len: u64) -> io::Result<(u64, u64)> {
        let end = offset.checked_add(len).filter(|end| *end <= self.bytes());
        match end {
            Some(end)
                if offset.is_multiple_of(SECTOR_BYTES) && end.is_multiple_of(SECTOR_BYTES) =>
            {
                Ok((offset / SECTOR_BYTES, end / SECTOR_BYTES))
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

impl Drop for Disk {
    /// What the guest has not flushed may be lost, but need not be.
    fn drop(&mut self) {
        if self.replaced {
            return;
        }
        if self.fleeting && !self.touched {
            name::discard(&self.path);
            return;
        }
        if !self.failed
            && let Err(error) = self.flush()
        {
            tracing::warn!(path = %self.path.display(), "what was not flushed may be lost: {}", error.with_cause());
        }
    }
}

/// Completes what a crash left of sealing the layers of `below`, of which the first `sealed` are.
pub(crate) fn complete(below: &[Arc<Layer>], sealed: usize) -> Result<(), Error> {
    // A map's descriptor is written once the seals are durable of its layer and of all below.
    let mut durable = 0;
    for (layer, number) in below[..sealed].iter().zip(1..) {
        if layer.descriptor()?.is_some() {
            durable = number;
        }
    }
    // A process that was killed may have left a seal that only it, and the kernel, knew of.
    for layer in &below[durable..sealed] {
        layer.media.sync()?;
    }
    for end in sealed + 1..=below.len() {
        Seal::resume(&below[..end])?.make_durable()?;
    }
    for end in durable + 1..=below.len() {
        if let Err(error) = Seal::resume(&below[..end]).and_then(|seal| seal.finish()) {
            // Without its map it is only slower to open, and it may be somebody else's.
            tracing::debug!("a sealed layer stays without a map: {}", error.with_cause());
        }
    }
    Ok(())
}
