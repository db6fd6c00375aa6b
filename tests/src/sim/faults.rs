//! What goes wrong, and when: drawn anew after every fault, each with an end. In the calm at the end of a run nothing does.

use super::host::Doom;
use super::net::{GOOD, Path, Site};
use super::queue::{MS, Micros, SECOND};
use super::world::{Event, World};
use fleet_common::ids::ReplicaId;
use fleet_coordinator::control::{Control, Input, Room};
use fleet_coordinator::raft::disk::Table;
use fleet_coordinator::raft::log::LogStore;
use fleet_coordinator::raft::memory::MemoryDisk;
use std::collections::BTreeSet;
use std::sync::Arc;

/// The end of a fault.
#[derive(Clone, Debug)]
pub enum Mend {
    Heal(Vec<(Site, Site)>),
    Room(u32),
    Space(u32),
    FastDisk(u32),
    Resume(Site),
    StartHost(u32),
    StartAgent(u32),
    /// Not ends, but things that come later: a kill if it is still the same process, another try.
    Restart(u32, u64),
    Remove(ReplicaId),
    /// A disk that was put back has had time to be noticed: the host, and who knew better, each with its life.
    Noticed {
        host: (u32, u64),
        knower: (u32, u64),
        since: Micros,
    },
}

/// For a coordinator that was put back to be found.
const NOTICED: Micros = 15 * SECOND;

impl World {
    pub fn on_fault(&mut self) {
        if self.calm {
            return;
        }
        let wait = self.random.around(self.fault_every);
        self.queue.after(wait, Event::Fault);
        match self.random.range(0..100) {
            0..12 => self.kill_one(),
            12..22 => self.power_off(),
            22..32 => self.burn_fuse(),
            32..42 => self.pause_one(),
            42..45 => self.fill_disk(),
            45..46 => self.run_low(),
            46..50 => self.slow_disk(),
            50..64 => self.cut_off(),
            64..70 => self.bad_path(),
            70..74 => self.jump_clock(),
            74..80 => self.hit_agent(),
            80..86 => self.cut_machine(),
            86..91 => drop(self.break_a_rank().map(|what| self.say(format_args!("{what}")))),
            91..93 => self.blackout(),
            93..95 => self.damage(),
            95..97 => self.put_back(),
            97..98 => self.revoke_one(),
            _ => self.change_members(),
        }
    }

    fn any_serving(&mut self) -> Option<u32> {
        let serving: Vec<u32> =
            self.hosts.values().filter(|host| host.is_serving()).map(|host| host.number).collect();
        // The leader is the most interesting victim.
        let leading: Vec<u32> = serving
            .iter()
            .copied()
            .filter(|host| self.hosts[host].control.as_ref().is_some_and(|control| control.replica().leads()))
            .collect();
        if self.random.chance(1, 2) && !leading.is_empty() {
            return self.random.pick(&leading).copied();
        }
        self.random.pick(&serving).copied()
    }

    fn kill_one(&mut self) {
        let Some(host) = self.any_serving() else { return };
        self.say(format_args!("fault: host-{host} is killed"));
        self.crash_host(host, Doom::Killed);
    }

    fn power_off(&mut self) {
        let Some(host) = self.any_serving() else { return };
        let kept = self.random.index(self.hosts[&host].disk.unsynced_batches() + 1);
        self.say(format_args!("fault: host-{host} loses power and keeps {kept} unsynced batches"));
        self.crash_host(host, Doom::PowerFailure(kept));
    }

    /// The process ends between two writes of one round.
    fn burn_fuse(&mut self) {
        let Some(number) = self.any_serving() else { return };
        let writes = self.random.range(0..4);
        let kept = self.random.index(4);
        let doom = if self.random.chance(1, 3) { Doom::Killed } else { Doom::PowerFailure(kept) };
        let when_cutting = self.random.chance(1, 2);
        let Some(host) = self.hosts.get_mut(&number) else { return };
        host.doom = Some(doom);
        if when_cutting {
            host.disk.set_fuse_at_deletion();
            self.say(format_args!("fault: host-{number} will break off when it cuts its log, {doom:?}"));
        } else {
            host.disk.set_fuse(writes);
            self.say(format_args!("fault: host-{number} will break off after {writes} writes, {doom:?}"));
        }
    }

