//! Locks that outlive a panic.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`, also when a thread has panicked while it held the lock.
///
/// A panic in a device is a bug, but it must not spread to every vCPU that touches the device: the
/// devices check what they read from their own state as little as they trust the guest, so that a
/// half-done operation can at worst make the guest's driver unhappy.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
