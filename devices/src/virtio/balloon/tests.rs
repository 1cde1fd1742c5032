use std::time::{Duration, Instant};

use memory::{Layout, MIN_MEMORY_BYTES, MachineMemory};
use virtio_bindings::{
    virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET,
    virtio_mmio::{
        VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INTERRUPT_STATUS,
        VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_STATUS,
    },
};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::{
    BusDevice, Device,
    conformance::{Line, PATIENCE, Subject, conforms},
    sync::lock,
    virtio::{
        MMIO_BYTES, MmioTransport,
        driver::{
            self, AVAILABLE_INDEX, Driver, Part, QUEUE_BYTES, VERSION_1, begin, get,
            serve_notified, set,
        },
    },
};

const ALL: u64 = VERSION_1 | STATISTICS_QUEUE | DEFLATE_ON_OOM | PAGE_REPORTING;
const PAGE: u64 = 4096;
/// Pages that the driver of the tests does not use itself.
const FREE: u64 = 8 << 20;
const NUM_PAGES_REGISTER: u32 = VIRTIO_MMIO_CONFIG;
const ACTUAL_REGISTER: u32 = VIRTIO_MMIO_CONFIG + 4;

struct Host {
    memory: MachineMemory,
}

/// A balloon and all that is around it.
struct Balloons {
    device: MmioTransport,
    control: Arc<BalloonControl>,
    line: Arc<Line>,
}

impl Host {
    fn balloon(&self, options: BalloonOptions) -> Balloons {
        let balloon = Balloon::new(options, self.memory.discarder()).unwrap();
        let control = Arc::clone(balloon.control());
        let (device, line) = driver::transport(balloon, self.memory.guest());
        Balloons {
            device,
            control,
            line,
        }
    }

    /// A balloon with all that it can offer, and its driver at work.
    fn started(&self) -> (Balloons, Driver<'_>) {
        let mut balloons = self.balloon(options());
        let driver = Driver::start(&mut balloons.device, self.memory.guest(), ALL);
        (balloons, driver)
    }

    fn byte(&self, gpa: u64) -> u8 {
        self.memory.guest().read_obj(GuestAddress(gpa)).unwrap()
    }

    fn write(&self, gpa: u64) {
        let guest = self.memory.guest();
        guest.write_obj(7u8, GuestAddress(gpa)).unwrap();
    }

    fn is_populated(&self, gpa: u64) -> bool {
        let ranges = self.memory.populated().unwrap();
        ranges.iter().any(|range| range.contains(&gpa))
    }
}

fn options() -> BalloonOptions {
    BalloonOptions {
        target_pages: 512,
        deflate_on_oom: true,
        free_page_reporting: true,
        statistics_interval_s: 0,
    }
}

fn numbers(pages: &[u32]) -> Vec<u8> {
    pages.iter().flat_map(|page| page.to_le_bytes()).collect()
}

fn entries(entries: &[(u16, u64)]) -> Vec<u8> {
    let entry = |(tag, value): &(u16, u64)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
    entries.iter().flat_map(entry).collect()
}

/// Has the balloon look at what is not a notification of the driver's, as the event loop would.
fn serve_all(device: &MmioTransport) {
    let mut worker = lock(device.worker());
    for queue in 0..worker.queue_count() {
        worker.process(queue);
    }
}

impl Subject for Host {
    type Device = MmioTransport;
    type Saved = SavedBalloon;
    const SPAN: u64 = MMIO_BYTES;

    fn new() -> Self {
        let layout = Layout::new(MIN_MEMORY_BYTES).unwrap();
        Self {
            memory: MachineMemory::zeroed(layout).unwrap(),
        }
    }

    fn fresh(&self) -> MmioTransport {
        self.balloon(options()).device
    }

    fn work(&self, device: &mut MmioTransport) {
        let mut inflate = Driver::start(device, self.memory.guest(), ALL);
        let mut statistics = inflate.of_queue(STATISTICS as u32);
        let mut reports = inflate.of_queue(REPORTING as u32);
        inflate.request(device, &[Part::Out(&numbers(&[4000, 4001]))]);
        set(device, ACTUAL_REGISTER, 2);
        statistics.offer(&[Part::Out(&entries(&[(4, 1)]))]);
        statistics.notify(device);
        reports.offer(&[Part::In(4096)]);
    }

    fn go_on(&self, device: &mut MmioTransport) {
        device.resume();
        serve_all(device);
    }
}

conforms!(conformance, super::Host);

