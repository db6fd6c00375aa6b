//! What a worker measures.

use super::Kind::{Counter, Gauge};
use super::{At, Definition, define};

define! { ALL;
    WORKER_INFO: Gauge, Worker, "fleet_worker_info" {"node", "version"}, "1, with the node's id, once it is registered, and the version of the program";
    WORKER_CONNECTED: Gauge, Worker, "fleet_worker_connected", "1 while a coordinator holds this worker";
    WORKER_RECONNECTS: Counter, Worker, "fleet_worker_reconnects_total", "Connections to coordinators after the first";
    WORKER_SLOTS: Gauge, Worker, "fleet_worker_slots", "Slots that the node offers";
    WORKER_SLOTS_USED: Gauge, Worker, "fleet_worker_slots_used", "Ranks that run here, or are being started or ended";
    WORKER_OUTPUT_LINES: Counter, Worker, "fleet_worker_output_lines_total", "Lines that ranks have printed, or the worker for them";
    WORKER_OUTPUT_LINES_LEFT_OUT: Counter, Worker, "fleet_worker_output_lines_left_out_total", "Lines that the coordinators do not get because there are too many; they are in the ranks' files";

    RANK_STEP: Gauge, Worker, "fleet_rank_step" {"job", "rank"}, "Last step that the job's rank 0 told; only where that runs here, or the ranks tell what they do";
    RANK_RESIDENT_BYTES: Gauge, Worker, "fleet_rank_resident_bytes" {"job", "rank"}, "Resident memory of the rank's process";
    RANK_PROPORTIONAL_BYTES: Gauge, Worker, "fleet_rank_proportional_bytes" {"job", "rank"}, "Resident memory of the rank's process, shared pages counted in parts";
    RANK_DEVICE_BYTES: Gauge, Worker, "fleet_rank_device_bytes" {"job", "rank"}, "Memory of CUDA devices that the rank's process holds, as NVML says";
    RANK_CPU_SECONDS: Counter, Worker, "fleet_rank_cpu_seconds_total" {"job", "rank"}, "CPU time of the rank's process";
    RANK_COLLECTIVES: Counter, Worker, "fleet_rank_collectives_total" {"job", "rank"}, "Collective calls that the rank has begun with those of its host";
    RANK_RESTARTS: Counter, Worker, "fleet_rank_restarts_total" {"job", "rank"}, "Starts of the job after its first";

    JOB_LOSS: Gauge, Worker, "fleet_worker_job_loss" {"job"}, "Loss of the last step of a job whose rank 0 runs here";
    JOB_TOKENS_PER_SECOND: Gauge, Worker, "fleet_worker_job_tokens_per_second" {"job"}, "Tokens per second of all ranks of a job whose rank 0 runs here";
    JOB_STEP_SECONDS: Gauge, Worker, "fleet_worker_job_step_seconds" {"job", "part"}, "Time of a step of a job whose rank 0 runs here, by part, as `fleet_job_step_seconds`";
    CHECKPOINT_BYTES: Counter, Worker, "fleet_worker_checkpoint_bytes_total", "Bytes of the checkpoints of jobs whose rank 0 runs here";
    CHECKPOINT_SECONDS: Counter, Worker, "fleet_worker_checkpoint_seconds_total", "Time that checkpoints have taken from training, of jobs whose rank 0 runs here";

    MACHINE_CPU_SECONDS: Counter, Worker, "fleet_machine_cpu_seconds_total" {"mode"}, "CPU time of the machine since its start, by mode: user, nice, system, idle, iowait, irq, softirq or steal";
    MACHINE_CPUS: Gauge, Worker, "fleet_machine_cpus", "CPUs that are online";
    MACHINE_LOAD1: Gauge, Worker, "fleet_machine_load1", "Load average of the last minute";
    MACHINE_MEMORY_BYTES: Gauge, Worker, "fleet_machine_memory_bytes", "Memory of the machine";
    MACHINE_MEMORY_AVAILABLE_BYTES: Gauge, Worker, "fleet_machine_memory_available_bytes", "Memory that programs can have without swapping";
    MACHINE_DISK_FREE_BYTES: Gauge, Worker, "fleet_machine_disk_free_bytes", "Free space of the file system of the worker's data directory";
    MACHINE_DISK_SIZE_BYTES: Gauge, Worker, "fleet_machine_disk_size_bytes", "Size of the file system of the worker's data directory";

    GPU_MEMORY_BYTES: Gauge, Worker, "fleet_gpu_memory_bytes" {"gpu"}, "Memory of a CUDA device; what is of devices is there where NVML is";
    GPU_MEMORY_USED_BYTES: Gauge, Worker, "fleet_gpu_memory_used_bytes" {"gpu"}, "Memory of a CUDA device that is in use";
    GPU_UTILIZATION: Gauge, Worker, "fleet_gpu_utilization_ratio" {"gpu"}, "Part of the last second or so in which the device computed, 0 to 1";
}
