//! The environment in which a user's PROGRAM runs, as torchrun would set it.

use crate::gang::GangId;
use fleet_common::ids::Rank;
use std::net::TcpListener;

/// Where the ranks of a program meet. Rank 0 listens there itself.
pub const MASTER_ADDR: &str = "127.0.0.1";

/// A port that was free a moment ago. The program's rank 0 takes it.
pub fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind((MASTER_ADDR, 0))?.local_addr()?.port())
}

/// `given` with the variables of one rank set over it.
pub fn environment(
    given: &[(String, String)],
    gang: GangId,
    rank: Rank,
    world_size: u32,
    master_port: u16,
) -> Vec<(String, String)> {
    let world = world_size.to_string();
    let set = [
        ("RANK", rank.to_string()),
        ("LOCAL_RANK", rank.to_string()),
        ("WORLD_SIZE", world.clone()),
        ("LOCAL_WORLD_SIZE", world.clone()),
        ("GROUP_RANK", "0".to_owned()),
        ("GROUP_WORLD_SIZE", "1".to_owned()),
        ("ROLE_RANK", rank.to_string()),
        ("ROLE_WORLD_SIZE", world),
        ("ROLE_NAME", "default".to_owned()),
        ("MASTER_ADDR", MASTER_ADDR.to_owned()),
        ("MASTER_PORT", master_port.to_string()),
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

    #[test]
    fn a_rank_finds_itself_and_its_peers_and_keeps_what_the_user_set() {
        let given = [("RANK", "9"), ("OMP_NUM_THREADS", "3"), ("HOME", "/root")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()));
        let env = environment(&given, GangId { job: JobId(7), generation: 2 }, 1, 4, 5555);
        let get = |name: &str| {
            env.iter().filter(|(key, _)| key == name).map(|(_, value)| value.as_str()).collect::<Vec<_>>()
        };
        assert_eq!(get("RANK"), ["1"]);
        assert_eq!(get("WORLD_SIZE"), ["4"]);
        assert_eq!(get("MASTER_PORT"), ["5555"]);
        assert_eq!(get("TORCHELASTIC_RUN_ID"), ["job-7"]);
        assert_eq!(get("TORCHELASTIC_RESTART_COUNT"), ["1"]);
        assert_eq!(get("OMP_NUM_THREADS"), ["3"]);
        assert_eq!(get("HOME"), ["/root"]);
        assert!(
            environment(&[], GangId { job: JobId(7), generation: 1 }, 0, 1, 1)
                .contains(&("OMP_NUM_THREADS".into(), "1".into()))
        );
    }
}