#[test]
fn a_target_of_a_machine_that_stands_still_is_told_by_it_and_by_what_is_restored_of_it() {
    let host = Host::new();
    let (mut balloons, _driver) = host.started();
    balloons.control.set_target(1024);
    let section = balloons.device.save(0).unwrap();
    // It goes on itself, and tells as ever.
    assert_eq!(get(&mut balloons.device, VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    serve_all(&balloons.device);
    let causes = get(&mut balloons.device, VIRTIO_MMIO_INTERRUPT_STATUS);
    assert_eq!((causes, balloons.line.edges()), (VIRTIO_MMIO_INT_CONFIG, 1));
    drop(balloons);

    let mut restored = host.balloon(options());
    restored.device.restore(&section).unwrap();
    assert_eq!(restored.device.save(0).unwrap(), section);
    restored.device.resume();
    serve_all(&restored.device);
    let causes = get(&mut restored.device, VIRTIO_MMIO_INTERRUPT_STATUS);
    assert_eq!((causes, restored.line.edges()), (VIRTIO_MMIO_INT_CONFIG, 1));
    assert_eq!(get(&mut restored.device, NUM_PAGES_REGISTER), 1024);
}

#[test]
fn pages_in_the_balloon_are_the_hosts() {
    let host = Host::new();
    let (mut balloons, mut driver) = host.started();
    for page in 0..4 {
        host.write(FREE + page * PAGE);
    }
    let first = (FREE / PAGE) as u32;
    // Not in order, one of them twice, and some that are nowhere.
    let pages = numbers(&[first + 2, 0x0fff_ffff, first, first + 2, u32::MAX]);
    let (len, _) = driver.request(&mut balloons.device, &[Part::Out(&pages)]);
    assert_eq!(len, 0);
    let populated = (0..4).map(|page| host.is_populated(FREE + page * PAGE));
    assert!(populated.eq([false, true, false, true]));
    let bytes = (0..4).map(|page| host.byte(FREE + page * PAGE));
    assert!(bytes.eq([0, 7, 0, 7]));
    assert_eq!(
        get(&mut balloons.device, VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_NEEDS_RESET,
        0
    );
    let metrics = balloons.device.metrics();
    assert!(
        metrics.contains(&("discarded_bytes", 2 * PAGE)),
        "{metrics:?}"
    );
    // A page that comes back is there when it is touched.
    let mut deflate = driver.of_queue(DEFLATE as u32);
    deflate.request(&mut balloons.device, &[Part::Out(&numbers(&[first]))]);
    host.write(FREE);
    assert_eq!(host.byte(FREE), 7);
}

#[test]
fn more_numbers_than_a_driver_has_cause_to_name_are_not_all_acted_upon() {
    let host = Host::new();
    let (mut balloons, mut driver) = host.started();
    host.write(FREE);
    host.write(FREE + PAGE);
    let first = (FREE / PAGE) as u32;
    // In two descriptors, and 2 bytes that are no number.
    let mut pages = numbers(&[first; 4096]);
    pages.extend(numbers(&[first + 1]));
    let parts = [
        Part::Out(&pages[..6]),
        Part::Out(&pages[6..]),
        Part::Out(&[1, 2]),
    ];
    driver.request(&mut balloons.device, &parts);
    assert_eq!([0, PAGE].map(|at| host.byte(FREE + at)), [0, 7]);
}

#[test]
fn a_driver_learns_of_a_target_that_became_another_before_it_started() {
    let host = Host::new();
    let mut balloons = host.balloon(options());
    for (look_first, look_after) in [(true, false), (false, true), (true, true)] {
        balloons.control.set_target(512);
        serve_all(&balloons.device);
        Driver::prepare(&mut balloons.device, host.memory.guest(), ALL);
        if look_first {
            assert_eq!(get(&mut balloons.device, NUM_PAGES_REGISTER), 512);
        }
        balloons.control.set_target(1024);
        serve_all(&balloons.device);
        if look_after {
            assert_eq!(get(&mut balloons.device, NUM_PAGES_REGISTER), 1024);
        }
        let before = balloons.line.edges();
        assert_eq!(get(&mut balloons.device, VIRTIO_MMIO_INTERRUPT_STATUS), 0);
        begin(&mut balloons.device);
        let told = u32::from(look_first);
        let causes = get(&mut balloons.device, VIRTIO_MMIO_INTERRUPT_STATUS);
        assert_eq!(causes, told * VIRTIO_MMIO_INT_CONFIG);
        assert_eq!(balloons.line.edges(), before + u64::from(told));
    }
}

#[test]
fn a_driver_that_was_saved_before_it_started_learns_of_what_changed_until_then() {
    let host = Host::new();
    let mut balloons = host.balloon(options());
    Driver::prepare(&mut balloons.device, host.memory.guest(), ALL);
    assert_eq!(get(&mut balloons.device, NUM_PAGES_REGISTER), 512);
    balloons.control.set_target(1024);
    let section = balloons.device.save(0).unwrap();
    let mut restored = host.balloon(options());
    restored.device.restore(&section).unwrap();
    restored.device.resume();
    assert_eq!(restored.line.edges(), 0);
    begin(&mut restored.device);
    assert_eq!(restored.line.edges(), 1);
    assert_eq!(get(&mut restored.device, NUM_PAGES_REGISTER), 1024);
}

#[test]
fn the_driver_learns_of_another_target() {
    let host = Host::new();
    let (mut balloons, _driver) = host.started();
    assert_eq!(get(&mut balloons.device, NUM_PAGES_REGISTER), 512);
    let before = balloons.line.edges();
    balloons.control.set_target(1024);
    serve_all(&balloons.device);
    assert_eq!(get(&mut balloons.device, NUM_PAGES_REGISTER), 1024);
    assert_eq!(get(&mut balloons.device, VIRTIO_MMIO_INTERRUPT_STATUS), 2);
    assert_eq!(balloons.line.edges(), before + 1);
    // Only of another.
    balloons.control.set_target(1024);
    serve_all(&balloons.device);
    assert_eq!(balloons.line.edges(), before + 1);
}

#[test]
fn a_driver_that_starts_later_finds_the_target_of_then() {
    let host = Host::new();
    let mut balloons = host.balloon(options());
    balloons.control.set_target(1);
    serve_all(&balloons.device);
    assert_eq!(balloons.line.edges(), 0);
    assert_eq!(get(&mut balloons.device, NUM_PAGES_REGISTER), 1);
    let _driver = Driver::start(&mut balloons.device, host.memory.guest(), ALL);
    assert_eq!(get(&mut balloons.device, NUM_PAGES_REGISTER), 1);
}

#[test]
fn the_driver_says_what_is_in_the_balloon_and_writes_nothing_else() {
    let host = Host::new();
    let (mut balloons, _driver) = host.started();
    set(&mut balloons.device, ACTUAL_REGISTER, 300);
    assert_eq!(get(&mut balloons.device, ACTUAL_REGISTER), 300);
    let edges = balloons.line.edges();
    set(&mut balloons.device, NUM_PAGES_REGISTER, 5);
    balloons
        .device
        .write(u64::from(ACTUAL_REGISTER), &[0xff; 8]);
    balloons
        .device
        .write(u64::from(ACTUAL_REGISTER) + 4, &[0xff; 4]);
    balloons
        .device
        .write(u64::from(NUM_PAGES_REGISTER) + 2, &[0xff; 4]);
    let status = balloons.control.status();
    assert_eq!((status.target_pages, status.actual_pages), (512, 300));
    assert_eq!(get(&mut balloons.device, NUM_PAGES_REGISTER), 512);
    assert_eq!(balloons.line.edges(), edges);
    // One without a driver has nothing in it.
    set(&mut balloons.device, VIRTIO_MMIO_STATUS, 0);
    let status = balloons.control.status();
    assert_eq!((status.actual_pages, status.driver), (0, false));
    assert_eq!(get(&mut balloons.device, ACTUAL_REGISTER), 0);
}

#[test]
fn statistics_come_when_they_are_asked_for() {
    let host = Host::new();
    let (mut balloons, driver) = host.started();
    let mut statistics = driver.of_queue(STATISTICS as u32);
    // The first, which the driver tells on its own; the device keeps the buffer.
    let told = entries(&[(4, 1000), (99, 1), (5, 1), (5, 2000)]);
    statistics.offer(&[Part::Out(&told)]);
    statistics.notify(&mut balloons.device);
    assert_eq!(statistics.used(), 0);
    let (_, known) = balloons.control.status().statistics.unwrap();
    assert_eq!(known, [("free_bytes", 1000), ("total_bytes", 2000)]);

    let control = Arc::clone(&balloons.control);
    let asked = std::thread::spawn(move || control.ask(PATIENCE));
    while statistics.used() == 0 {
        serve_all(&balloons.device);
    }
    statistics.offer(&[Part::Out(&entries(&[(4, 500)]))]);
    statistics.notify(&mut balloons.device);
    let (_, known) = asked.join().unwrap().statistics.unwrap();
    assert_eq!(known, [("free_bytes", 500)]);
    // It is not asked again for what was told.
    serve_all(&balloons.device);
    assert_eq!(statistics.used(), 1);
}

#[test]
fn statistics_that_a_driver_offers_before_it_has_begun_are_read_then() {
    let host = Host::new();
    let mut balloons = host.balloon(options());
    let driver = Driver::prepare(&mut balloons.device, host.memory.guest(), ALL);
    let mut statistics = driver.of_queue(STATISTICS as u32);
    statistics.offer(&[Part::Out(&entries(&[(4, 500)]))]);
    statistics.notify(&mut balloons.device);
    assert_eq!(balloons.control.status().statistics, None);
    begin(&mut balloons.device);
    serve_notified(&mut balloons.device);
    let (_, known) = balloons.control.status().statistics.unwrap();
    assert_eq!(known, [("free_bytes", 500)]);
    assert_eq!(statistics.used(), 0);
}

#[test]
fn statistics_come_every_so_often() {
    let host = Host::new();
    let (mut balloons, driver) = host.started();
    let mut statistics = driver.of_queue(STATISTICS as u32);
    statistics.offer(&[Part::Out(&[])]);
    statistics.notify(&mut balloons.device);
    balloons.control.set_statistics_interval(1);
    for told in 1..=2 {
        while statistics.used() < told {
            serve_all(&balloons.device);
            std::thread::yield_now();
        }
        statistics.offer(&[Part::Out(&[])]);
        statistics.notify(&mut balloons.device);
    }
}

#[test]
fn who_asks_a_guest_that_says_nothing_is_told_what_is_known() {
    let host = Host::new();
    let balloons = host.balloon(options());
    let status = balloons.control.ask(PATIENCE);
    assert_eq!((status.driver, status.statistics), (false, None));
    let (balloons, _driver) = host.started();
    let begun = Instant::now();
    let status = balloons.control.ask(PATIENCE);
    assert!(
        begun.elapsed() < PATIENCE,
        "who has never told was waited for"
    );
    assert_eq!((status.driver, status.statistics), (true, None));
    let (mut balloons, driver) = host.started();
    let mut statistics = driver.of_queue(STATISTICS as u32);
    statistics.offer(&[Part::Out(&entries(&[(4, 500)]))]);
    statistics.notify(&mut balloons.device);
    let status = balloons.control.ask(Duration::from_millis(1));
    let (_, known) = status.statistics.unwrap();
    assert_eq!(known, [("free_bytes", 500)]);
}

#[test]
fn buffers_for_statistics_beyond_the_one_are_given_back() {
    let host = Host::new();
    let (mut balloons, driver) = host.started();
    let mut statistics = driver.of_queue(STATISTICS as u32);
    for free in 0..40 {
        statistics.offer(&[Part::Out(&entries(&[(4, free)]))]);
    }
    statistics.notify(&mut balloons.device);
    assert_eq!(statistics.used(), 39);
    let (_, known) = balloons.control.status().statistics.unwrap();
    assert_eq!(known, [("free_bytes", 39)]);
}

#[test]
fn a_buffer_for_statistics_is_gone_with_its_queue() {
    let host = Host::new();
    let (mut balloons, driver) = host.started();
    let mut statistics = driver.of_queue(STATISTICS as u32);
    statistics.offer(&[Part::Out(&[])]);
    statistics.notify(&mut balloons.device);
    set(
        &mut balloons.device,
        VIRTIO_MMIO_QUEUE_SEL,
        STATISTICS as u32,
    );
    set(&mut balloons.device, VIRTIO_MMIO_QUEUE_READY, 0);
    let saved: SavedBalloon = balloons.device.save(0).unwrap().decode().unwrap();
    assert!(saved.statistics_buffer.is_empty());
    statistics.store(AVAILABLE_INDEX + 2 * QUEUE_BYTES, 0u16);
    set(&mut balloons.device, VIRTIO_MMIO_QUEUE_READY, 1);
    serve_all(&balloons.device);
    let section = balloons.device.save(0).unwrap();
    host.fresh().restore(&section).unwrap();
    assert_eq!(statistics.used(), 0);
    // A snapshot from before says that there is one: of a queue that is not ready, or has begun anew.
    let begun: SavedBalloon = section.decode().unwrap();
    for saved in [saved, begun] {
        let stale = SavedBalloon {
            statistics_buffer: vec![0],
            ..saved
        };
        let mut restored = host.fresh();
        restored
            .restore(&Section::encode(0, &stale).unwrap())
            .unwrap();
        set(&mut restored, VIRTIO_MMIO_QUEUE_READY, 1);
        serve_all(&restored);
        let section = restored.save(0).unwrap();
        drop(restored);
        host.fresh().restore(&section).unwrap();
        assert_eq!(statistics.used(), 0);
    }
}

#[test]
fn pages_that_are_reported_free_are_the_hosts() {
    let host = Host::new();
    let (mut balloons, driver) = host.started();
    let reports = driver.of_queue(REPORTING as u32);
    for at in [0, 2 << 20, 4 << 20] {
        host.write(FREE + at);
    }
    // One range, and one that is not all whole pages.
    reports.describe(0, FREE, 2 << 20, 3, 1);
    reports.describe(1, FREE + (4 << 20) + 1, 2 * PAGE as u32, 2, 0);
    reports.publish(0);
    reports.notify(&mut balloons.device);
    assert_eq!(reports.used(), 1);
    assert_eq!(
        [0, 2 << 20, 4 << 20].map(|at| host.byte(FREE + at)),
        [0, 7, 7]
    );
}

#[test]
fn a_report_that_is_none_needs_a_reset() {
    // Outside of memory, and for the device to read.
    for (address, flags) in [(MIN_MEMORY_BYTES - PAGE, 2), (FREE, 0)] {
        let host = Host::new();
        let (mut balloons, driver) = host.started();
        let reports = driver.of_queue(REPORTING as u32);
        reports.describe(0, address, 2 * PAGE as u32, flags, 0);
        reports.publish(0);
        reports.notify(&mut balloons.device);
        let status = get(&mut balloons.device, VIRTIO_MMIO_STATUS);
        assert_ne!(status & VIRTIO_CONFIG_S_NEEDS_RESET, 0, "{address:x}");
        assert_eq!(reports.used(), 0);
    }
}

#[test]
fn a_balloon_that_took_pages_of_the_queues_themselves_does_not_panic() {
    let host = Host::new();
    let (mut balloons, mut driver) = host.started();
    let all = numbers(&(0..4096).collect::<Vec<_>>());
    driver.offer(&[Part::Out(&all)]);
    driver.notify(&mut balloons.device);
    serve_all(&balloons.device);
}

#[test]
fn a_restored_balloon_is_what_it_was_and_asks_at_once() {
    let host = Host::new();
    let (mut balloons, driver) = host.started();
    balloons.control.set_target(600);
    balloons.control.set_statistics_interval(1000);
    set(&mut balloons.device, ACTUAL_REGISTER, 599);
    let mut statistics = driver.of_queue(STATISTICS as u32);
    statistics.offer(&[Part::Out(&[])]);
    statistics.notify(&mut balloons.device);
    let section = balloons.device.save(0).unwrap();
    drop(balloons);

    let saved: SavedBalloon = section.decode().unwrap();
    let mut restored = host.balloon(saved.options());
    restored.device.restore(&section).unwrap();
    let status = restored.control.status();
    assert_eq!((status.target_pages, status.actual_pages), (600, 599));
    assert_eq!((status.statistics_interval_s, status.driver), (1000, true));
    assert_eq!(get(&mut restored.device, NUM_PAGES_REGISTER), 600);
    assert_eq!(get(&mut restored.device, ACTUAL_REGISTER), 599);
    serve_all(&restored.device);
    assert_eq!(statistics.used(), 1);
    // One that offers something else is not this one.
    let mut other = host.balloon(BalloonOptions {
        deflate_on_oom: false,
        ..options()
    });
    assert!(other.device.restore(&section).is_err());
}

#[test]
fn one_that_is_restored_to_before_it_had_a_driver_has_none() {
    let host = Host::new();
    let mut balloons = host.balloon(options());
    let section = balloons.device.save(0).unwrap();
    let _driver = Driver::start(&mut balloons.device, host.memory.guest(), ALL);
    set(&mut balloons.device, ACTUAL_REGISTER, 7);
    assert!(balloons.control.status().driver);
    balloons.device.restore(&section).unwrap();
    let status = balloons.control.status();
    assert_eq!((status.driver, status.actual_pages), (false, 0));
}
