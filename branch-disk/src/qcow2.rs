//! From and to qcow2.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder,
    file::File as ImageFile, qcow2::Qcow2,
};

use crate::{
    chain::Rule,
    convert::{Copied, copy, export, import, source},
    disk::Disk,
    error::Error,
    qcow2_whole::check_whole,
};

type Image = FormatAccess<ImageFile>;

/// Makes a disk at `to` of the qcow2 image `from`, on which it does not depend afterwards. An image that needs another file,
/// a backing image or one with its data, is refused: convert it first.
///
/// # Errors
///
/// [`Error`]; [`Error::Exists`] when there is anything at `to`, [`Error::InUse`] when somebody writes to `from`.
pub fn import_qcow2(from: &Path, to: &Path, rule: &Rule<'_>) -> Result<Copied, Error> {
    let media = source(from)?;
    let bytes = media.bytes()?;
    let image = check_plain(media.file())
        .and_then(|()| check_whole(media.file(), bytes))
        .and_then(|()| open(media.file().try_clone()?, false));
    let image = image.map_err(Error::io("import from", from))?;
    let read = |offset: u64, piece: &mut [u8]| image.read(piece, offset);
    import(from, image.size(), Ok, read, to, rule)
}

/// Refuses an image that is encrypted: what is read of one is noise to its guest. Its header says so at 32, and the library that reads it
/// does not look (<https://www.qemu.org/docs/master/interop/qcow2.html>).
fn check_plain(file: &File) -> io::Result<()> {
    let mut header = [0; 36];
    match file.read_exact_at(&mut header, 0) {
        // What is none is refused when it is opened.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
        Err(error) => Err(error),
        Ok(()) if !header.starts_with(b"QFI\xfb") || header[32..] == [0; 4] => Ok(()),
        Ok(()) => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "it is encrypted; decrypt it first, with `qemu-img convert`",
        )),
    }
}

/// Writes what a disk has into a new qcow2 image. It has its name once it is whole and durable.
///
/// # Errors
///
/// [`Error`]; [`Error::Exists`] when there is anything at `to`.
pub fn export_qcow2(disk: &Disk, to: &Path) -> Result<Copied, Error> {
    export(to, |file| write(disk, file))
}

fn write(disk: &Disk, file: &File) -> io::Result<Copied> {
    let storage = ImageFile::try_from(file.try_clone()?)?;
    Qcow2::<ImageFile, Image>::create_builder(storage)
        .size(disk.bytes())
        .create()?;
    let image = open(file.try_clone()?, true)?;
    let copied = copy(
        disk.bytes(),
        |offset| Ok(disk.next_data(offset)),
        |offset, mut piece| disk.read(offset, &mut piece),
        |offset, data| image.write(data, offset),
    )?;
    image.flush()?;
    Ok(copied)
}