    /// Now and then a replica dies right after it voted, and is back while that election is still going on.
    pub fn after_a_vote(&mut self, number: u32) {
        if self.calm || !self.random.chance(1, 10) {
            return;
        }
        let life = self.hosts.get(&number).map_or(0, |host| host.life);
        let after = self.random.range(0..20 * MS);
        self.queue.after(after, Event::Mend(Mend::Restart(number, life)));
    }

    fn restart_at_once(&mut self, number: u32, life: u64) {
        if !self.calm && self.hosts.get(&number).is_some_and(|host| host.life == life && host.is_serving()) {
            self.say(format_args!("fault: host-{number} is killed after its vote"));
            self.crash_host(number, Doom::Killed);
            let back = self.random.range(10 * MS..200 * MS);
            self.queue.after(back, Event::Mend(Mend::StartHost(number)));
        }
    }

    fn pause_one(&mut self) {
        let Some(number) = self.any_serving() else { return };
        let site = Site::Host(number);
        // Now and then for longer than a lease: a machine that was suspended or moved.
        let longest = if self.random.chance(1, 8) { 30 * SECOND } else { 6 * SECOND };
        let takes = self.random.range(100 * MS..longest);
        self.say(format_args!("fault: {site} stands still for {} ms", takes / MS));
        let now = self.queue.now();
        if let Some(host) = self.hosts.get_mut(&number) {
            (host.paused, host.paused_at) = (true, now);
        }
        self.net.pause(site, true);
        self.queue.after(takes, Event::Mend(Mend::Resume(site)));
    }

    fn fill_disk(&mut self) {
        let Some(host) = self.any_serving() else { return };
        let takes = self.random.range(SECOND..30 * SECOND);
        self.say(format_args!("fault: the disk of host-{host} is full for {} s", takes / SECOND));
        if let Some(host) = self.hosts.get_mut(&host) {
            host.disk.set_full(true);
            host.stable_since = Micros::MAX;
        }
        self.queue.after(takes, Event::Mend(Mend::Room(host)));
    }

    /// There is little room left on the disk: the driver has nothing more written before it is full.
    fn run_low(&mut self) {
        let Some(number) = self.any_serving() else { return };
        let takes = self.random.range(SECOND..30 * SECOND);
        self.say(format_args!("fault: host-{number} has little room for {} s", takes / SECOND));
        let room = if self.random.chance(1, 2) { Room::Little } else { Room::None };
        self.tell_control(number, Input::Room(room("little room".to_owned())));
        self.queue.after(takes, Event::Mend(Mend::Space(number)));
    }

    fn slow_disk(&mut self) {
        let Some(number) = self.any_serving() else { return };
        let takes = self.random.range(SECOND..30 * SECOND);
        let sync = self.random.range(20 * MS..600 * MS);
        self.say(format_args!("fault: the disk of host-{number} takes {} ms to sync", sync / MS));
        if let Some(host) = self.hosts.get_mut(&number) {
            host.sync = sync;
            host.stable_since = Micros::MAX;
        }
        self.queue.after(takes, Event::Mend(Mend::FastDisk(number)));
    }

