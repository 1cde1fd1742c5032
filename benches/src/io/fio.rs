//! fio in a guest: <https://fio.readthedocs.io>.

use anyhow::{Context, Result, ensure};

use super::worker::Worker;
use crate::Bench;

/// The fields of a line of fio's terse output, version 3, that are of use here, from 0 on.
const ERROR: usize = 4;
const READ_KIB_PER_SECOND: usize = 6;
const WRITE_KIB_PER_SECOND: usize = 47;

/// What fio is asked for: the name of a pattern, the bytes of a request, and how many are under way.
type Job = (Bench, &'static str, &'static str, u32);

/// Of a disk that may be written to.
pub(super) const BOTH_WAYS: [Job; 4] = [
    (Bench::SeqRead, "read", "128k", 4),
    (Bench::SeqWrite, "write", "128k", 4),
    (Bench::RandRead, "randread", "4k", 16),
    (Bench::RandWrite, "randwrite", "4k", 16),
];

/// Of a disk whose layers are to stay as they are.
pub(super) const CHAIN: [Job; 2] = [
    (Bench::ChainSeqRead, "read", "128k", 4),
    (Bench::ChainRandRead, "randread", "4k", 16),
];

/// Runs `jobs` for so many `seconds` each on the guest's disk of that serial number; MB/s.
pub(super) fn run(
    worker: &Worker,
    serial: &str,
    jobs: &[Job],
    seconds: u32,
) -> Result<Vec<(Bench, f64)>> {
    let answer = worker.ask(&script(serial, jobs, seconds))?;
    let lines: Vec<_> = answer
        .lines()
        .filter(|line| line.starts_with("3;"))
        .collect();
    ensure!(lines.len() == jobs.len(), "fio said {answer:?}");
    let jobs = jobs.iter().zip(lines);
    jobs.map(|((bench, ..), line)| Ok((*bench, figure(*bench, line)?)))
        .collect()
}

/// One run of fio after another in one process: starting it takes an emulated guest longer than measuring.
fn script(serial: &str, jobs: &[Job], seconds: u32) -> String {
    let mut job = format!(
        "[global]\nfilename=DISK\ndirect=1\nioengine=libaio\nthread\n\
        time_based\nruntime={seconds}\nrandrepeat=0\nnorandommap\n"
    );
    for (_, pattern, bytes, depth) in jobs {
        job += &format!(
            "[{pattern}]\nstonewall\nrw={pattern}\nbs={bytes}\niodepth={depth}\n\
            iodepth_batch_complete_min=1\niodepth_batch_complete_max={depth}\n"
        );
    }
    format!(
        "for disk in /sys/block/vd*; do\n\
        [ \"$(cat $disk/serial)\" = {serial} ] && break\n\
        disk=\ndone\n\
        sed s,DISK,/dev/${{disk##*/}}, >/tmp/job <<'END'\n{job}END\n\
        fio --output-format=terse --terse-version=3 /tmp/job </dev/null 2>&1\n"
    )
}

/// MB/s of one line.
fn figure(bench: Bench, line: &str) -> Result<f64> {
    let fields: Vec<&str> = line.split(';').collect();
    let field = |at: usize| {
        let text = fields.get(at).copied().unwrap_or_default();
        text.parse::<f64>()
            .with_context(|| format!("field {at} of fio's line {line:?} is not a number"))
    };
    ensure!(
        field(ERROR)? == 0.0,
        "fio's job failed with error {}",
        field(ERROR)?
    );
    let at = match bench {
        Bench::SeqWrite | Bench::RandWrite => WRITE_KIB_PER_SECOND,
        _ => READ_KIB_PER_SECOND,
    };
    let figure = field(at)? * 1024.0 / 1e6;
    ensure!(figure > 0.0, "fio did nothing: {line:?}");
    Ok(figure)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What fio 3.33 printed, as far as it is looked at.
    fn line(read: u32, write: u32, error: u32) -> String {
        let mut fields = vec!["0".to_owned(); 130];
        fields[..3].clone_from_slice(&["3", "fio-3.33", "job"].map(str::to_owned));
        fields[4] = error.to_string();
        (fields[5], fields[6]) = ("999".into(), read.to_string());
        (fields[46], fields[47]) = ("888".into(), write.to_string());
        fields.join(";")
    }

    #[test]
    fn rates_of_both_directions_are_found() {
        assert_eq!(
            figure(Bench::RandRead, &line(1000, 0, 0)).unwrap(),
            1000.0 * 1.024e-3
        );
        assert_eq!(
            figure(Bench::SeqWrite, &line(0, 2000, 0)).unwrap(),
            2000.0 * 1.024e-3
        );
    }

    #[test]
    fn a_job_that_failed_or_did_nothing_is_an_error() {
        assert!(figure(Bench::RandRead, &line(1000, 0, 5)).is_err());
        assert!(figure(Bench::RandRead, &line(0, 1000, 0)).is_err());
        assert!(figure(Bench::RandRead, "3;fio").is_err());
    }
}
