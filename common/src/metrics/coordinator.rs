//! What a coordinator measures.

use super::Kind::{self, Counter, Gauge};
use super::{At, Definition, define};

/// From a tenth of a millisecond to some seconds.
const QUICK: Kind = Kind::Histogram { first: 0.0001, factor: 2.0, buckets: 16 };
/// From a second to some days.
const LONG: Kind = Kind::Histogram { first: 1.0, factor: 4.0, buckets: 10 };

define! { ALL;
    BUILD_INFO: Gauge, Coordinator, "fleet_build_info" {"version"}, "1, with the version of the program";

    RAFT_TERM: Gauge, Coordinator, "fleet_raft_term", "Term of the raft log";
    RAFT_IS_LEADER: Gauge, Coordinator, "fleet_raft_is_leader", "1 while this replica leads";
    RAFT_HAS_LEADER: Gauge, Coordinator, "fleet_raft_has_leader", "1 while this replica knows who leads";
    RAFT_IS_VOTER: Gauge, Coordinator, "fleet_raft_is_voter", "1 while this replica counts for majorities; a learner is still being brought up to date";
    RAFT_COMMIT_INDEX: Gauge, Coordinator, "fleet_raft_commit_index", "Last entry of the log that this replica knows to be committed";
    RAFT_APPLIED_INDEX: Gauge, Coordinator, "fleet_raft_applied_index", "Last entry of the log that this replica has applied";
    RAFT_LEADER_CHANGES: Counter, Coordinator, "fleet_raft_leader_changes_total", "Times that this replica came to know another leader, or the same one in a new term";
    RAFT_PROPOSALS: Counter, Coordinator, "fleet_raft_proposals_total", "Commands that this replica has put into the log while it led";
    RAFT_CONTRADICTIONS: Counter, Coordinator, "fleet_raft_contradictions_total", "Messages of other coordinators that contradict what was acknowledged: some disk was put back";
    RAFT_FSYNC_SECONDS: QUICK, Coordinator, "fleet_raft_fsync_seconds", "Time of a write to the disk that returns when it is durable";
    RAFT_ROUND_SECONDS: QUICK, Coordinator, "fleet_raft_round_seconds", "Time of one turn of the replica: all that waits, with its writes to the disk";
    COMMIT_SECONDS: QUICK, Coordinator, "fleet_commit_seconds", "Time from a client's change to its durable answer";
    RAFT_MEMBERS: Gauge, Coordinator, "fleet_raft_members" {"role"}, "Coordinators in the cluster's record, by role: voter or learner";
    RAFT_MEMBERS_REACHABLE: Gauge, Leader, "fleet_raft_members_reachable", "Voters that are heard now, the leader counted";
    RAFT_MEMBER_LAG: Gauge, Leader, "fleet_raft_member_lag_entries" {"replica"}, "Committed entries that another replica is not known to have";

    REQUESTS: Counter, Coordinator, "fleet_requests_total" {"request", "result"}, "Requests of clients, by kind and result: done or refused";
    READ_ONLY: Gauge, Coordinator, "fleet_read_only", "1 while writes are refused: the disk is full, or cannot be written";
    HISTORY_DAMAGED_TABLES: Gauge, Coordinator, "fleet_history_damaged_tables", "Tables of the history with rows that cannot be read here and are not mended yet";
    HISTORY_MENDED_ROWS: Counter, Coordinator, "fleet_history_mended_rows_total", "Rows that came from other coordinators because they could not be read here";
    STATE_BYTES: Gauge, Coordinator, "fleet_state_bytes", "Size of the cluster's state in the last snapshot";
    HISTORY_BYTES: Gauge, Coordinator, "fleet_history_bytes", "Size of the rows of the history, as `fleet retention` counts them";
    LOG_BYTES: Gauge, Coordinator, "fleet_log_bytes", "Size of the entries that the raft log keeps";
    DISK_FREE_BYTES: Gauge, Coordinator, "fleet_disk_free_bytes", "Free space of the file system of the data directory";
    DISK_SIZE_BYTES: Gauge, Coordinator, "fleet_disk_size_bytes", "Size of the file system of the data directory";

    QUIC_CONNECTIONS: Gauge, Coordinator, "fleet_quic_connections" {"kind"}, "Connections that were made to this coordinator, by who made them: client, worker or coordinator";
    QUIC_REFUSED: Counter, Coordinator, "fleet_quic_refused_total" {"reason"}, "Connections that were not let in: busy (too many at once), handshake (it failed or took too long), refused (not of this cluster, or at the wrong socket), revoked (cut off, or never admitted), later (cannot be told without a leader)";
    AGENTS: Gauge, Coordinator, "fleet_agents", "Agents of workers that this coordinator holds";
    HTTP_REQUESTS: Counter, Coordinator, "fleet_http_requests_total" {"path", "status"}, "HTTP requests, by pattern of the path and status";
    HTTP_STREAMS: Gauge, Coordinator, "fleet_http_streams", "Open streams of events over HTTP";

    NODES: Gauge, Coordinator, "fleet_nodes", "Registered nodes";
    NODES_DRAINING: Gauge, Coordinator, "fleet_nodes_draining", "Registered nodes that get no more work";
    NODES_CONNECTED: Gauge, Leader, "fleet_nodes_connected", "Registered nodes whose worker is connected to some coordinator";
    NODE_UP: Gauge, Leader, "fleet_node_up" {"node", "name"}, "1 while the node's worker is connected to some coordinator";
    SLOTS: Gauge, Leader, "fleet_slots", "Slots of the connected nodes";
    SLOTS_USED: Gauge, Coordinator, "fleet_slots_used", "Slots that jobs hold";

    JOBS: Gauge, Coordinator, "fleet_jobs" {"state"}, "Unfinished jobs, by state: queued, starting, running or stopping";
    JOBS_ENDED: Counter, Coordinator, "fleet_jobs_ended_total" {"outcome"}, "Jobs whose end this replica has applied: succeeded, failed or cancelled";
    QUEUE_OLDEST_SECONDS: Gauge, Coordinator, "fleet_queue_oldest_seconds", "For how long the job has waited that waits longest; 0 where none does";
    QUEUE_WAIT_SECONDS: LONG, Coordinator, "fleet_queue_wait_seconds", "For how long jobs had waited when they got a place, as this replica has applied it";

    JOB_STEP: Gauge, Coordinator, "fleet_job_step" {"job"}, "Last step of an unfinished job that has started; of these and what follows there are the newest thousand jobs";
    JOB_TOTAL_STEPS: Gauge, Coordinator, "fleet_job_total_steps" {"job"}, "Steps that the job will have made at its end";
    JOB_LOSS: Gauge, Coordinator, "fleet_job_loss" {"job"}, "Loss of the last step";
    JOB_EVAL_LOSS: Gauge, Coordinator, "fleet_job_eval_loss" {"job"}, "Loss of the last evaluation";
    JOB_LEARNING_RATE: Gauge, Coordinator, "fleet_job_learning_rate" {"job"}, "Learning rate of the last step";
    JOB_GRADIENT_NORM: Gauge, Coordinator, "fleet_job_gradient_norm" {"job"}, "Norm of the gradients of the last step, before clipping";
    JOB_TOKENS_PER_SECOND: Gauge, Coordinator, "fleet_job_tokens_per_second" {"job"}, "Tokens per second of all ranks, over the last steps";
    JOB_STEP_SECONDS: Gauge, Coordinator, "fleet_job_step_seconds" {"job", "part"}, "Time of a step, mean of the last steps and of all ranks, by part: data, forward, backward, communication (that nothing hides), waiting (for slower ranks), optimizer or checkpoint";
    JOB_STALLED: Gauge, Coordinator, "fleet_job_stalled" {"job"}, "1 while the job's ranks wait for one that stands still";
    JOB_RANKS: Gauge, Coordinator, "fleet_job_ranks" {"job"}, "Ranks of the job";
    JOB_RESTARTS: Counter, Coordinator, "fleet_job_restarts_total" {"job"}, "Starts of the job after its first";
    JOB_LAST_STEP: Gauge, Coordinator, "fleet_job_last_step_timestamp_seconds" {"job"}, "When the cluster recorded the job's last step";
    JOB_STARTED: Gauge, Coordinator, "fleet_job_started_timestamp_seconds" {"job"}, "When the job got the place that it has";
    JOB_LAST_CHECKPOINT: Gauge, Coordinator, "fleet_job_last_checkpoint_timestamp_seconds" {"job"}, "When the job's newest recorded checkpoint was made";

    CHECKPOINTS: Gauge, Coordinator, "fleet_checkpoints", "Recorded checkpoints of unfinished jobs and of the newest thousand that ended";
    CHECKPOINTS_RECORDED: Counter, Coordinator, "fleet_checkpoints_recorded_total", "Checkpoints of which this replica has applied the record";
    CHECKPOINT_FAILURES: Counter, Coordinator, "fleet_checkpoint_failures_total", "Failed saves of checkpoints, as this replica has applied them";
    EXPORTS: Gauge, Coordinator, "fleet_exports", "Recorded exports of models";
    DRIFT_PROFILES: Gauge, Coordinator, "fleet_drift_profiles", "Recorded drift profiles";
}