    /// One or more coordinators on the other side of a cut, which may be one-way, with some of the others.
    fn cut_off(&mut self) {
        let hosts: Vec<u32> = self.hosts.keys().copied().collect();
        let mut beyond = Vec::new();
        if self.random.chance(1, 2) {
            beyond.extend(self.any_serving().map(Site::Host));
        } else {
            beyond.extend(hosts.iter().filter(|_| self.random.chance(1, 2)).map(|host| Site::Host(*host)));
        }
        let clients: Vec<Site> = self.clients.keys().map(|client| Site::Client(*client)).collect();
        let machines: Vec<Site> = self.machines.keys().map(|machine| Site::Machine(*machine)).collect();
        let share = self.random.range(0..3);
        for site in clients.into_iter().chain(machines) {
            if self.random.chance(share, 3) {
                beyond.push(site);
            }
        }
        let one_way = self.random.range(0..6);
        self.cut(beyond, one_way != 0, one_way != 1, "cut off");
    }

    /// A machine that reaches no coordinator, or some only.
    fn cut_machine(&mut self) {
        let machines: Vec<u32> = self.machines.keys().copied().collect();
        let Some(machine) = self.random.pick(&machines).copied() else { return };
        self.cut(vec![Site::Machine(machine)], true, true, "without a network");
    }

    fn cut(&mut self, beyond: Vec<Site>, outward: bool, inward: bool, how: &str) {
        let takes = 200 * MS + self.random.around(6 * SECOND);
        let names: Vec<String> = beyond.iter().map(Site::to_string).collect();
        let direction = match (outward, inward) {
            (true, true) => "",
            (true, false) => " (outward only)",
            _ => " (inward only)",
        };
        self.say(format_args!("fault: {} {how}{direction} for {} ms", names.join(", "), takes / MS));
        let mut pairs = Vec::new();
        for inner in self.sites() {
            for outer in beyond.iter().copied().filter(|_| !beyond.contains(&inner)) {
                pairs.extend(outward.then_some((outer, inner)));
                pairs.extend(inward.then_some((inner, outer)));
            }
        }
        let now = self.queue.now();
        for &(from, to) in &pairs {
            self.net.set_path(from, to, Path { cut: true, ..GOOD }, now);
        }
        self.queue.after(takes, Event::Mend(Mend::Heal(pairs)));
    }

    fn bad_path(&mut self) {
        let sites = self.sites();
        let Some(one) = self.random.pick(&sites).copied() else { return };
        let takes = self.random.range(SECOND..60 * SECOND);
        let path = match self.random.range(0..3) {
            0 => Path { latency: self.random.range(10 * MS..300 * MS), jitter: 50 * MS, ..GOOD },
            1 => Path { loss: self.random.range(20..300), ..GOOD },
            _ => Path { bytes_per_ms: self.random.range(20..1000), ..GOOD },
        };
        self.say(format_args!("fault: the paths of {one} are bad for {} s: {path:?}", takes / SECOND));
        let now = self.queue.now();
        let mut pairs = Vec::new();
        for other in sites.into_iter().filter(|other| *other != one) {
            pairs.extend([(one, other), (other, one)]);
        }
        for &(from, to) in &pairs {
            self.net.set_path(from, to, path, now);
        }
        self.queue.after(takes, Event::Mend(Mend::Heal(pairs)));
    }

    fn jump_clock(&mut self) {
        let jump = self.random.range(0..12 * 3600 * 1000) as i64 - 6 * 3600 * 1000;
        let sites = self.sites();
        let site = self.random.pick(&sites).copied();
        let clock = match site {
            Some(Site::Host(number)) => self.hosts.get_mut(&number).map(|host| &mut host.clock),
            Some(Site::Machine(number)) => self.machines.get_mut(&number).map(|machine| &mut machine.clock),
            _ => None,
        };
        if let (Some(clock), Some(site)) = (clock, site) {
            clock.wall_offset_ms = jump;
            self.say(format_args!("fault: the wall clock of {site} is wrong by {} min", jump / 60_000));
        }
    }

