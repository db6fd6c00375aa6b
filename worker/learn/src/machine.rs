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

/// Bytes that are free, or can be made free at once: of the machine, and of each control group around this process.
pub fn available_bytes() -> usize {
    let free = kib("/proc/meminfo", "MemAvailable:").map_or(usize::MAX, |kib| kib << 10);
    let of_groups = groups().iter().map(Group::free).min();
    of_groups.map_or(free, |of_groups| of_groups.min(free))
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
    groups().iter().map(|group| group.limit).min()
}

/// A control group that limits memory.
#[derive(Debug, PartialEq)]
struct Group {
    limit: usize,
    /// What its processes have, without what can be taken from them at once: files that nobody has looked at for long.
    used: usize,
}

impl Group {
    /// Version 2 and version 1 have other names for the same.
    fn of(dir: &Path) -> Option<Group> {
        let number = |file: &str| std::fs::read_to_string(dir.join(file)).ok()?.trim().parse::<usize>().ok();
        let of = |limit: &str, used: &str, idle: &str| {
            let limit = number(limit)?;
            let stat = std::fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
            let idle =
                stat.lines().find_map(|line| line.strip_prefix(idle)?.trim().parse().ok()).unwrap_or(0);
            Some(Group { limit, used: number(used).unwrap_or(0).saturating_sub(idle) })
        };
        of("memory.max", "memory.current", "inactive_file ")
            .or_else(|| of("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "))
    }

    fn free(&self) -> usize {
        self.limit.saturating_sub(self.used)
    }
}

fn groups() -> Vec<Group> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    groups_of(&groups, Path::new("/sys/fs/cgroup"))
}

/// `groups` has a line for each hierarchy: its number, its controllers (none of version 2), and the group. Below `mounted` lies the one of
/// version 2, or, where that is in `unified`, those of version 1 by their controllers.
fn groups_of(groups: &str, mounted: &Path) -> Vec<Group> {
    let found = groups.lines().filter_map(|line| {
        let (controllers, group) = line.split_once(':')?.1.split_once(":/")?;
        let roots = match controllers {
            "" => vec!["", "unified"],
            _ if controllers.split(',').any(|name| name == "memory") => vec![controllers],
            _ => return None,
        };
        let of = move |root: &str| {
            let root = mounted.join(root);
            Path::new(group).ancestors().filter_map(|group| Group::of(&root.join(group))).collect::<Vec<_>>()
        };
        Some(roots.into_iter().flat_map(of).collect::<Vec<_>>())
    });
    found.flatten().collect()
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
        write("a/memory.current", "470\n");
        write("a/memory.stat", "anon 9\ninactive_file 40\nactive_file 7\n");
        write("a/b/memory.max", "max\n");
        write("memory/x/memory.limit_in_bytes", "400\n");
        write("memory/memory.limit_in_bytes", "9223372036854771712\n");
        write("memory/x/memory.usage_in_bytes", "390\n");
        let limit = |groups: &str| groups_of(groups, dir.path()).iter().map(|group| group.limit).min();
        let free = |groups: &str| groups_of(groups, dir.path()).iter().map(Group::free).min();
        assert_eq!((free("0::/a/b\n"), free("4:memory:/x\n")), (Some(70), Some(10)));
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
