//! The words behind `?`, and the pictures that they ask for.

use super::{Unserved, unserved};
use fleet_common::ids::ProfileId;
use fleet_common::protocol::RunKey;
use fleet_plot::{Chart, Stands};

/// Runs and metrics in one picture, at most.
const NAMED_MAX: usize = 16;
/// Bytes of a metric's name.
const NAME_MAX: usize = 200;
const WIDTH: std::ops::RangeInclusive<u32> = 200..=4_000;
const HEIGHT: std::ops::RangeInclusive<u32> = 100..=2_000;
const SMOOTH_MAX: usize = 10_000;

/// How large a picture is, and where it is to stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    pub width: u32,
    pub height: u32,
    pub stands: Stands,
}

impl Frame {
    const USUAL: Frame = Frame { width: 720, height: 280, stands: Stands::Alone };

    /// Whether this word says something of it.
    fn takes(&mut self, name: &str, value: &str) -> Result<bool, Unserved> {
        match name {
            "width" => self.width = number(value, *WIDTH.start(), *WIDTH.end())?,
            "height" => self.height = number(value, *HEIGHT.start(), *HEIGHT.end())?,
            "in" if value == "page" => self.stands = Stands::InPage,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// A chart of this size, as SVG.
    pub fn draw(self, chart: Chart) -> String {
        Chart { width: self.width, height: self.height, ..chart }.svg(self.stands)
    }
}

/// Curves that are to be drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    pub runs: Vec<RunKey>,
    pub metrics: Vec<String>,
    pub log: bool,
    pub smooth: usize,
    pub frame: Frame,
}

impl Picture {
    /// `run=job-1&run=run-2&metric=loss&log=1&smooth=5&width=720&height=280&in=page`.
    pub fn of(query: &str) -> Result<Picture, Unserved> {
        let mut picture =
            Picture { runs: Vec::new(), metrics: Vec::new(), log: false, smooth: 0, frame: Frame::USUAL };
        for (name, value) in words(query) {
            match name.as_str() {
                "run" => picture
                    .runs
                    .push(value.parse().map_err(|_| unserved(400, "a run is such as job-7 or run-3"))?),
                "metric" => picture.metrics.push(short(value)?),
                "log" => picture.log = value == "1",
                "smooth" => picture.smooth = number(&value, 0, SMOOTH_MAX)?,
                name if picture.frame.takes(name, &value)? => {}
                _ => return Err(unserved(400, "a picture has run, metric, log, smooth, width and height")),
            }
        }
        if picture.metrics.is_empty() {
            picture.metrics.push("loss".to_owned());
        }
        if picture.runs.is_empty() || picture.runs.len() > NAMED_MAX || picture.metrics.len() > NAMED_MAX {
            return Err(unserved(
                400,
                "a picture has 1 to 16 runs and as many metrics: ?run=job-1&metric=loss",
            ));
        }
        Ok(picture)
    }
}

/// Distributions of one feature that are to be drawn over each other.
#[derive(Clone, Debug, PartialEq)]
pub struct Distributions {
    pub profiles: Vec<ProfileId>,
    pub feature: String,
    pub frame: Frame,
}

impl Distributions {
    /// `profile=profile-2&profile=profile-1&feature=length`, and a frame as a `Picture` has.
    pub fn of(query: &str) -> Result<Distributions, Unserved> {
        let mut drawn = Distributions { profiles: Vec::new(), feature: String::new(), frame: Frame::USUAL };
        for (name, value) in words(query) {
            match name.as_str() {
                "profile" => {
                    let id = value.parse().map_err(|_| unserved(400, "a profile is such as profile-2"))?;
                    drawn.profiles.push(id);
                }
                "feature" => drawn.feature = short(value)?,
                name if drawn.frame.takes(name, &value)? => {}
                _ => return Err(unserved(400, "a distribution has profile, feature, width and height")),
            }
        }
        if drawn.profiles.is_empty() || drawn.profiles.len() > NAMED_MAX || drawn.feature.is_empty() {
            return Err(unserved(
                400,
                "a distribution is of 1 to 16 profiles: ?profile=profile-1&feature=NAME",
            ));
        }
        Ok(drawn)
    }
}

fn short(name: String) -> Result<String, Unserved> {
    if name.len() <= NAME_MAX { Ok(name) } else { Err(unserved(400, "nothing has so long a name")) }
}

fn number<T: std::str::FromStr + PartialOrd + ToString>(text: &str, low: T, high: T) -> Result<T, Unserved> {
    let number = text.parse().ok().filter(|number| (&low..=&high).contains(&number));
    number.ok_or_else(|| {
        unserved(400, format!("a picture has numbers from {} to {} there", low.to_string(), high.to_string()))
    })
}

/// Names and values; what is encoded badly is taken as it stands.
pub fn words(query: &str) -> impl Iterator<Item = (String, String)> {
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs.map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decoded(name), decoded(value))
    })
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let hex = after.get(..2).and_then(|two| std::str::from_utf8(two).ok());
        let byte = hex.filter(|_| *first == b'%').and_then(|two| u8::from_str_radix(two, 16).ok());
        bytes.push(byte.unwrap_or(if *first == b'+' { b' ' } else { *first }));
        rest = if byte.is_some() { &after[2..] } else { after };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_common::ids::{JobId, RunId};

    #[test]
    fn a_picture_is_what_was_asked_for_within_limits() {
        let picture =
            Picture::of("run=job-1&run=run-2&metric=memory_mib%5B0..2%5D&log=1&smooth=5&in=page").unwrap();
        assert_eq!(picture.runs, [RunKey::Job(JobId(1)), RunKey::Own(RunId(2))]);
        assert_eq!((&picture.metrics[..], picture.log), (&["memory_mib[0..2]".to_owned()][..], true));
        assert_eq!((picture.smooth, picture.frame), (5, Frame { stands: Stands::InPage, ..Frame::USUAL }));
        for bad in [
            "",
            "run=x",
            "run=job-1&width=9",
            "run=job-1&width=99999999",
            "run=job-1&smooth=-1",
            "run=job-1&x=1",
        ] {
            assert_eq!(Picture::of(bad).map_err(|why| why.status), Err(400), "{bad}");
        }
        assert!(Picture::of(&"run=job-1&".repeat(17)).is_err());
        let drawn = Distributions::of("profile=2&profile=profile-1&feature=a+b&width=400").unwrap();
        assert_eq!((&drawn.profiles[..], &drawn.feature[..]), (&[ProfileId(2), ProfileId(1)][..], "a b"));
        assert!(Distributions::of("profile=2").is_err());
    }

    #[test]
    fn what_is_encoded_badly_stands_as_it_is() {
        let read: Vec<_> = words("a=%3Cb%3E+c&d=%zz%4").collect();
        assert_eq!(read, [("a".into(), "<b> c".into()), ("d".into(), "%zz%4".into())]);
    }
}