    fn hit_agent(&mut self) {
        let machines: Vec<u32> = self.machines.keys().copied().collect();
        let Some(machine) = self.random.pick(&machines).copied() else { return };
        let site = Site::Machine(machine);
        let takes = self.random.range(100 * MS..15 * SECOND);
        if self.random.chance(1, 2) {
            self.say(format_args!("fault: the agent of {site} is killed for {} ms", takes / MS));
            self.kill_agent(machine);
            self.queue.after(takes, Event::Mend(Mend::StartAgent(machine)));
        } else {
            self.say(format_args!("fault: the agent of {site} stands still for {} ms", takes / MS));
            self.pause_agent(machine);
            self.queue.after(takes, Event::Mend(Mend::Resume(site)));
        }
    }

    /// All coordinators lose power at once.
    fn blackout(&mut self) {
        self.say(format_args!("fault: all coordinators lose power"));
        let hosts: Vec<u32> = self.hosts.keys().copied().collect();
        for host in hosts {
            let kept = self.random.index(self.hosts[&host].disk.unsynced_batches() + 1);
            self.crash_host(host, Doom::PowerFailure(kept));
        }
    }

    /// A disk forgets or confuses something. Never a second one while a first is not replaced: that could be a majority.
    fn damage(&mut self) {
        if !self.is_complete() {
            return;
        }
        let Some(number) = self.any_serving() else { return };
        self.crash_host(number, Doom::Killed);
        let (row, bit, lost) =
            (self.random.index(1 << 20), self.random.index(1 << 20), 1 + self.random.index(5));
        let Some(host) = self.hosts.get_mut(&number) else { return };
        let what = match self.random.range(0..3) {
            0 => {
                host.disk.lose_rows(Table::Log, lost);
                format!("the last {lost} rows of the log are gone")
            }
            1 => {
                host.disk.rot(Table::Log, row, bit);
                "a row of the log has rotted".to_owned()
            }
            _ => {
                host.disk.rot(Table::Meta, row, bit);
                "a single row has rotted".to_owned()
            }
        };
        host.damaged = true;
        self.say(format_args!("fault: on host-{number} {what}"));
    }

    /// A machine is put back to a copy of its disk, or its disk is emptied. Never a second one while a first is not replaced, and only
    /// where all others have what it had: what two of three have forgotten nobody can know.
    fn put_back(&mut self) {
        if !self.is_complete() {
            return;
        }
        let Some(number) = self.any_serving() else { return };
        let Some(copied) = self.hosts.get_mut(&number).and_then(|host| host.copied.take()) else {
            return self.copy_disks();
        };
        let disk = if self.random.chance(1, 4) { MemoryDisk::default() } else { copied };
        let knower = self.who_knows(number, &disk);
        let commits =
            self.hosts.values().map(|host| host.control.as_ref().map(|it| it.replica().commit_index()));
        let commits: BTreeSet<Option<u64>> = commits.collect();
        let (Some(knower), 1) = (knower, commits.len()) else { return };
        self.crash_host(number, Doom::Killed);
        let Some(host) = self.hosts.get_mut(&number) else { return };
        host.disk = Arc::new(disk);
        host.damaged = true;
        let life = host.life + 1;
        self.say(format_args!(
            "fault: the disk of host-{number} is put back to an older state, as host-{knower} can tell"
        ));
        let knower = (knower, self.hosts.get(&knower).map_or(0, |host| host.life));
        self.queue.after(
            NOTICED,
            Event::Mend(Mend::Noticed { host: (number, life), knower, since: self.queue.now() }),
        );
    }

    fn copy_disks(&mut self) {
        for host in self.hosts.values_mut().filter(|host| host.copied.is_none()) {
            host.copied = Some(host.disk.after_power_failure(usize::MAX));
        }
    }

    /// Another coordinator that has seen more of this one's disk than there would be.
    fn who_knows(&self, number: u32, disk: &MemoryDisk) -> Option<u32> {
        let id = self.hosts.get(&number)?.replica?.0;
        // Its rows alone do not tell where a log ends that was cut.
        let log = LogStore::open(Arc::new(disk.copy())).ok().flatten();
        let last = log.map_or(0, |log| log.last().index);
        let more = |control: &Control<MemoryDisk>| {
            control.replica().marks().into_iter().any(|(of, mark)| of == id && mark.at.index > last)
        };
        let others = self.hosts.values().filter(|host| host.number != number && host.is_serving());
        others.filter(|host| host.control.as_ref().is_some_and(more)).map(|host| host.number).next()
    }

