//! The threads of one rank. Work is cut into pieces that do not depend on timing, so results depend on the number of threads at most.

/// A fixed number of threads; with one, everything runs on the caller.
pub struct Workers {
    pool: Option<rayon::ThreadPool>,
    count: usize,
}

impl Workers {
    /// `prepare` is called on each of the threads, the caller's first.
    pub fn new(threads: u32, prepare: fn()) -> Result<Self, rayon::ThreadPoolBuildError> {
        let count = threads.max(1) as usize;
        prepare();
        let pool = match count {
            1 => None,
            _ => Some(
                rayon::ThreadPoolBuilder::new()
                    .num_threads(count)
                    .thread_name(|i| format!("engine-{i}"))
                    .start_handler(move |_| prepare())
                    .build()?,
            ),
        };
        Ok(Self { pool, count })
    }

    pub fn count(&self) -> usize {
        self.count
    }

    /// Does `work` on one of the threads: between pieces that follow each other closely, the others then stay awake.
    pub fn inside<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match &self.pool {
            None => work(),
            Some(pool) => pool.install(work),
        }
    }

    /// Calls `work(i, piece i)` for the pieces of `data`, each `piece` long (the last may be shorter).
    pub fn pieces<T: Send>(&self, data: &mut [T], piece: usize, work: impl Fn(usize, &mut [T]) + Sync) {
        match &self.pool {
            None => data.chunks_mut(piece).enumerate().for_each(|(i, chunk)| work(i, chunk)),
            Some(pool) => pool.scope(|scope| {
                for (i, chunk) in data.chunks_mut(piece).enumerate() {
                    let work = &work;
                    scope.spawn(move |_| work(i, chunk));
                }
            }),
        }
    }

    /// Calls `work` for each item, in any order.
    pub fn each<I: Send>(&self, items: impl Iterator<Item = I>, work: impl Fn(I) + Sync) {
        match &self.pool {
            None => items.for_each(work),
            Some(pool) => pool.in_place_scope(|scope| {
                for item in items {
                    let work = &work;
                    scope.spawn(move |_| work(item));
                }
            }),
        }
    }

    /// Rows per piece when `rows` are shared out evenly, in whole multiples of `granule`.
    pub fn share(&self, rows: usize, granule: usize) -> usize {
        rows.div_ceil(self.count).next_multiple_of(granule).max(1)
    }
}
