use super::*;
use crate::conformance::{Subject, conforms};

const SECOND: u8 = 0x00;
const SECOND_ALARM: u8 = 0x01;
const MINUTE: u8 = 0x02;
const HOUR: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const CENTURY: u8 = 0x32;

/// Sunday, 2024-03-31 23:59:58 UTC.
const NOW: i64 = 1_711_929_598;

fn clock() -> Rtc {
    Rtc::with_clock(|| NOW)
}

fn get(rtc: &mut Rtc, register: u8) -> u8 {
    let mut data = [0];
    rtc.write(0, &[register]);
    rtc.read(1, &mut data);
    data[0]
}

fn set(rtc: &mut Rtc, register: u8, value: u8) {
    rtc.write(0, &[register]);
    rtc.write(1, &[value]);
}

/// Century, year, month, day, weekday, hour, minute, second.
fn time(rtc: &mut Rtc) -> [u8; 8] {
    [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOUR, MINUTE, SECOND].map(|register| get(rtc, register))
}

struct Clock;

impl Subject for Clock {
    type Device = Rtc;
    type Saved = SavedRtc;
    const SPAN: u64 = PORTS;

    fn new() -> Self {
        Self
    }

    fn fresh(&self) -> Rtc {
        clock()
    }

    fn work(&self, rtc: &mut Rtc) {
        set(rtc, 0x40, 0x77);
        set(rtc, MINUTE, 0x12);
        set(rtc, REGISTER_B, B_SET | B_24_HOURS);
        set(rtc, HOUR, 0x05);
    }
}

conforms!(conformance, super::Clock);

#[test]
fn it_shows_the_hosts_time_in_the_format_of_register_b() {
    let mut rtc = clock();
    let bcd = [0x20, 0x24, 0x03, 0x31, 1, 0x23, 0x59, 0x58];
    assert_eq!(time(&mut rtc), bcd);
    set(&mut rtc, REGISTER_B, B_24_HOURS | B_BINARY);
    assert_eq!(time(&mut rtc), [20, 24, 3, 31, 1, 23, 59, 58]);
    set(&mut rtc, REGISTER_B, 0);
    assert_eq!(get(&mut rtc, HOUR), 0x91);
    set(&mut rtc, REGISTER_B, B_BINARY);
    assert_eq!(get(&mut rtc, HOUR), 0x8b);
}

/// A clock that is to be read at the last second of its month, and is read on a second later.
fn late() -> Rtc {
    Rtc::with_clock(|| NOW + 1)
}

#[test]
fn a_time_that_is_read_in_pieces_is_of_one_instant() {
    let pieces = [
        (CENTURY, 0x20),
        (YEAR, 0x24),
        (MONTH, 0x03),
        (DAY, 0x31),
        (WEEKDAY, 1),
        (HOUR, 0x23),
        (MINUTE, 0x59),
        (SECOND, 0x59),
    ];
    for read_first in pieces {
        let mut rtc = late();
        assert_eq!(get(&mut rtc, read_first.0), read_first.1);
        rtc.now = || NOW + 2;
        for (register, value) in pieces.into_iter().filter(|piece| *piece != read_first) {
            assert_eq!(get(&mut rtc, register), value, "{register:#x}");
        }
        // What is read again is of another time.
        assert_eq!(time(&mut rtc), [0x20, 0x24, 0x04, 1, 2, 0, 0, 0]);
    }
}

#[test]
fn a_time_begins_anew_with_register_a_with_what_is_written_and_after_a_while() {
    for (act, now, minute) in [
        ((|_| ()) as fn(&mut Rtc), (|| NOW + 2) as Now, 0x59),
        (|_| (), || NOW + 3, 0),
        // The host's clock was set back.
        (|_| (), || NOW - 60, 0x58),
        (|rtc| assert_ne!(get(rtc, REGISTER_A), 0), || NOW + 2, 0),
        (|rtc| set(rtc, MINUTE, 0x07), || NOW + 2, 0x07),
        (
            |rtc| rtc.restore(&clock().save(0).unwrap()).unwrap(),
            || NOW + 2,
            0,
        ),
    ] {
        let mut rtc = late();
        assert_eq!(get(&mut rtc, SECOND), 0x59);
        rtc.now = now;
        act(&mut rtc);
        assert_eq!(get(&mut rtc, MINUTE), minute);
    }
}

#[test]
fn midnight_and_noon_are_twelve() {
    for (hour, shown) in [(0, 0x12), (1, 0x01), (12, 0x92), (13, 0x81)] {
        let mut rtc = clock();
        set(&mut rtc, REGISTER_B, B_24_HOURS | B_BINARY);
        set(&mut rtc, HOUR, hour);
        set(&mut rtc, REGISTER_B, 0);
        assert_eq!(get(&mut rtc, HOUR), shown);
        set(&mut rtc, HOUR, shown);
        set(&mut rtc, REGISTER_B, B_24_HOURS | B_BINARY);
        assert_eq!(get(&mut rtc, HOUR), hour);
    }
}

