//! What a strategy keeps in memory, before anything runs.

use super::sharded::Rooms;
use fleet_common::job::Strategy;
use fleet_common::model::Layout;

/// Bytes for each rank on the CPU. What the ranks of a host share is divided by their number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// fp32 masters and, under bf16-mixed, their copy.
    pub weights: usize,
    pub gradients: usize,
    /// Both moments.
    pub optimizer: usize,
}

impl Needs {
    /// Of one of `ranks` ranks on a host; of one alone every strategy needs the same.
    pub fn of(strategy: Strategy, layout: &Layout, bf16: bool, ranks: usize) -> Needs {
        let shared = |bytes_each: usize| (bytes_each * layout.len).div_ceil(ranks);
        let whole = 4 * layout.len;
        let gradients = match strategy {
            _ if ranks == 1 => whole,
            Strategy::Auto | Strategy::Ddp => whole,
            Strategy::Fsdp | Strategy::Hsdp => shared(4) + 4 * Rooms::of_gradients(layout).len,
        };
        Needs { weights: shared(if bf16 { 6 } else { 4 }), gradients, optimizer: shared(8) }
    }

    /// Of a model in bf16.
    pub fn in_bf16(layout: &Layout, ranks: usize) -> Needs {
        let shared = |bytes_each: usize| (bytes_each * layout.len).div_ceil(ranks);
        let gradients = shared(2) + 4 * Rooms::of_gradients(layout).len;
        Needs { weights: shared(2), gradients, optimizer: shared(4) }
    }

    pub fn total(&self) -> usize {
        self.weights + self.gradients + self.optimizer
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Model;
    use crate::testing::tiny_with;
    use serde_json::json;

    #[test]
    fn shards_shrink_with_the_ranks_and_replicas_do_not() {
        let config = tiny_with(json!({"num_hidden_layers": 20}));
        let layout = Model::new(&config).unwrap().layout();
        let of = |strategy, ranks| Needs::of(strategy, &layout, false, ranks);
        assert_eq!(of(Strategy::Ddp, 1), of(Strategy::Fsdp, 1));
        assert_eq!(of(Strategy::Ddp, 1).total(), 16 * layout.len);
        assert_eq!(of(Strategy::Ddp, 4).gradients, 4 * layout.len);
        assert_eq!(of(Strategy::Fsdp, 4).gradients, layout.len + 4 * Rooms::of_gradients(&layout).len);
        assert_eq!(of(Strategy::Fsdp, 4).optimizer, 2 * layout.len);
        assert_eq!(Needs::of(Strategy::Ddp, &layout, true, 2).weights, 3 * layout.len);
        let rooms = 4 * Rooms::of_gradients(&layout).len;
        assert_eq!(Needs::in_bf16(&layout, 1).total(), 8 * layout.len + rooms);
    }
}
