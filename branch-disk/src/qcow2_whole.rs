//! Whether a qcow2 image has all that it speaks of: the library that reads it takes what is behind the file's end for zeros.
//! (<https://www.qemu.org/docs/master/interop/qcow2.html>)

use std::{fs::File, io, os::unix::fs::FileExt};

/// Of an entry of either table: where what it names lies in the file.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const ZEROS: u64 = 1;
/// Among the features without which an image cannot be read: entries of level 2 have 16 bytes.
const EXTENDED: u64 = 1 << 4;

/// Refuses an image whose tables, or the clusters that they name, lie behind the end of `file`, of `bytes`. What is no image is refused
/// when it is opened.
pub(crate) fn check_whole(file: &File, bytes: u64) -> io::Result<()> {
    let mut header = [0; 80];
    if file.read_exact_at(&mut header, 0).is_err() || !header.starts_with(b"QFI\xfb") {
        return Ok(());
    }
    let word = |at: u64| number(file, at, bytes);
    let (version, cluster_bits) = (word(0)? & 0xffff_ffff, word(16)? & 0xffff_ffff);
    let (size, entries, table) = (word(24)?, word(32)? & 0xffff_ffff, word(40)?);
    if !(9..=21).contains(&cluster_bits) {
        return Ok(());
    }
    let cluster = 1u64 << cluster_bits;
    let extended = version > 2 && word(72)? & EXTENDED != 0;
    let entry_bytes = if extended { 16 } else { 8 };
    let needed = size.div_ceil(cluster).div_ceil(cluster / entry_bytes);
    if needed > entries {
        return Err(cut_short());
    }
    // What a snapshot or a larger size has left behind those is not read.
    for entry in 0..needed {
        let level2 = number(file, table.saturating_add(entry * 8), bytes)? & OFFSET;
        if level2 == 0 {
            continue;
        }
        let mut content = vec![0; cluster as usize];
        file.read_exact_at(&mut content, level2)
            .map_err(|_| cut_short())?;
        for entry in content.chunks_exact(entry_bytes as usize) {
            let entry = u64::from_be_bytes(entry[..8].try_into().unwrap_or_default());
            let at = match entry {
                compressed if compressed & COMPRESSED != 0 => {
                    compressed & ((1 << (70 - cluster_bits)) - 1)
                }
                zeros if zeros & ZEROS != 0 && !extended => 0,
                entry => entry & OFFSET,
            };
            if at >= bytes {
                return Err(cut_short());
            }
        }
    }
    Ok(())
}

/// The eight bytes at `at` of a file of `bytes`.
fn number(file: &File, at: u64, bytes: u64) -> io::Result<u64> {
    let mut number = [0; 8];
    if at.checked_add(8).is_none_or(|end| end > bytes) {
        return Err(cut_short());
    }
    file.read_exact_at(&mut number, at)?;
    Ok(u64::from_be_bytes(number))
}

fn cut_short() -> io::Error {
    let what = "it was cut short; take a whole copy of it";
    io::Error::new(io::ErrorKind::InvalidData, what)
}
