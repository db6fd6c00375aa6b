//! Coordinators that come, go, and are replaced, as an operator would do it.

use super::client::{Client, OPERATOR, Want};
use super::faults::Mend;
use super::host::{Doom, Host};
use super::queue::SECOND;
use super::setup::redeem;
use super::world::World;
use fleet_common::ids::{NodeId, ReplicaId};
use fleet_common::protocol::{Member, Role};
use fleet_coordinator::cluster::admitted::Membership;
use fleet_coordinator::cluster::members::Standing;

/// Coordinators that are wanted, at least and at most.
const COORDINATORS: std::ops::RangeInclusive<usize> = 3..=5;

impl World {
    /// The operator wants one coordinator more or less.
    pub fn change_members(&mut self) {
        let members: Vec<u32> =
            self.hosts.values().filter(|host| host.counts()).map(|host| host.number).collect();
        if !self.is_complete() {
            return; // one thing after the other
        }
        let room = members.len() < *COORDINATORS.end();
        if members.len() > *COORDINATORS.start() && (!room || self.random.chance(1, 2)) {
            let Some(host) = self.random.pick(&members) else { return };
            let Some(replica) = self.hosts[host].replica else { return };
            self.say(format_args!("the operator takes {replica} on host-{host} out"));
            self.order_removal(replica);
        } else if room {
            // On a machine that is free, or a new one.
            let free = self.hosts.values().find(|host| host.retired.is_some()).map(|host| host.number);
            let number = free.unwrap_or_else(|| self.hosts.keys().last().map_or(1, |last| last + 1));
            self.say(format_args!("the operator wants a coordinator on host-{number}"));
            self.join_host(number);
        }
    }

    /// Nobody is damaged, being replaced, or on the way in or out, and one may be spared.
    pub fn is_complete(&self) -> bool {
        let replicas = self.oracle.state().replicas();
        let whole = replicas.iter().all(|(replica, record)| {
            let host = self.addresses.get(replica).and_then(|host| self.hosts.get(host));
            host.is_some_and(|host| host.counts() && !host.damaged) && record.standing == Standing::Voter
        });
        let counting = self.hosts.values().filter(|host| host.counts()).count();
        let idle = self.clients.get(&OPERATOR).is_some_and(Client::is_idle);
        whole && idle && counting == replicas.len() && replicas.len() >= *COORDINATORS.start()
    }

    /// A coordinator with an empty disk and a new id.
    fn join_host(&mut self, number: u32) {
        let clock = self.clock();
        let life = self.hosts.get(&number).map_or(0, |host| host.life);
        let mut host = Host::new(number, clock);
        host.life = life;
        self.hosts.insert(number, host);
        self.order_join(Want::JoinHost(number), redeem(Role::Coordinator, format!("host-{number}")));
    }

    /// A new coordinator has its certificate.
    pub fn host_joined(&mut self, number: u32, member: Member) {
        let Member::Coordinator(replica) = member else {
            self.violated(format!("host-{number} joined and is {member}"));
            return;
        };
        if let Some(host) = self.hosts.get_mut(&number).filter(|host| host.replica.is_none()) {
            host.replica = Some(replica);
            self.addresses.insert(replica, number);
            self.start_host(number);
        }
    }

    /// This host's replica takes part no more.
    pub fn retire(&mut self, number: u32, why: &str) {
        self.crash_host(number, Doom::Killed);
        let Some(host) = self.hosts.get_mut(&number) else { return };
        host.retired = Some(why.to_owned());
        let (replica, damaged) = (host.replica, host.damaged);
        self.say(format_args!("host-{number} is out: {why}"));
        let Some(replica) = replica else { return };
        self.addresses.remove(&replica);
        if !damaged {
            let known = self.oracle.state().membership(Member::Coordinator(replica));
            if known != Membership::Revoked {
                self.violated(format!(
                    "host-{number} says that {replica} was removed, and it was not: {why}"
                ));
            }
        } else if self.random.chance(1, 2) {
            self.order_removal(replica);
            self.join_host(number);
        } else {
            self.join_host(number);
            self.order_removal(replica);
        }
    }

    /// The operator cuts a machine off, for example because its key was seen elsewhere.
    pub fn revoke_one(&mut self) {
        let idle = self.clients.get(&OPERATOR).is_some_and(Client::is_idle);
        let joined = self.machines.values().filter(|machine| !machine.expelled);
        let joined: Vec<(u32, NodeId)> =
            joined.filter_map(|machine| Some((machine.number, machine.node?))).collect();
        let Some((number, node)) = self.random.pick(&joined).copied().filter(|_| idle) else { return };
        self.say(format_args!("the operator cuts {node} on machine-{number} off"));
        self.order_revocation(number, node);
    }

    /// It is acknowledged that the node of this machine was cut off. What its agent does then is for the agent.
    pub fn machine_revoked(&mut self, number: u32) {
        if let Some(machine) = self.machines.get_mut(&number) {
            machine.expelled = true;
        }
    }

    /// A machine that was cut off gets a new identity.
    pub fn join_again(&mut self, number: u32) {
        if let Some(machine) = self.machines.get_mut(&number) {
            machine.expelled = false;
            machine.node = None;
        }
        self.order_join(Want::JoinMachine(number), redeem(Role::Worker, format!("machine-{number}")));
    }

    pub fn removal_answered(&mut self, replica: ReplicaId, rejected: Option<String>) {
        let Some(why) = rejected else { return self.say(format_args!("{replica} was taken out")) };
        self.say(format_args!("{replica} is not taken out: {why}"));
        let wanted = self.hosts.values().all(|host| host.replica != Some(replica));
        if wanted {
            // It is damaged and must go; a healthy one may stay.
            self.queue.after(5 * SECOND, super::world::Event::Mend(Mend::Remove(replica)));
        }
    }
}
