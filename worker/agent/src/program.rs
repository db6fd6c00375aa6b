//! The environment in which a user's PROGRAM runs, as torchrun would set it.

use fleet_common::ids::Rank;
use fleet_common::protocol::{Gang, Meeting, Variable};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::TcpListener;

/// Where the ranks of a program on one node meet. Rank 0 listens there itself.
const LOOPBACK: &str = "127.0.0.1";

/// A place on this node with a port that was free a moment ago. The program's rank 0 takes it.
pub fn local_meeting() -> std::io::Result<Meeting> {
    let port = TcpListener::bind((LOOPBACK, 0))?.local_addr()?.port();
    Ok(Meeting { host: LOOPBACK.to_owned(), port })
}

/// What a program finds in its environment before what its job sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// What is about this node and the user whom its worker runs as; nothing else of the worker's environment, which may hold secrets.
    Node,
    /// All that the worker has: it was started by the user whose programs it runs.
    Worker,
}

/// What is taken over from the worker's environment on a node. The devices may have been divided among several workers.
const OF_NODE: &[&str] = &[
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "TMPDIR",
    "LANG",
    "TZ",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
];
/// What a program finds where nobody has set it. Python holds back what it prints while its stdout is a pipe, as it is here.
const UNLESS_SET: [(&str, &str); 2] = [("OMP_NUM_THREADS", "1"), ("PYTHONUNBUFFERED", "1")];
/// Where nothing else says it.
const PATH: &str = "/usr/local/bin:/usr/bin:/bin";

impl Base {
    pub fn variables(self) -> BTreeMap<OsString, OsString> {
        let here = std::env::vars_os();
        match self {
            Base::Worker => here.collect(),
            Base::Node => {
                let user = nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten();
                let mut variables = BTreeMap::from([("PATH".into(), PATH.into())]);
                if let Some(user) = user {
                    variables.insert("HOME".into(), user.dir.into());
                    variables.insert("SHELL".into(), user.shell.into());
                    variables.insert("USER".into(), user.name.clone().into());
                    variables.insert("LOGNAME".into(), user.name.into());
                }
                variables.extend(here.filter(|(name, _)| OF_NODE.iter().any(|known| name == known)));
                variables
            }
        }
    }
}

/// `base` with what the job was given and, over that, the variables of one rank.
pub fn environment(
    mut base: BTreeMap<OsString, OsString>,
    given: &[Variable],
    gang: &Gang,
    local_rank: Rank,
    meeting: &Meeting,
) -> Vec<(OsString, OsString)> {
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
    let given =
        given.iter().filter_map(|variable| Some((variable.name.as_str().into(), variable.text()?.into())));
    base.extend(given);
    for (name, value) in UNLESS_SET {
        base.entry(name.into()).or_insert_with(|| value.into());
    }
    base.extend(set.map(|(name, value)| (name.into(), value.into())));
    base.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_common::ids::JobId;
    use fleet_common::protocol::{Program, Value, Work};

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
        let given = [
            Variable::open("RANK", "9"),
            Variable::open("OMP_NUM_THREADS", "3"),
            Variable::secret("HOME", "/mine"),
            Variable { name: "GONE".into(), value: Value::Removed },
        ];
        let base: BTreeMap<OsString, OsString> =
            [("HOME", "/home"), ("SHELL", "/bin/sh"), ("PYTHONUNBUFFERED", "")]
                .map(|(k, v)| (k.into(), v.into()))
                .into();
        let meeting = Meeting { host: "n1".into(), port: 5555 };
        let env = environment(base, &given, &gang(), 1, &meeting);
        let get = |name: &str| {
            env.iter()
                .filter(|(key, _)| key == name)
                .map(|(_, value)| value.to_str().unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!((get("RANK"), get("LOCAL_RANK")), (vec!["3"], vec!["1"]));
        assert_eq!((get("WORLD_SIZE"), get("LOCAL_WORLD_SIZE")), (vec!["4"], vec!["2"]));
        assert_eq!((get("GROUP_RANK"), get("GROUP_WORLD_SIZE")), (vec!["1"], vec!["2"]));
        assert_eq!((get("MASTER_ADDR"), get("MASTER_PORT")), (vec!["n1"], vec!["5555"]));
        assert_eq!(get("TORCHELASTIC_RUN_ID"), ["job-7"]);
        assert_eq!(get("TORCHELASTIC_RESTART_COUNT"), ["1"]);
        assert_eq!(get("OMP_NUM_THREADS"), ["3"]);
        assert_eq!((get("HOME"), get("SHELL")), (vec!["/mine"], vec!["/bin/sh"]));
        assert_eq!(get("GONE"), Vec::<&str>::new());
        assert_eq!(get("PYTHONUNBUFFERED"), [""], "empty is how Python is told to hold back");
        let bare = environment(BTreeMap::new(), &[], &gang(), 0, &meeting);
        for name in ["OMP_NUM_THREADS", "PYTHONUNBUFFERED"] {
            assert!(bare.contains(&(name.into(), "1".into())), "{name}");
        }
    }

    #[test]
    fn on_a_node_a_program_sees_who_it_is_there_and_nothing_else_of_the_worker() {
        let node = Base::Node.variables();
        assert!(node.contains_key(&OsString::from("PATH")));
        assert!(node.keys().all(|name| OF_NODE.iter().any(|known| name == known)), "{node:?}");
        assert_eq!(Base::Worker.variables().len(), std::env::vars_os().count());
    }
}
