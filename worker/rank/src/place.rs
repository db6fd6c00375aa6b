//! Where a rank computes. Ranks of a gang do so on devices of one kind: where the job leaves it open, on those that every rank has.

use fleet_collectives::{Gang, Op};
use fleet_common::job;
use tch::Device;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Place {
    Host,
    Device(job::Device, Device),
}

/// What the agent gave this rank, once it has shown that it computes; or why it does not.
pub fn find(name: &str) -> Result<Place, String> {
    let kind = match name {
        "cpu" => return Ok(Place::Host),
        "mps" => job::Device::Mps,
        _ => job::Device::Cuda,
    };
    Ok(Place::Device(kind, fleet_torch::device::open(name)?))
}

/// Where this rank of a job that leaves it open computes, and what to say of it. A collective call.
pub fn agree(
    found: Result<Place, String>,
    mut gang: Option<&mut dyn Gang>,
) -> fleet_learn::Result<(Place, Option<String>)> {
    let has = matches!(found, Ok(Place::Device(..)));
    let mut votes = [has, !has].map(|vote| f64::from(u8::from(vote)));
    if let Some(gang) = &mut gang {
        gang.all_reduce_f64(&mut votes, Op::Max)?;
    }
    let [any_has, any_lacks] = votes.map(|vote| vote > 0.0);
    let is_first = gang.is_none_or(|gang| gang.rank() == 0);
    Ok(match found {
        Ok(place) if !any_lacks => (place, None),
        Ok(_) if any_has && is_first => {
            (Place::Host, Some("not every rank has a device that works: training on the CPU".to_owned()))
        }
        Ok(_) => (Place::Host, None),
        Err(why) => (Place::Host, Some(format!("{why}: training on the CPU"))),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_collectives::{Segment, ShmCollective};
    use std::os::fd::AsRawFd;

    const CUDA: Place = Place::Device(job::Device::Cuda, Device::Cuda(0));

    /// What ranks that found these agree on.
    fn agreed(found: &[Result<Place, &str>]) -> Vec<(Place, String)> {
        let world = found.len();
        let segment = Segment::create(world, 1).unwrap();
        std::thread::scope(|scope| {
            let ranks: Vec<_> = (found.iter().enumerate())
                .map(|(rank, found)| {
                    let fd = segment.fd().as_raw_fd();
                    let found = found.map_err(str::to_owned);
                    scope.spawn(move || {
                        let mut gang = ShmCollective::attach(fd, rank, world, 1).unwrap();
                        let (place, note) = agree(found, Some(&mut gang)).unwrap();
                        (place, note.unwrap_or_default())
                    })
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    #[test]
    fn a_device_is_taken_where_every_rank_has_one() {
        let plain = |place| (place, String::new());
        assert_eq!(agreed(&[Ok(CUDA), Ok(CUDA)]), [plain(CUDA), plain(CUDA)]);
        assert_eq!(agreed(&[Ok(Place::Host), Ok(Place::Host)]), [plain(Place::Host), plain(Place::Host)]);
        for found in [[Ok(CUDA), Ok(Place::Host)], [Ok(Place::Host), Ok(CUDA)]] {
            let [first, second] = <[_; 2]>::try_from(agreed(&found)).unwrap();
            assert!(first.0 == Place::Host && first.1.contains("not every rank"), "{first:?}");
            assert_eq!(second, plain(Place::Host));
        }
        let broken = agreed(&[Ok(CUDA), Err("the driver is too old")]);
        assert_eq!(broken[1], (Place::Host, "the driver is too old: training on the CPU".to_owned()));
        assert_eq!(broken[0].0, Place::Host);
    }

    #[test]
    fn one_rank_agrees_with_itself() {
        assert_eq!(agree(Ok(CUDA), None).unwrap(), (CUDA, None));
        assert_eq!(agree(Ok(Place::Host), None).unwrap(), (Place::Host, None));
        assert!(agree(Err("it is gone".into()), None).unwrap().1.unwrap().starts_with("it is gone: "));
    }
}
