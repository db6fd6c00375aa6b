//! How much memory a process has used, from `/proc`. Where there is no `/proc`, nothing is reported.

/// In MiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// The most that was ever resident (VmHWM).
    pub peak_rss: u64,
    /// Resident now, pages that are shared counted in parts.
    pub pss: u64,
}

/// `None` once the process is gone.
pub fn of_process(pid: u32) -> Option<Memory> {
    let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).ok();
    let peak_rss = kib(&read("status")?, "VmHWM:")? >> 10;
    let pss = kib(&read("smaps_rollup")?, "Pss:")? >> 10;
    Some(Memory { peak_rss, pss })
}

/// The number of the line `Name:   123 kB`.
pub fn kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn this_process_uses_memory_and_a_process_that_is_not_there_none() {
        let block = std::hint::black_box(vec![1u8; 64 << 20]);
        let memory = of_process(std::process::id()).unwrap();
        // A child that another test is just forking shares its pages: they count half then.
        assert!(memory.peak_rss >= 64 && memory.pss > 0, "{memory:?}");
        drop(block);
        assert!(of_process(std::process::id()).unwrap().peak_rss >= 64);
        assert_eq!(of_process(u32::MAX), None);
    }

    #[test]
    fn only_the_named_line_is_read() {
        assert_eq!(kib("Pss_Dirty:  7 kB\nPss:   2048 kB\n", "Pss:"), Some(2048));
        assert_eq!(kib("VmRSS: x", "VmRSS:"), None);
    }
}
