//! Debian as it is installed, from its login prompt to its shutdown, and saved under load of every kind.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::net::UnixStream,
    process::Command,
    time::Instant,
};

use system_tests::{
    debian::{self, Expected, HOST, Host, Machine},
    wait,
};

/// What its kernel may say.
const KERNEL_LOG: &str = include_str!("debian_kernel_log.txt");

/// Has a load leave its exit status when it is done.
const LOAD: &str = r#"
mkdir -p /run/load
cd /run/load
load() {
    name=$1
    shift
    ("$@"; echo $? >$name.status) >$name.log 2>&1 </dev/null &
}
"#;

/// Starts what goes on until the host is done. What goes over the network is a file that the host has too.
const STREAMS: &str = r#"
load out socat -u FILE:"$(echo /boot/vmlinuz-6.1.*)" TCP:10.77.1.1:7011
load in socat -u TCP:10.77.1.1:7012 CREATE:received
load echo socat -t 60 VSOCK-LISTEN:5000,fork PIPE
"#;

/// Starts what goes on until it is told to end; last but one, for all else takes long beside it.
const STRESS: &str = r#"
load stress stress-ng --cpu 4 --vm 2 --vm-bytes 16m --verify --timeout 900s --metrics-brief
"#;

/// Waits until every CPU has done work for stress-ng.
const AT_WORK: &str = r#"
busy() { sed -n 's/^cpu[0-9][0-9]* *\([0-9]*\) .*/\1/p' /proc/stat; }
worked() {
    busy >now
    paste -d ' ' before now | awk '$2 - $1 < 20 { idle = 1 } END { exit idle }'
}
busy >before
until worked; do sleep 0.2; done
"#;

/// Starts fio, last, for it ends by itself, after a minute at the least; and waits until it writes.
const WRITES: &str = r#"
writes() { awk '{ print $5 }' /sys/block/vda/stat; }
enough=$(($(writes) + 100))
load fio fio --name=load --filename=/var/tmp/load --size=16m --rw=randwrite --bs=4k --ioengine=libaio --direct=1 \
    --iodepth=4 --rate_iops=60 --fsync=64 --verify=crc32c --verify_fatal=1
until [ "$(writes)" -gt $enough ]; do sleep 0.2; done
"#;

/// Says what has ended.
const ENDED: &str = "cd /run/load && ls | grep -F .status || true";

/// Ends what has no end of its own, by its first process: the rest has the CPUs to itself.
const CALM: &str = r#"
kill -INT "$(pidof stress-ng | tr ' ' '\n' | sort -n | head -n 1)"
"#;

/// Waits for everything, and says how it ended.
const OUTCOME: &str = r#"
cd /run/load
for name in fio stress out in; do
    until [ -s $name.status ]; do sleep 0.5; done
    echo $name $(cat $name.status)
    [ "$(cat $name.status)" = 0 ] || cat $name.log
done
"#;

/// Has the machine's own apt fetch, unpack and configure a package, and runs what is in it.
fn installs_a_package(host: &Host) {
    let install = "apt-get update && apt-get install --yes hello";
    let said = host.command(install).unwrap();
    assert!(said.contains("Setting up hello"), "{said}");
    assert_eq!(host.command("hello").unwrap(), "Hello, world!\n");
    let repository = host.command("apt-cache policy hello").unwrap();
    assert!(repository.contains("file:/srv/repository"), "{repository}");
}

/// Asserts that the guest's kernel has said nothing of note but what is expected.
fn kernel_is_content(host: &Host, read: &str) {
    let expected = Expected::parse(KERNEL_LOG).unwrap();
    let log = host.command(read).unwrap();
    let unexpected = expected.unexpected(&log);
    assert!(unexpected.is_empty(), "{}", unexpected.join("\n"));
}

const WARNINGS: &str = "dmesg --notime --level=emerg,alert,crit,err,warn";

/// Says how long it took since the last.
struct Stopwatch(Instant);

impl Stopwatch {
    fn lap(&mut self, what: &str) {
        println!("{what}: {:.1} s", self.0.elapsed().as_secs_f64());
        self.0 = Instant::now();
    }
}

fn up<'a>(host: &'a Host, series: &str, vcpus: u32, watch: &mut Stopwatch) -> Machine<'a> {
    let mut machine = host.boot(series, vcpus).unwrap();
    machine.comes_up().unwrap();
    watch.lap(&format!("Debian with {series}, to the login prompt"));
    host.log_in().unwrap();
    let release = host.command("uname -r").unwrap();
    assert!(release.starts_with(&format!("{series}.")), "{release}");
    let failed = host
        .command("systemctl --failed --plain --no-legend")
        .unwrap();
    assert_eq!(failed, "");
    watch.lap("ssh");
    machine
}

