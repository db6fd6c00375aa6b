//! The environment in which a user's PROGRAM runs, as torchrun would set it.

use fleet_common::ids::Rank;
use fleet_common::protocol::{Gang, Meeting};
use std::net::TcpListener;

/// Where the ranks of a program on one node meet. Rank 0 listens there itself.
const LOOPBACK: &str = "127.0.0.1";

/// A place on this node with a port that was free a moment ago. The program's rank 0 takes it.
pub fn local_meeting() -> std::io::Result<Meeting> {
    let port = TcpListener::bind((LOOPBACK, 0))?.local_addr()?.port();
    Ok(Meeting { host: LOOPBACK.to_owned(), port })
}

/// `given` with the variables of one rank set over it.
pub fn environment(
    given: &[(String, String)],
    gang: &Gang,
    local_rank: Rank,
    meeting: &Meeting,
) -> Vec<(String, String)> {
    let (rank, world) = ((gang.first_rank + local_rank).to_string(), gang.world_size.to_string());
    let set = [
        ("RANK", rank.clone()),
        ("LOCAL_RANK", local_rank.to_string()),
        ("WORLD_SIZE", world.clone()),
        ("LOCAL_WORLD_SIZE", gang.ranks.to_string()),
        ("GROUP_RANK", gang.node_index.to_string()),
        ("GROUP_WORLD_SIZE", gang.nodes.to_string()),
        ("ROLE_RANK", rank),
        ("ROLE_WORLD_SIZE", world),
        ("ROLE_NAME", "default".to_owned()),
        ("MASTER_ADDR", meeting.host.clone()),
        ("MASTER_PORT", meeting.port.to_string()),
        ("TORCHELASTIC_RUN_ID", gang.job.to_string()),
        ("TORCHELASTIC_RESTART_COUNT", gang.generation.saturating_sub(1).to_string()),
        ("TORCHELASTIC_MAX_RESTARTS", "0".to_owned()),
        // The store is rank 0's, not the agent's.
        ("TORCHELASTIC_USE_AGENT_STORE", "False".to_owned()),
    ];
    let is_set = |name: &str| set.iter().any(|(key, _)| *key == name);
    let mut env: Vec<(String, String)> = given.iter().filter(|(name, _)| !is_set(name)).cloned().collect();
    if !env.iter().any(|(name, _)| name == "OMP_NUM_THREADS") {
        env.push(("OMP_NUM_THREADS".to_owned(), "1".to_owned()));
    }
    env.extend(set.map(|(name, value)| (name.to_owned(), value)));
    env
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_common::ids::JobId;
    use fleet_common::protocol::{Program, Work};

    /// The second of two nodes with two ranks each.
    fn gang() -> Gang {
        let program = Program { argv: vec!["true".into()], working_dir: "/".into(), env: Vec::new() };
        Gang {
            job: JobId(7),
            generation: 2,
            world_size: 4,
            first_rank: 2,
            ranks: 2,
            nodes: 2,
            node_index: 1,
            meeting: None,
            max_time_ms: None,
            resume: None,
            work: Work::Program(program),
        }
    }

    #[test]
    fn a_rank_finds_itself_and_its_peers_and_keeps_what_the_user_set() {
        let given = [("RANK", "9"), ("OMP_NUM_THREADS", "3"), ("HOME", "/root")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()));
        let meeting = Meeting { host: "n1".into(), port: 5555 };
        let env = environment(&given, &gang(), 1, &meeting);
        let get = |name: &str| {
            env.iter().filter(|(key, _)| key == name).map(|(_, value)| value.as_str()).collect::<Vec<_>>()
        };
        assert_eq!((get("RANK"), get("LOCAL_RANK")), (vec!["3"], vec!["1"]));
        assert_eq!((get("WORLD_SIZE"), get("LOCAL_WORLD_SIZE")), (vec!["4"], vec!["2"]));
        assert_eq!((get("GROUP_RANK"), get("GROUP_WORLD_SIZE")), (vec!["1"], vec!["2"]));
        assert_eq!((get("MASTER_ADDR"), get("MASTER_PORT")), (vec!["n1"], vec!["5555"]));
        assert_eq!(get("TORCHELASTIC_RUN_ID"), ["job-7"]);
        assert_eq!(get("TORCHELASTIC_RESTART_COUNT"), ["1"]);
        assert_eq!(get("OMP_NUM_THREADS"), ["3"]);
        assert_eq!(get("HOME"), ["/root"]);
        assert!(environment(&[], &gang(), 0, &meeting).contains(&("OMP_NUM_THREADS".into(), "1".into())));
    }
}
