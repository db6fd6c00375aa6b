//! The memory of this machine, as far as this process may use it.

use std::path::Path;

/// Bytes of memory that all processes here have together: of the machine, or of the control groups around this process.
pub fn memory_bytes() -> usize {
    match of_machine("MemTotal:") {
        0 => usize::MAX,
        memory => group_limit().map_or(memory, |limit| limit.min(memory)),
    }
}

/// The same with swap: what they can have at most.
pub fn total_bytes() -> usize {
    memory_bytes().saturating_add(of_machine("SwapTotal:"))
}

fn of_machine(key: &str) -> usize {
    kib("/proc/meminfo", key).unwrap_or(0) << 10
}

/// Bytes that are free, or can be made free at once, by the machine's count.
pub fn available_bytes() -> usize {
    let free = kib("/proc/meminfo", "MemAvailable:").map_or(usize::MAX, |kib| kib << 10);
    group_limit().map_or(free, |limit| limit.min(free))
}

/// What this program takes before it has a model, where `ranks` processes share the pages of its files.
pub fn program_bytes(ranks: usize) -> usize {
    let of = |key| kib("/proc/self/smaps_rollup", key).unwrap_or(0) << 10;
    let all = kib("/proc/self/status", "VmRSS:").unwrap_or(0) << 10;
    let own = of("Anonymous:");
    own + all.saturating_sub(own) / ranks
}

/// A line of a file in `/proc` that gives KiB.
fn kib(path: &str, key: &str) -> Option<usize> {
    let text = std::fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| line.strip_prefix(key)?.split_whitespace().next()?.parse().ok())
}

/// The smallest limit of the control groups (v2) that this process is in.
fn group_limit() -> Option<usize> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let limit = |group: &Path| {
        let file = Path::new("/sys/fs/cgroup").join(group).join("memory.max");
        std::fs::read_to_string(file).ok()?.trim().parse().ok()
    };
    Path::new(own).ancestors().filter_map(limit).min()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn what_is_available_is_a_part_of_the_whole() {
        let (total, available) = (total_bytes(), available_bytes());
        assert!(memory_bytes() <= total);
        assert!(available > 1 << 20 && available < total && total < usize::MAX, "{available} of {total}");
        assert!(program_bytes(1) > program_bytes(4));
    }
}
