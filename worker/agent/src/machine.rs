//! The machine and the ranks' processes in numbers, from `/proc`. Where there is no `/proc`, only the disk is told of.

use crate::memory::kib;
use crate::processes;
use fleet_common::metrics::Page;
use fleet_common::metrics::worker::*;
use std::path::Path;

/// In the order of `/proc/stat` (proc_stat(5)).
const MODES: [&str; 8] = ["user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal"];

/// A rank that lives.
#[derive(Clone, Debug)]
pub struct RankProcess {
    pub job: String,
    pub rank: String,
    pub pid: u32,
}

/// What the kernel says of the machine, and of the file system that has this directory.
pub fn measure(data_dir: &Path, page: &mut Page) {
    let read = |file: &str| std::fs::read_to_string(Path::new("/proc").join(file)).unwrap_or_default();
    measure_cpus(&read("stat"), ticks_per_s(), page);
    let load = read("loadavg");
    page.put_some(&MACHINE_LOAD1, &[], load.split(' ').next().and_then(|load| load.parse().ok()));
    let memory = read("meminfo");
    let bytes = |name| kib(&memory, name).map(|kib| (kib << 10) as f64);
    page.put_some(&MACHINE_MEMORY_BYTES, &[], bytes("MemTotal:"));
    page.put_some(&MACHINE_MEMORY_AVAILABLE_BYTES, &[], bytes("MemAvailable:"));
    let Ok(disk) = nix::sys::statvfs::statvfs(data_dir) else { return };
    #[allow(clippy::useless_conversion)] // u32 on macOS
    let bytes = |blocks| u64::from(blocks).saturating_mul(u64::from(disk.fragment_size())) as f64;
    page.put(&MACHINE_DISK_FREE_BYTES, &[], bytes(disk.blocks_available()));
    page.put(&MACHINE_DISK_SIZE_BYTES, &[], bytes(disk.blocks()));
}

fn measure_cpus(stat: &str, ticks_per_s: f64, page: &mut Page) {
    let is_cpu = |line: &&str| line.strip_prefix("cpu").is_some_and(|rest| !rest.starts_with(' '));
    let cpus = stat.lines().filter(is_cpu).count();
    page.put_some(&MACHINE_CPUS, &[], (cpus > 0).then_some(cpus as f64));
    let all = stat.lines().find_map(|line| line.strip_prefix("cpu ")).unwrap_or_default();
    for (mode, ticks) in MODES.into_iter().zip(all.split_whitespace()) {
        let seconds = ticks.parse::<f64>().ok().map(|ticks| ticks / ticks_per_s);
        page.put_some(&MACHINE_CPU_SECONDS, &[mode], seconds);
    }
}

/// What the kernel says of these processes. One that is gone meanwhile is left out.
pub fn measure_ranks(ranks: &[RankProcess], page: &mut Page) {
    let ticks_per_s = ticks_per_s();
    for RankProcess { job, rank, pid } in ranks {
        let labels = [job.as_str(), rank.as_str()];
        let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
        // Both of one file: the sums of one look.
        let rollup = read("smaps_rollup");
        let bytes = |name| kib(&rollup, name).map(|kib| (kib << 10) as f64);
        page.put_some(&RANK_RESIDENT_BYTES, &labels, bytes("Rss:"));
        page.put_some(&RANK_PROPORTIONAL_BYTES, &labels, bytes("Pss:"));
        let seen = processes::look(*pid);
        page.put_some(&RANK_CPU_SECONDS, &labels, seen.map(|seen| seen.cpu as f64 / ticks_per_s));
    }
}

fn ticks_per_s() -> f64 {
    let said = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten();
    said.filter(|ticks| *ticks > 0).unwrap_or(100) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_common::metrics::Format;

    #[test]
    fn the_kernel_s_lines_are_understood() {
        let stat = "cpu  100 0 50 1000 5 0 2 0 0 0\ncpu0 50 0 25 500 3 0 1 0 0 0\ncpu1 50 0 25 500 2 0 1 0 0 0\nintr 7\n";
        let mut page = Page::default();
        measure_cpus(stat, 100.0, &mut page);
        let text = page.write(Format::Text);
        for line in [
            "fleet_machine_cpus 2\n",
            "fleet_machine_cpu_seconds_total{mode=\"user\"} 1\n",
            "fleet_machine_cpu_seconds_total{mode=\"idle\"} 10\n",
            "fleet_machine_cpu_seconds_total{mode=\"iowait\"} 0.05\n",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        let mut page = Page::default();
        measure_cpus("", 100.0, &mut page);
        assert_eq!(page, Page::default());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_machine_and_this_process_have_numbers() {
        let rank = |pid| RankProcess { job: "job-1".into(), rank: "0".into(), pid };
        let mut page = Page::default();
        measure(Path::new("/"), &mut page);
        measure_ranks(&[rank(std::process::id())], &mut page);
        let text = page.write(Format::Text);
        for name in [
            "fleet_machine_load1",
            "fleet_machine_memory_bytes",
            "fleet_machine_memory_available_bytes",
            "fleet_machine_disk_free_bytes",
            "fleet_machine_disk_size_bytes",
            "fleet_rank_resident_bytes{job=\"job-1\",rank=\"0\"}",
            "fleet_rank_proportional_bytes{job=\"job-1\",rank=\"0\"}",
            "fleet_rank_cpu_seconds_total{job=\"job-1\",rank=\"0\"}",
        ] {
            assert!(text.contains(&format!("\n{name} ")), "{name}: {text}");
        }
        let mut page = Page::default();
        measure_ranks(&[rank(u32::MAX)], &mut page);
        assert_eq!(page, Page::default());
    }
}
