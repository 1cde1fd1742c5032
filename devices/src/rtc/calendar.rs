//! Seconds since the epoch as the clock's registers show them.

use time::{Date, Month, OffsetDateTime, Time};

use super::{B_24_HOURS, B_BINARY};

/// Bit 7 of the hours in 12-hour mode.
const PM: u8 = 1 << 7;

/// A time register of the MC146818, or the century that PCs keep at 0x32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Field {
    Second,
    Minute,
    Hour,
    Weekday,
    Day,
    Month,
    Year,
    Century,
}

impl Field {
    /// The field at `register`.
    pub(super) fn at(register: u8) -> Option<Self> {
        Some(match register {
            0x00 => Self::Second,
            0x02 => Self::Minute,
            0x04 => Self::Hour,
            0x06 => Self::Weekday,
            0x07 => Self::Day,
            0x08 => Self::Month,
            0x09 => Self::Year,
            0x32 => Self::Century,
            _ => return None,
        })
    }

    /// Its value at `seconds` since the epoch, in the format of register B's value `b`.
    pub(super) fn read(self, seconds: i64, b: u8) -> u8 {
        let time = date_at(seconds);
        let year = time.year().rem_euclid(10_000);
        let plain = match self {
            Self::Second => time.second(),
            Self::Minute => time.minute(),
            Self::Hour => return encode_hour(time.hour(), b),
            Self::Weekday => time.weekday().number_from_sunday(),
            Self::Day => time.day(),
            Self::Month => time.month().into(),
            Self::Year => (year % 100) as u8,
            Self::Century => (year / 100) as u8,
        };
        encode(plain, b)
    }

    /// `seconds` since the epoch, changed so that this field has `value`. `None` when that is not a
    /// date: the guest sets a date field by field, and passes through some that do not exist.
    pub(super) fn write(self, seconds: i64, value: u8, b: u8) -> Option<i64> {
        let old = date_at(seconds);
        let (mut year, mut month, mut day) = old.to_calendar_date();
        let (mut hour, mut minute, mut second) = old.to_hms();
        let plain = decode(value, b);
        match self {
            Self::Second => second = plain,
            Self::Minute => minute = plain,
            Self::Hour => hour = decode_hour(value, b),
            // It follows from the date.
            Self::Weekday => {}
            Self::Day => day = plain,
            Self::Month => month = Month::try_from(plain).ok()?,
            Self::Year => year = year - year.rem_euclid(100) + i32::from(plain),
            Self::Century => year = i32::from(plain) * 100 + year.rem_euclid(100),
        }
        // A day that the new month does not have becomes its last, lest the order in which the guest
        // writes decides what it may set.
        let date = Date::from_calendar_date(year, month, day)
            .or_else(|_| match self {
                Self::Month | Self::Year | Self::Century => {
                    Date::from_calendar_date(year, month, month.length(year))
                }
                _ => Date::from_calendar_date(year, month, day),
            })
            .ok()?;
        let time = Time::from_hms(hour, minute, second).ok()?;
        Some(date.with_time(time).assume_utc().unix_timestamp())
    }
}

/// What is no date, as only a state that somebody forged has it, counts as the epoch: so the guest can set the clock.
fn date_at(seconds: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

fn encode(value: u8, b: u8) -> u8 {
    if b & B_BINARY != 0 {
        value
    } else {
        (value / 10) << 4 | (value % 10)
    }
}

fn decode(value: u8, b: u8) -> u8 {
    if b & B_BINARY != 0 {
        value
    } else {
        (value >> 4) * 10 + (value & 0xf)
    }
}

fn encode_hour(hour: u8, b: u8) -> u8 {
    if b & B_24_HOURS != 0 {
        return encode(hour, b);
    }
    let twelve = match hour % 12 {
        0 => 12,
        hour => hour,
    };
    encode(twelve, b) | if hour < 12 { 0 } else { PM }
}

fn decode_hour(value: u8, b: u8) -> u8 {
    if b & B_24_HOURS != 0 {
        return decode(value, b);
    }
    let twelve = decode(value & !PM, b) % 12;
    twelve + if value & PM == 0 { 0 } else { 12 }
}