#[test]
fn debian_comes_up_installs_a_package_and_shuts_down() {
    let mut watch = Stopwatch(Instant::now());
    let host = Host::new().unwrap();
    let mut machine = up(&host, "6.1", 2, &mut watch);
    let release = host.command("uname -r").unwrap();
    let said = machine.log_in_at_the_console("uname -r").unwrap();
    assert_eq!(said, release.trim_end());
    watch.lap("console");
    installs_a_package(&host);
    watch.lap("apt");
    kernel_is_content(&host, WARNINGS);
    machine.shut_down().unwrap();
    watch.lap("shutdown");
}

fn digest_of(bytes: &[u8], host: &Host) -> String {
    let file = host.path("bytes");
    std::fs::write(&file, bytes).unwrap();
    let output = Command::new("sha256sum").arg(file).output().unwrap();
    String::from_utf8(output.stdout).unwrap()[..64].to_owned()
}

fn accept(listener: &TcpListener) -> TcpStream {
    // The guest may be gone.
    listener.set_nonblocking(true).unwrap();
    let accepted = || listener.accept().ok();
    let (stream, _) = wait::until("the guest to connect", accepted).unwrap();
    stream.set_nonblocking(false).unwrap();
    let bound = Some(4 * system_tests::wait::PATIENCE);
    stream.set_read_timeout(bound).unwrap();
    stream.set_write_timeout(bound).unwrap();
    stream
}

/// Has a stream give back what it is sent, with its end.
fn echoes(mut stream: UnixStream, bytes: &[u8]) {
    let mut writer = stream.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            writer.write_all(bytes).unwrap();
            writer.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        assert!(back == bytes, "{} of {} bytes", back.len(), bytes.len());
    });
}

#[test]
fn debian_under_load_is_saved_and_goes_on() {
    let mut watch = Stopwatch(Instant::now());
    let host = Host::new().unwrap();
    let machine = up(&host, "6.12", 4, &mut watch);

    let listeners = [7011, 7012].map(|port| TcpListener::bind((HOST, port)).unwrap());
    host.command(&[LOAD, STREAMS].concat()).unwrap();
    let file = debian::read(&host.guest().kernel("6.1")).unwrap();
    let half = file.len() / 2;
    let [mut from_guest, mut to_guest] = listeners.each_ref().map(accept);
    let mut received = vec![0; half];
    from_guest.read_exact(&mut received).unwrap();
    to_guest.write_all(&file[..half]).unwrap();
    let mut cut = host.stream("vsock", 5000).unwrap();
    cut.write_all(&file[..1 << 16]).unwrap();
    cut.read_exact(&mut [0; 1 << 16]).unwrap();
    cut.write_all(&file[..1 << 16]).unwrap();
    let stress = [LOAD, STRESS, AT_WORK, WRITES].concat();
    host.command(&stress).unwrap();
    host.command("echo fermata: cut >/dev/kmsg").unwrap();
    watch.lap("every load at work");
    assert_eq!(
        host.command(ENDED).unwrap(),
        "",
        "too late to be saved in the middle"
    );
    machine.save("state", "memory").unwrap();
    watch.lap("saved");

    let machine = host.restore("state", "memory").unwrap();
    assert_eq!(
        host.command(ENDED).unwrap(),
        "",
        "not restored in the middle"
    );
    host.command(&[LOAD, AT_WORK, CALM].concat()).unwrap();
    watch.lap("restored, and every CPU at work");
    // Streams end, after what was on its way; an end may be told as an error.
    let _ = cut.read_to_end(&mut Vec::new());
    echoes(host.stream("vsock-again", 5000).unwrap(), &file[..1 << 20]);
    from_guest.read_to_end(&mut received).unwrap();
    assert!(
        received == file,
        "{} of {} bytes",
        received.len(),
        file.len()
    );
    to_guest.write_all(&file[half..]).unwrap();
    drop(to_guest);
    watch.lap("streams");
    let outcome = host.command(OUTCOME).unwrap();
    assert_eq!(outcome, "fio 0\nstress 0\nout 0\nin 0\n", "{outcome}");
    let digest = host.command("sha256sum /run/load/received").unwrap();
    assert_eq!(digest[..64], digest_of(&file, &host));
    let stress = host.command("cat /run/load/stress.log").unwrap();
    assert!(stress.contains("successful run completed"), "{stress}");
    watch.lap("every load done");

    kernel_is_content(&host, WARNINGS);
    kernel_is_content(&host, "dmesg --notime | sed '1,/fermata: cut/d'");
    installs_a_package(&host);
    watch.lap("apt");
    machine.shut_down().unwrap();
    watch.lap("shutdown");
}