    /// One who knew better has been there all the time.
    fn must_be_noticed(
        &mut self,
        (number, life): (u32, u64),
        (knower, knowers_life): (u32, u64),
        since: Micros,
    ) {
        let there = |number: u32, life: u64| {
            self.hosts
                .get(&number)
                .is_some_and(|host| host.life == life && host.is_serving() && host.stable_since <= since)
        };
        let (one, other) = (Site::Host(number), Site::Host(knower));
        let paths = self.net.good_since(one, other, since) && self.net.good_since(other, one, since);
        if there(knower, knowers_life)
            && paths
            && self.hosts.get(&number).is_some_and(|host| host.life == life && host.is_serving())
        {
            self.violated(format!(
                "host-{number} was put back to an older state and takes part, though host-{knower} could tell"
            ));
        }
    }

    pub fn on_mend(&mut self, mend: Mend) {
        let now = self.queue.now();
        match mend {
            Mend::Heal(pairs) => {
                pairs.into_iter().for_each(|(from, to)| self.net.set_path(from, to, GOOD, now))
            }
            Mend::Room(number) => {
                if let Some(host) = self.hosts.get_mut(&number) {
                    host.disk.set_full(false);
                    host.is_stable_from(now);
                }
            }
            Mend::Space(number) => self.tell_control(number, Input::Room(Room::Enough)),
            Mend::FastDisk(number) => {
                if let Some(host) = self.hosts.get_mut(&number) {
                    host.sync = super::host::SYNC;
                    host.is_stable_from(now);
                }
            }
            Mend::Resume(Site::Host(number)) => self.resume_host(number),
            Mend::Resume(Site::Machine(number)) => self.resume_agent(number),
            Mend::Resume(Site::Client(_)) => {}
            Mend::StartHost(number) => self.start_host(number),
            Mend::StartAgent(number) => self.start_agent(number),
            Mend::Restart(number, life) => self.restart_at_once(number, life),
            Mend::Remove(replica) => self.order_removal(replica),
            Mend::Noticed { host, knower, since } => self.must_be_noticed(host, knower, since),
        }
    }

    /// From now on nothing goes wrong, and what is broken is mended.
    pub fn calm_down(&mut self) {
        self.calm = true;
        self.say(format_args!("all faults end"));
        self.net.heal(self.queue.now());
        let hosts: Vec<u32> = self.hosts.keys().copied().collect();
        for number in hosts {
            self.on_mend(Mend::Room(number));
            self.on_mend(Mend::Space(number));
            self.on_mend(Mend::FastDisk(number));
            self.resume_host(number);
            if let Some(host) = self.hosts.get_mut(&number) {
                host.disk.restart();
            }
            self.start_host(number);
        }
        self.order_undrain();
        let machines: Vec<u32> = self.machines.keys().copied().collect();
        for number in machines {
            self.resume_agent(number);
            self.start_agent(number);
        }
    }

    fn sites(&self) -> Vec<Site> {
        let hosts = self.hosts.keys().map(|host| Site::Host(*host));
        let machines = self.machines.keys().map(|machine| Site::Machine(*machine));
        hosts.chain(machines).chain(self.clients.keys().map(|client| Site::Client(*client))).collect()
    }

    /// After a crash the process is there again: often before anybody has missed it, as operating systems do, or after a while.
    pub fn restart_later(&mut self, number: u32) {
        let wait: Micros = match self.random.chance(1, 2) {
            true => self.random.range(100 * MS..2 * SECOND),
            false => 100 * MS + self.random.around(5 * SECOND),
        };
        self.queue.after(wait, Event::Mend(Mend::StartHost(number)));
    }
}
