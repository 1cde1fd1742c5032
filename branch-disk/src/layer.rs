//! A layer that is open: its file, its header, and its marks.

use std::{
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use crate::{
    bits::Bits,
    error::Error,
    header::{Header, NoHeader},
    layout::{DESCRIPTOR_AT, PAGE_BYTES, SEAL_AT},
    media::{Lock, Media},
    page::{self, Found, Label, PageKind},
};

#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) media: Media,
    pub(crate) header: Header,
    /// The name that it got when it was sealed.
    renamed: OnceLock<PathBuf>,
}

/// What the descriptor says of the map of a sealed layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) pages: u64,
    pub(crate) runs: u64,
}

impl Layer {
    pub(crate) fn open(path: &Path, write: bool, lock: Lock) -> Result<Self, Error> {
        let media = Media::open(path, write, lock, false)?;
        media.has_a_name()?;
        let mut page = [0; PAGE_BYTES];
        let read = media.file().read_exact_at(&mut page, 0);
        if read
            .as_ref()
            .is_err_and(|error| error.kind() == std::io::ErrorKind::UnexpectedEof)
        {
            return Err(Error::NotALayer {
                path: path.to_owned(),
            });
        }
        read.map_err(Error::io("read", path))?;
        let header = Header::decode(&page).map_err(|wrong| match wrong {
            NoHeader::Magic => Error::NotALayer {
                path: path.to_owned(),
            },
            NoHeader::Version(version) => Error::Newer {
                path: path.to_owned(),
                version,
            },
            NoHeader::Damaged(what) => Error::damaged(path, what),
        })?;
        if media.bytes()? < header.geometry.map_at() {
            return Err(Error::damaged(path, "it was cut short"));
        }
        Ok(Self::new(media, header))
    }

    pub(crate) fn new(media: Media, header: Header) -> Self {
        Self {
            media,
            header,
            renamed: OnceLock::new(),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        match self.renamed.get() {
            Some(path) => path,
            None => self.media.path(),
        }
    }

    /// It is called `path` from now on.
    pub(crate) fn rename(&self, path: &Path) {
        // A layer is sealed once.
        let _ = self.renamed.set(path.to_owned());
    }

    /// Whether it is never written to again.
    pub(crate) fn sealed(&self) -> Result<bool, Error> {
        // A torn seal is none: what it was to vouch for is not relied upon yet.
        let content = self.mark(SEAL_AT, PageKind::Seal)?;
        let sealed = content.is_some_and(|content| content.is_empty());
        // The seal was durable before there was a map, so that it is lost; others may stand on the layer.
        if !sealed && self.mark(DESCRIPTOR_AT, PageKind::Descriptor)?.is_some() {
            return Err(Error::damaged(
                self.path(),
                "it has a map and is not sealed",
            ));
        }
        Ok(sealed)
    }

    /// What it owns.
    pub(crate) fn bits(&self) -> Result<Bits, Error> {
        Bits::load(&self.media, &self.header, self.sealed()?)
    }

    pub(crate) fn descriptor(&self) -> Result<Option<Descriptor>, Error> {
        let Some(content) = self.mark(DESCRIPTOR_AT, PageKind::Descriptor)? else {
            return Ok(None);
        };
        let words: Vec<u64> = content
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()))
            .collect();
        match *words {
            [pages, runs] if content.len() == 16 => Ok(Some(Descriptor { pages, runs })),
            _ => Err(Error::damaged(
                self.path(),
                "its map's descriptor is impossible",
            )),
        }
    }

    /// Writes that it is never written to again.
    pub(crate) fn write_seal(&self, media: &Media) -> Result<(), Error> {
        let label = self.label(PageKind::Seal, 0);
        media.write(&page::encode(label, 1, &[])[..], SEAL_AT)
    }

    pub(crate) fn write_descriptor(&self, media: &Media, to: Descriptor) -> Result<(), Error> {
        let content = [to.pages.to_le_bytes(), to.runs.to_le_bytes()].concat();
        let label = self.label(PageKind::Descriptor, 0);
        media.write(&page::encode(label, 1, &content)[..], DESCRIPTOR_AT)
    }

    pub(crate) fn label(&self, kind: PageKind, number: u64) -> Label {
        Label {
            id: self.header.id,
            kind,
            number,
        }
    }

    /// The content of a mark; `None` when it was not written, or not to its end.
    fn mark(&self, at: u64, kind: PageKind) -> Result<Option<Vec<u8>>, Error> {
        let mut page = [0; PAGE_BYTES];
        let read = self.media.file().read_exact_at(&mut page, at);
        read.map_err(Error::io("read", self.path()))?;
        Ok(match page::decode(self.label(kind, 0), &page) {
            Found::Whole(page) => Some(page.content.to_vec()),
            Found::Nothing | Found::Broken => None,
        })
    }
}
