//! Jobs that several threads take from one list.

use std::iter::Sum;
use std::panic::resume_unwind;
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::Result;

/// Does all `jobs`, as many at a time as there are `workers`, and sums up what comes of them. Each worker has a tool of its own for all
/// that it does. After an error nobody begins another job; it is returned when those that were begun are done.
pub(super) fn side_by_side<J: Sync, W, T: Sum<T> + Send>(
    jobs: &[J],
    workers: usize,
    tool: impl Fn() -> W + Sync,
    work: impl Fn(&mut W, &J) -> Result<T> + Sync,
) -> Result<T> {
    let left = Mutex::new(jobs.iter());
    // What is locked is whole at any time, and it is not locked while a job is done.
    let next = || left.lock().unwrap_or_else(PoisonError::into_inner).next();
    let one_after_another = || {
        let mut done = Vec::new();
        let mut tool = tool();
        while let Some(job) = next() {
            done.push(work(&mut tool, job).inspect_err(|_| while next().is_some() {})?);
        }
        Ok(done.into_iter().sum())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..workers)
            .map(|_| scope.spawn(one_after_another))
            .collect();
        let ended = workers.into_iter().map(|worker| worker.join());
        let ended: Vec<Result<T>> = ended
            .map(|done| done.unwrap_or_else(|panic| resume_unwind(panic)))
            .collect();
        ended.into_iter().sum()
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Duration;

    use anyhow::bail;

    use super::*;

    #[test]
    fn two_jobs_are_done_at_the_same_time() {
        // Each waits for what the other sends.
        let (to_first, first) = channel();
        let (to_second, second) = channel();
        let jobs: [Mutex<(Sender<u32>, Receiver<u32>)>; 2] = [
            Mutex::new((to_second, first)),
            Mutex::new((to_first, second)),
        ];
        let heard: u32 = side_by_side(
            &jobs,
            2,
            || (),
            |(), job| {
                let job = job.lock().unwrap();
                job.0.send(1)?;
                Ok(job.1.recv_timeout(Duration::from_secs(60))?)
            },
        )
        .unwrap();
        assert_eq!(heard, 2);
    }

    #[test]
    fn each_job_is_done_once_and_none_after_an_error() {
        let jobs: Vec<u32> = (1..=100).collect();
        let sum: u32 = side_by_side(&jobs, 3, || (), |(), job| Ok(*job)).unwrap();
        assert_eq!(sum, 5050);
        let done = AtomicU32::new(0);
        let failed: Result<u32> = side_by_side(
            &jobs,
            1,
            || 0,
            |before: &mut u32, job| {
                assert_eq!(*before + 1, *job);
                *before = *job;
                done.fetch_add(1, Ordering::Relaxed);
                if *job == 7 {
                    bail!("the seventh");
                }
                Ok(0)
            },
        );
        assert_eq!(failed.unwrap_err().to_string(), "the seventh");
        assert_eq!(done.into_inner(), 7);
        let nothing: u32 = side_by_side(&[0; 0], 2, || (), |(), _| Ok(1)).unwrap();
        assert_eq!(nothing, 0);
    }
}
