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

/// A line where programs have wanted more than a fourth of these cores in the last minute.
pub fn busy(cores: u32) -> Option<String> {
    let text = std::fs::read_to_string("/proc/loadavg").ok()?;
    let load: f64 = text.split_whitespace().next()?.parse().ok()?;
    (load > 0.25 * f64::from(cores))
        .then(|| format!("the machine is busy (load {load} on {cores} cores): speeds are unsteady, and may be several times off"))
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

/// The smallest limit of the control groups that this process is in, of either version.
fn group_limit() -> Option<usize> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    limit_of(&groups, Path::new("/sys/fs/cgroup"))
}

/// `groups` has a line for each hierarchy: its number, its controllers (none of version 2), and the group. Below `mounted` lies the one of
/// version 2, or, where that is in `unified`, those of version 1 by their controllers.
fn limit_of(groups: &str, mounted: &Path) -> Option<usize> {
    let limits = groups.lines().filter_map(|line| {
        let (controllers, group) = line.split_once(':')?.1.split_once(":/")?;
        let limit = |root: &str, file: &str| {
            let of = |group: &Path| -> Option<usize> {
                std::fs::read_to_string(mounted.join(root).join(group).join(file)).ok()?.trim().parse().ok()
            };
            Path::new(group).ancestors().filter_map(of).min()
        };
        match controllers {
            "" => limit("", "memory.max").into_iter().chain(limit("unified", "memory.max")).min(),
            _ if controllers.split(',').any(|name| name == "memory") => {
                limit(controllers, "memory.limit_in_bytes")
            }
            _ => None,
        }
    });
    limits.min()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_limit_of_all_groups_counts_in_either_version() {
        let dir = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| {
            let path = dir.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("a/memory.max", "500\n");
        write("a/b/memory.max", "max\n");
        write("memory/x/memory.limit_in_bytes", "400\n");
        write("memory/memory.limit_in_bytes", "9223372036854771712\n");
        let limit = |groups: &str| limit_of(groups, dir.path());
        assert_eq!(limit("0::/a/b\n"), Some(500));
        assert_eq!(limit("12:cpu,cpuacct:/x\n4:memory:/x\n0::/\n"), Some(400));
        assert_eq!(limit("4:memory:/x\n0::/a\n"), Some(400));
        assert_eq!(limit("0::/elsewhere\n"), None);
    }

    #[test]
    fn what_is_available_is_a_part_of_the_whole() {
        let (total, available) = (total_bytes(), available_bytes());
        assert!(memory_bytes() <= total);
        assert!(available > 1 << 20 && available < total && total < usize::MAX, "{available} of {total}");
        assert!(program_bytes(1) > program_bytes(4));
    }
}
