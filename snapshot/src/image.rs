//! A memory file: a memory image, the table of its granules, and a footer.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use memory::{HostPages, Layout, MachineMemory};
use saved_state::SnapshotId;

use crate::{
    Content, Error, Saving, Written,
    durable::{Pending, open_for_reading},
    granules,
    image_file::ImageFile,
    table::{FOOTER_BYTES, Footer, GRANULE_BYTES, Table},
    transfer,
};

/// Begins the memory file `pending` of a machine with so many bytes of memory.
pub(crate) fn begin_image(pending: &Pending, memory_bytes: u64) -> Result<ImageFile, Error> {
    let file = pending.file();
    let begun = file.set_len(Footer::file_bytes(memory_bytes));
    let file = begun.and_then(|()| file.try_clone());
    let file = file.map_err(Error::io("write", pending.target()))?;
    Ok(ImageFile::new(file, memory_bytes))
}

/// Writes `memory` as the memory file `pending` of snapshot `id`, in which `image` is. It is complete, but not yet durable.
pub(crate) fn write_image(
    pending: &Pending,
    image: ImageFile,
    memory: &impl Content,
    id: SnapshotId,
    saving: &Saving,
) -> Result<Written, Error> {
    let failed = || Error::io("write", pending.target());
    let file = pending.file();
    granules::save(&image, memory, saving).map_err(failed())?;
    let (table, written) = image.finish();
    let memory_bytes = written.memory_bytes;
    let table = table.to_bytes();
    let footer = Footer::new(id, memory_bytes, &table);
    file.write_all_at(&table, memory_bytes).map_err(failed())?;
    file.write_all_at(&footer.to_bytes(), memory_bytes + table.len() as u64)
        .map_err(failed())?;
    Ok(written)
}

/// The snapshot that the memory file at `path` belongs to, by its footer alone.
pub(crate) fn id_of(path: &Path) -> Result<SnapshotId, Error> {
    open_footer(path).map(|(_, footer)| footer.id)
}

/// Opens a memory file and checks its footer, and with it its length: what the footer says can be
/// allocated for.
fn open_footer(path: &Path) -> Result<(File, Footer), Error> {
    let file = open_for_reading(path)?;
    let metadata = file.metadata().map_err(Error::io("read", path))?;
    let bad = |reason: &str| Error::Memory {
        path: path.to_owned(),
        reason: reason.to_owned(),
    };
    if !metadata.is_file() {
        return Err(bad("is not a file; check the path"));
    }
    let Some(footer_at) = metadata.len().checked_sub(FOOTER_BYTES as u64) else {
        return Err(bad(
            "is not a fermata memory file, or was cut; check the path",
        ));
    };
    let mut footer = [0; FOOTER_BYTES];
    file.read_exact_at(&mut footer, footer_at)
        .map_err(Error::io("read", path))?;
    let footer = Footer::from_bytes(&footer).map_err(|reason| bad(&reason))?;
    let possible = Layout::new(footer.memory_bytes).is_ok();
    if !possible || Footer::file_bytes(footer.memory_bytes) != metadata.len() {
        return Err(bad(
            "does not hold the memory that its footer promises; take another copy",
        ));
    }
    Ok((file, footer))
}

/// A memory file whose footer and table have been checked.
#[derive(Debug)]
pub(crate) struct Image {
    path: PathBuf,
    file: File,
    footer: Footer,
    table: Table,
}

impl Image {
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let (file, footer) = open_footer(path)?;
        let table_bytes = Footer::granules(footer.memory_bytes) * 8;
        let mut table = vec![0; table_bytes as usize];
        file.read_exact_at(&mut table, footer.memory_bytes)
            .map_err(Error::io("read", path))?;
        let table = Table::from_bytes(&table, &footer).ok_or_else(|| Error::Memory {
            path: path.to_owned(),
            reason: "is damaged in its table (checksum mismatch); take another copy".to_owned(),
        })?;
        Ok(Self {
            path: path.to_owned(),
            file,
            footer,
            table,
        })
    }

    pub(crate) fn id(&self) -> SnapshotId {
        self.footer.id
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        self.footer.memory_bytes
    }

    /// Reads all that is not a hole, compares it with the table, and maps it as the memory of a machine, or copies it
    /// into one of reserved huge pages.
    pub(crate) fn load(&self, pages: HostPages) -> Result<MachineMemory, Error> {
        self.verify()?;
        match pages {
            HostPages::Any => self.map(),
            HostPages::Reserved => self.copy(pages),
        }
    }

    /// What of it is no hole.
    pub(crate) fn table(&self) -> &Table {
        &self.table
    }

    /// Copies all that is not a hole to `file`, which has the same length or more, and compares it with the table on the way.
    pub(crate) fn copy_to(&self, file: &File) -> Result<(), Error> {
        self.compare(Some(file))
    }

    fn verify(&self) -> Result<(), Error> {
        self.compare(None)
    }

    fn compare(&self, copy: Option<&File>) -> Result<(), Error> {
        let damage = transfer::find_damage(&self.file, &self.table, self.memory_bytes(), copy)
            .map_err(Error::io("read", &self.path))?;
        match damage {
            None => Ok(()),
            Some(granule) => Err(Error::Memory {
                path: self.path.clone(),
                reason: format!(
                    "is damaged near byte {} (checksum mismatch); take another copy",
                    granule as u64 * GRANULE_BYTES
                ),
            }),
        }
    }

    fn map(&self) -> Result<MachineMemory, Error> {
        let data = self.table.data(self.memory_bytes());
        MachineMemory::from_image(self.layout()?, &self.file, &data)
            .map_err(|e| self.bad(format!("cannot be mapped: {e}")))
    }

    fn copy(&self, pages: HostPages) -> Result<MachineMemory, Error> {
        MachineMemory::filled(self.layout()?, pages, |image| {
            let data = self.table.data(self.memory_bytes());
            transfer::read_data(&self.file, &self.path, &data, image)
        })
    }

    fn layout(&self) -> Result<Layout, Error> {
        let layout = Layout::new(self.memory_bytes());
        layout.map_err(|e| self.bad(format!("cannot be used: {e}")))
    }

    fn bad(&self, reason: String) -> Error {
        Error::Memory {
            path: self.path.clone(),
            reason,
        }
    }
}