#[test]
fn a_stopped_clock_is_set_in_any_order_and_goes_on_from_there() {
    let mut rtc = clock();
    set(&mut rtc, REGISTER_B, B_SET | B_24_HOURS);
    // From the 31st of March, by way of February.
    for (register, value) in [
        (MONTH, 0x02),
        (DAY, 0x29),
        (YEAR, 0x00),
        (CENTURY, 0x20),
        (HOUR, 0x01),
        (MINUTE, 0x02),
        (SECOND, 0x03),
    ] {
        set(&mut rtc, register, value);
    }
    let set_to = [0x20, 0x00, 0x02, 0x29, 3, 0x01, 0x02, 0x03];
    assert_eq!(time(&mut rtc), set_to);
    rtc.now = || NOW + 100;
    assert_eq!(time(&mut rtc), set_to);
    set(&mut rtc, REGISTER_B, B_24_HOURS);
    rtc.now = || NOW + 106;
    assert_eq!(
        time(&mut rtc),
        [0x20, 0x00, 0x02, 0x29, 3, 0x01, 0x02, 0x09]
    );
}

#[test]
fn what_is_not_a_time_is_not_taken() {
    let mut rtc = clock();
    let before = time(&mut rtc);
    for (register, value) in [
        (SECOND, 0x60),
        (MINUTE, 0xff),
        (HOUR, 0x24),
        (DAY, 0x32),
        (DAY, 0),
        (MONTH, 0x13),
        (MONTH, 0),
        (CENTURY, 0xff),
    ] {
        set(&mut rtc, register, value);
        assert_eq!(time(&mut rtc), before, "{register:#x} = {value:#x}");
    }
}

#[test]
fn the_offset_outlives_the_machine() {
    let mut rtc = clock();
    set(&mut rtc, YEAR, 0x30);
    let section = rtc.save(0).unwrap();
    let mut restored = Rtc::with_clock(|| NOW + 1);
    restored.restore(&section).unwrap();
    assert_eq!(
        time(&mut restored),
        [0x20, 0x30, 0x03, 0x31, 1, 0x23, 0x59, 0x59]
    );
}

#[test]
fn an_impossible_state_is_refused() {
    let saved: SavedRtc = clock().save(0).unwrap().decode().unwrap();
    let damages: [fn(&mut SavedRtc); 4] = [
        |s| s.index = 0x80,
        |s| s.stopped_at = Some(NOW),
        |s| s.registers[usize::from(REGISTER_B)] |= B_SET,
        |s| s.registers.push(0),
    ];
    for (index, damage) in damages.into_iter().enumerate() {
        let mut saved = saved.clone();
        damage(&mut saved);
        let section = Section::encode(0, &saved).unwrap();
        let error = clock().restore(&section);
        assert!(
            matches!(error, Err(Error::Impossible { .. })),
            "damage {index}"
        );
    }
}

#[test]
fn a_clock_that_was_forged_to_no_date_can_be_set() {
    let mut saved: SavedRtc = clock().save(0).unwrap().decode().unwrap();
    saved.offset_seconds = i64::MIN;
    let mut rtc = clock();
    rtc.restore(&Section::encode(0, &saved).unwrap()).unwrap();
    assert_eq!(time(&mut rtc), [0x19, 0x70, 1, 1, 5, 0, 0, 0]);
    set(&mut rtc, CENTURY, 0x20);
    set(&mut rtc, YEAR, 0x24);
    assert_eq!(time(&mut rtc)[..4], [0x20, 0x24, 1, 1]);
}

#[test]
fn memory_and_alarm_are_kept_and_the_rest_is_constant() {
    let mut rtc = clock();
    set(&mut rtc, SECOND_ALARM, 0x33);
    set(&mut rtc, 0x7f, 0x44);
    set(&mut rtc, REGISTER_A, A_UPDATE_IN_PROGRESS | 0x2a);
    set(&mut rtc, REGISTER_C, 0xff);
    set(&mut rtc, REGISTER_D, 0);
    assert_eq!(get(&mut rtc, SECOND_ALARM), 0x33);
    // Bit 7 of the index masks the NMI and does not select.
    assert_eq!(get(&mut rtc, 0xff), 0x44);
    assert_eq!(get(&mut rtc, REGISTER_A), 0x2a);
    assert_eq!(get(&mut rtc, REGISTER_C), 0);
    assert_eq!(get(&mut rtc, REGISTER_D), D_VALID);
}

#[test]
fn the_hosts_clock_is_in_seconds_since_the_epoch() {
    // Between 2024 and 2200.
    assert!((1_704_067_200..7_258_118_400).contains(&host_seconds()));
}
