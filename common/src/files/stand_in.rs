//! Small files that a clone leaves in the place of large ones that it did not fetch.

/// What a file stands for that begins so, and how to have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StandIn {
    /// With its article.
    pub name: &'static str,
    pub cure: &'static str,
}

const LFS: StandIn =
    StandIn { name: "a Git LFS pointer, not the data", cure: "fetch the data with `git lfs pull`" };
const ANNEX: StandIn =
    StandIn { name: "a git-annex pointer, not the data", cure: "fetch the data with `git annex get`" };

const BEGINNINGS: [(&[u8], StandIn); 3] = [
    (b"version https://git-lfs.github.com/spec/", LFS),
    (b"version https://hawser.github.com/spec/", LFS),
    (b"/annex/objects/", ANNEX),
];

/// By the first bytes of a file.
pub fn stand_in(head: &[u8]) -> Option<StandIn> {
    BEGINNINGS.iter().find(|(beginning, _)| head.starts_with(beginning)).map(|(_, stand_in)| *stand_in)
}
