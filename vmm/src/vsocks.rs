//! A machine's vsock device.

use std::path::Path;

use control::{Confinement, VsockChange, VsockConfig};
use devices::virtio::vsock::{SavedVsock, Vsock, VsockError};
use saved_state::{Container, SavedState};

use crate::{error::Error, machine::GoesOn};

/// The least context ID that a guest can have (virtio 1.2, 5.10.4).
const FIRST_CID: u32 = 3;

/// Makes the device.
pub(crate) fn open(config: &VsockConfig) -> Result<Vsock, Error> {
    let VsockConfig { cid, path } = config;
    let vsock = Vsock::listen(u64::from(*cid), path).map_err(devices::Error::Vsock)?;
    tracing::info!(cid, path = %path.display(), "a vsock device");
    Ok(vsock)
}

/// The vsock device of a saved machine, if it has one, with `change`. One that is confined has its socket where it
/// may have disks: whoever listens beside it can be reached by the guest. One that goes on as another has the number of this
/// process for its context ID, and for the end of its socket's name, unless the change says otherwise.
pub(crate) fn saved(
    container: &Container,
    change: &VsockChange,
    confinement: Option<&Confinement>,
    goes_on: GoesOn,
) -> Result<Option<VsockConfig>, Error> {
    let mut sections = container.sections();
    let Some(section) = sections.find(|section| section.kind == SavedVsock::KIND) else {
        return match change {
            VsockChange {
                cid: None,
                path: None,
            } => Ok(None),
            _ => Err(Error::NoVsock),
        };
    };
    let mut saved: SavedVsock = section.decode()?;
    if goes_on == GoesOn::AsAnother {
        let pid = std::process::id();
        saved.path = format!("{}.{pid}", unnumbered(&saved.path, saved.cid));
        saved.cid = u64::from(pid.max(FIRST_CID));
    }
    let impossible = || devices::Error::Impossible {
        kind: SavedVsock::KIND,
        reason: format!("context ID {}", saved.cid),
    };
    let cid = match change.cid {
        Some(cid) => cid,
        None => u32::try_from(saved.cid).map_err(|_| impossible())?,
    };
    let path = match (&change.path, confinement) {
        (Some(path), _) => path.clone(),
        (None, None) => saved.path.into(),
        (None, Some(confinement)) if inside(confinement, Path::new(&saved.path)) => {
            saved.path.into()
        }
        (None, Some(_)) => return Err(Error::VsockOutside { path: saved.path }),
    };
    Ok(Some(VsockConfig { cid, path }))
}

/// `path` without the number behind it, if that is the context ID, too, as in a fork: or forks of forks, and theirs, would have longer
/// and longer ones. If it is what somebody has named a machine's socket, its forks have, in place of that number, one that is theirs alone
/// as well.
fn unnumbered(path: &str, cid: u64) -> &str {
    path.strip_suffix(&format!(".{cid}")).unwrap_or(path)
}

/// Whether the directory of `path` lies where the machine may have disks.
fn inside(confinement: &Confinement, path: &Path) -> bool {
    let Some(Ok(directory)) = path.parent().map(Path::canonicalize) else {
        return false;
    };
    let mut allowed = confinement.disks.iter();
    path.file_name().is_some() && allowed.any(|allowed| directory.starts_with(allowed))
}