/// Opens the image in `file` and nothing that it names.
fn open(file: File, write: bool) -> io::Result<Image> {
    let storage = ImageFile::try_from(file)?;
    let image = Qcow2::<ImageFile, Image>::builder(storage)
        .write(write)
        .open(DenyImplicitOpenGate::default())?;
    Ok(FormatAccess::new(image))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Foundation, Mode, anything};

    fn create_new(path: &Path) -> File {
        let mut options = File::options();
        options.read(true).write(true).create_new(true);
        options.open(path).unwrap()
    }

    fn pattern(bytes: usize) -> Vec<u8> {
        (0..bytes)
            .map(|at| {
                if at / 5000 % 3 == 0 {
                    (at % 251) as u8
                } else {
                    0
                }
            })
            .collect()
    }

    #[test]
    fn what_goes_out_comes_in_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let content = pattern(3 << 20);
        std::fs::write(path("base"), &content[..1 << 20]).unwrap();
        let on = Foundation::Raw(path("base"));
        let mut disk = Disk::create(&path("d"), Some(3 << 20), &on, &anything).unwrap();
        disk.write(1 << 20, &mut &content[1 << 20..]).unwrap();
        let out = export_qcow2(&disk, &path("q")).unwrap();
        assert!(matches!(
            export_qcow2(&disk, &path("q")),
            Err(Error::Exists { .. })
        ));
        let copied = import_qcow2(&path("q"), &path("again"), &anything).unwrap();
        assert_eq!(copied, out);
        let again = Disk::open(&path("again"), Mode::Read, &anything).unwrap();
        let mut found = vec![1; 3 << 20];
        again.read(0, &mut &mut found[..]).unwrap();
        assert!(found == content);
    }

    #[test]
    fn an_encrypted_image_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let file = create_new(&path("q"));
        let storage = ImageFile::try_from(file.try_clone().unwrap()).unwrap();
        let image = Qcow2::<ImageFile, Image>::create_builder(storage);
        image.size(65536).create().unwrap();
        import_qcow2(&path("q"), &path("plain"), &anything).unwrap();
        // By LUKS.
        file.write_all_at(&[0, 0, 0, 2], 32).unwrap();
        let refused = import_qcow2(&path("q"), &path("d"), &anything).unwrap_err();
        let said = refused.with_cause();
        assert!(said.contains("decrypt it"), "{said}");
        assert!(!path("d").exists());
    }

    #[test]
    fn an_image_that_ends_within_a_sector_is_padded_and_one_that_cannot_be_read_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let on = Foundation::Nothing;
        let mut disk = Disk::create(&path("d"), Some(1024), &on, &anything).unwrap();
        disk.write(0, &mut &[7; 1024][..]).unwrap();
        export_qcow2(&disk, &path("q")).unwrap();
        let file = File::options().read(true).write(true).open(path("q"));
        let file = file.unwrap();
        // The disk's size.
        file.write_all_at(&1000u64.to_be_bytes(), 24).unwrap();
        let copied = import_qcow2(&path("q"), &path("odd"), &anything).unwrap();
        assert_eq!(copied.bytes, 1024);
        let odd = Disk::open(&path("odd"), Mode::Read, &anything).unwrap();
        let mut found = [1; 1024];
        odd.read(0, &mut &mut found[..]).unwrap();
        assert!(found[..1000] == [7; 1000] && found[1000..] == [0; 24]);

        let word = |at| {
            let mut word = [0; 8];
            file.read_exact_at(&mut word, at).unwrap();
            u64::from_be_bytes(word)
        };
        // The first cluster, as the tables say, at no cluster's beginning.
        let level2 = word(word(40)) & 0x00ff_ffff_ffff_fe00;
        let entry = (word(level2) | 512).to_be_bytes();
        file.write_all_at(&entry, level2).unwrap();
        let refused = import_qcow2(&path("q"), &path("bad"), &anything).unwrap_err();
        let said = format!("cannot import from {}", path("q").display());
        assert!(refused.to_string().starts_with(&said), "{refused}");
        assert!(!path("bad").exists());
        file.write_all_at(&0u64.to_be_bytes(), 24).unwrap();
        let refused = import_qcow2(&path("q"), &path("none"), &anything).unwrap_err();
        assert!(matches!(refused, Error::ImageSize { .. }), "{refused}");
    }

    #[test]
    fn another_file_is_not_opened_for_an_image_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("secret"), [7; 65536]).unwrap();
        let file = create_new(&path("q"));
        let secret = path("secret").to_str().unwrap().to_owned();
        Qcow2::<ImageFile, Image>::create_builder(ImageFile::try_from(file).unwrap())
            .size(65536)
            .backing(secret, "raw".to_owned())
            .create()
            .unwrap();
        import_qcow2(&path("q"), &path("d"), &anything).unwrap_err();
        assert!(!path("d").exists());
        std::fs::write(path("q"), [0; 512]).unwrap();
        import_qcow2(&path("q"), &path("d"), &anything).unwrap_err();
    }
}
