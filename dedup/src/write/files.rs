//! Whole files as images.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

use super::Writer;
use super::blocks::{Task, Work, encode_all};
use super::file::data_extents;
use super::image::{Image, ImageStats};
use super::session::BlockAt;
use super::worker::{EncodedBlock, Source};
use crate::error::{Error, Result};
use crate::recipe::BLOCK_CHUNKS;

/// Files that are saved, and so are open, at a time.
pub(super) const MAX_OPEN: usize = 64;

/// A file that becomes an image.
struct Input<'a> {
    path: &'a Path,
    file: File,
    /// Bytes.
    size: u64,
    /// The parts that are not holes, ascending.
    extents: Vec<Range<u64>>,
}

impl<'a> Input<'a> {
    fn open(path: &'a Path) -> Result<Self> {
        let failed = || Error::file(format!("read {}", path.display()));
        // Not to wait for who writes to it, if it is a pipe.
        let mut open = File::options();
        open.read(true).custom_flags(OFlags::NONBLOCK.bits() as i32);
        let file = open.open(path).map_err(failed())?;
        // Of directories and devices that are no disks, some have no end.
        let kind = file.metadata().map_err(failed())?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::Parameter(format!(
                "{} is neither a file nor a block device",
                path.display()
            )));
        }
        let (size, extents) = data_extents(&file).map_err(failed())?;
        Ok(Input {
            path,
            file,
            size,
            extents,
        })
    }

    fn read(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let failed = Error::file(format!("read {}", self.path.display()));
        self.file.read_exact_at(buf, at).map_err(failed)
    }
}

/// Saves files, each as the image that it is named with.
pub(super) fn save(writer: &mut Writer, files: &[(&str, &Path)]) -> Result<Vec<ImageStats>> {
    let mut images = Vec::with_capacity(files.len());
    let mut inputs = Vec::with_capacity(files.len());
    for &(name, path) in files {
        images.push(Image::new(writer, name)?);
        inputs.push(Input::open(path)?);
    }
    let blocks = encode(writer, &images, &inputs)?;
    for (image, block) in blocks {
        images[image].add(block);
    }
    let complete = images.into_iter().zip(&inputs).map(|(mut image, input)| {
        image.draft.size = input.size;
        writer.add_image(image)
    });
    Ok(complete.collect())
}

/// Encodes all blocks of all files; gives them in order, each with the number of its file.
fn encode(
    writer: &Writer,
    images: &[Image],
    inputs: &[Input<'_>],
) -> Result<Vec<(usize, EncodedBlock)>> {
    let block_bytes = BLOCK_CHUNKS * writer.session.shared.config.chunk_size as usize;
    let reads: Vec<_> = inputs
        .iter()
        .map(|input| |at, buf: &mut [u8]| input.read(at, buf))
        .collect();
    let mut works = Vec::new();
    for (number, (input, read)) in inputs.iter().zip(&reads).enumerate() {
        for at in (0..input.size).step_by(block_bytes) {
            let source = Source::Read {
                read,
                extents: &input.extents,
                at,
                len: (block_bytes as u64).min(input.size - at) as usize,
            };
            works.push((
                number,
                at / block_bytes as u64,
                Work::Encode { source, kept: None },
            ));
        }
    }
    let tasks: Vec<Task<'_>> = works
        .iter()
        .map(|(number, block, work)| Task {
            at: BlockAt {
                image: (writer.images.len() + number) as u32,
                block: *block,
            },
            parent: images[*number].parent.as_ref(),
            work,
        })
        .collect();
    let numbers = works.iter().map(|(number, ..)| *number);
    Ok(numbers.zip(encode_all(writer, &tasks)?).collect())
}