/// Whose fault it is that a vsock device cannot be made.
pub(crate) fn kind(error: &VsockError) -> control::FailureKind {
    use control::FailureKind;
    match error {
        VsockError::Cid(_) | VsockError::Path(_) | VsockError::TooLong(_) => {
            FailureKind::BadRequest
        }
        VsockError::InUse(_) => FailureKind::WrongState,
        VsockError::Listen { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            FailureKind::NotFound
        }
        VsockError::Listen { .. } | VsockError::Timer(_) => FailureKind::Host,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may")]

    use std::{io, path::PathBuf, sync::Arc};

    use control::{Failure, FailureKind};
    use devices::{Device, InterruptLine, virtio::MmioTransport};
    use memory::{Layout, MachineMemory};

    use super::*;

    #[derive(Debug)]
    struct NoLine;

    impl InterruptLine for NoLine {
        fn trigger(&self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What a machine saves that has a vsock device at `path`, or none.
    fn container(path: Option<&Path>) -> Container {
        let memory = MachineMemory::zeroed(Layout::new(64 << 20).unwrap()).unwrap();
        let mut container = crate::state::empty_container();
        if let Some(path) = path {
            let vsock = Vsock::listen(7, path).unwrap();
            let guest = memory.guest().clone();
            let device = MmioTransport::new(Box::new(vsock), guest, Arc::new(NoLine)).unwrap();
            container.insert(device.save(0).unwrap()).unwrap();
        }
        container
    }

    fn confinement(directory: &Path) -> Confinement {
        Confinement {
            disks: vec![directory.canonicalize().unwrap()],
            vcpus: 1,
            memory_mib: 64,
        }
    }

    #[test]
    fn a_saved_device_is_what_it_was_but_for_what_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v");
        let container = container(Some(&path));
        let none = VsockChange::default();
        let same = saved(&container, &none, None, GoesOn::AsItself)
            .unwrap()
            .unwrap();
        assert_eq!((same.cid, &same.path), (7, &path));
        let change = VsockChange {
            cid: Some(9),
            path: Some("/elsewhere".into()),
        };
        let other = saved(&container, &change, None, GoesOn::AsItself)
            .unwrap()
            .unwrap();
        assert_eq!((other.cid, other.path), (9, PathBuf::from("/elsewhere")));
    }

    #[test]
    fn one_that_goes_on_as_another_has_a_number_and_a_socket_of_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v");
        let container = container(Some(&path));
        let another = |change: &VsockChange, confinement: Option<&Confinement>| {
            saved(&container, change, confinement, GoesOn::AsAnother)
                .unwrap()
                .unwrap()
        };
        let none = VsockChange::default();
        let pid = std::process::id();
        let own = another(&none, Some(&confinement(directory.path())));
        assert_eq!(own.cid, pid);
        assert_eq!(own.path, directory.path().join(format!("v.{pid}")));
        let change = VsockChange {
            cid: Some(9),
            path: Some("/elsewhere".into()),
        };
        let named = another(&change, None);
        assert_eq!((named.cid, named.path), (9, PathBuf::from("/elsewhere")));
    }

    #[test]
    fn a_fork_of_a_fork_has_its_number_in_place_of_the_others() {
        let directory = tempfile::tempdir().unwrap();
        let pid = std::process::id();
        // The saved machine's context ID is 7.
        for (was, becomes) in [
            ("v.7", format!("v.{pid}")),
            ("v.8.7", format!("v.8.{pid}")),
            ("v.8", format!("v.8.{pid}")),
            ("v.77", format!("v.77.{pid}")),
            ("v7", format!("v7.{pid}")),
        ] {
            let container = container(Some(&directory.path().join(was)));
            let none = VsockChange::default();
            let own = saved(&container, &none, None, GoesOn::AsAnother);
            let own = own.unwrap().unwrap();
            assert_eq!(own.path, directory.path().join(becomes), "{was}");
        }
    }

    #[test]
    fn a_path_that_is_too_long_for_a_socket_is_named_as_that() {
        let directory = tempfile::tempdir().unwrap();
        let name = "v".repeat(107 - directory.path().as_os_str().len() - 1);
        let of = |name: &str| VsockConfig {
            cid: 3,
            path: directory.path().join(name),
        };
        open(&of(&name)).unwrap();
        let error = open(&of(&format!("{name}v"))).err().unwrap();
        let Failure { kind, message, .. } = Failure::from(error);
        assert_eq!(kind, FailureKind::BadRequest);
        assert!(message.contains("at most 107 bytes"), "{message}");
    }

    #[test]
    fn a_state_file_puts_no_socket_outside_of_the_tree() {
        let (tree, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let confined = confinement(tree.path());
        let none = VsockChange::default();
        let inside = container(Some(&tree.path().join("v")));
        assert!(
            saved(&inside, &none, Some(&confined), GoesOn::AsItself)
                .unwrap()
                .is_some()
        );
        // Also not by a link in the tree.
        let link = tree.path().join("link");
        std::os::unix::fs::symlink(outside.path(), &link).unwrap();
        for path in [outside.path().join("v"), link.join("w")] {
            let refused = saved(
                &container(Some(&path)),
                &none,
                Some(&confined),
                GoesOn::AsItself,
            )
            .unwrap_err();
            assert_eq!(Failure::from(refused).kind, FailureKind::BadRequest);
        }
    }

    #[test]
    fn a_machine_without_one_has_none_to_change() {
        let container = container(None);
        let mut change = VsockChange::default();
        assert_eq!(
            saved(&container, &change, None, GoesOn::AsItself).unwrap(),
            None
        );
        change.cid = Some(3);
        assert!(matches!(
            saved(&container, &change, None, GoesOn::AsItself),
            Err(Error::NoVsock)
        ));
    }
}
