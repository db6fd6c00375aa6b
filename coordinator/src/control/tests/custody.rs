//! The key of a CA that is to follow reaches every coordinator, whoever dies on the way.

use super::net::*;
use crate::cluster::commands::{Change, FinishCa, IntroduceCa};
use crate::control::Input;
use fleet_common::ids::{ReplicaId, UserId};
use fleet_common::protocol::{Member, RefusalKind, Reply, Request, Role};

const NEW: &[u8] = &[2];

/// Three of them, with a CA.
fn net() -> Net {
    Net::with_ca(3, vec![1])
}

fn introduce(net: &mut Net, holder: u64) {
    let at = net.leading();
    net.handle(holder, Input::HoldsCa(NEW.to_vec()));
    let change = Change::IntroduceCa(IntroduceCa { der: NEW.to_vec(), holder: ReplicaId(holder) });
    net.propose(at, change).unwrap();
}

fn moves(net: &Net) -> bool {
    let next = net.state(net.leading()).cas().next.as_ref();
    next.is_some_and(|next| next.moving && next.der == NEW)
}

#[test]
fn all_coordinators_get_the_key_by_themselves() {
    let mut net = net();
    let holder = net.follower();
    introduce(&mut net, holder);
    net.run_until("all have it", moves);
    let at = net.leading();
    net.propose(at, Change::FinishCa(FinishCa { force: true })).unwrap();
    net.run_until("all know that it ended", |net| {
        net.controls.keys().all(|id| net.state(*id).cas().der == NEW && net.state(*id).cas().next.is_none())
    });
}

#[test]
fn one_that_is_away_gets_the_key_later_also_from_another_than_who_made_it() {
    let mut net = net();
    let maker = net.leading();
    let away = net.follower();
    net.cut.insert(away);
    introduce(&mut net, maker);
    net.run(5_000);
    assert!(!moves(&net));
    net.cut.insert(maker);
    net.cut.remove(&away);
    net.run_until("the others lead", |net| net.leader().is_some_and(|leader| leader != maker));
    net.run_until("it has got it", moves_but(maker));
    net.cut.remove(&maker);
    net.run_until("all have it", moves);
}

/// Everybody but this one holds the key.
fn moves_but(maker: u64) -> impl Fn(&Net) -> bool {
    move |net| {
        let Some(leader) = net.leader().filter(|leader| *leader != maker) else { return false };
        moves(net) || net.state(leader).without_next_key().is_empty()
    }
}

#[test]
fn only_an_admin_s_change_is_proposed_and_a_look_sees_who_has_just_joined() {
    let mut net = net();
    let Member::Client(ordinary) = net.admit(net.leading(), Role::Client) else { panic!() };
    let Member::Client(admin) = net.admit(net.leading(), Role::Admin) else { panic!() };
    let at = net.follower();
    let call = net.number();
    net.handle(at, Input::Look(call));
    net.run_until("a look", |net| net.looked.contains_key(&call));
    assert!(net.looked[&call].is_ok() && net.controls[&at].is_admin(Member::Client(admin)));
    let before = net.state(at).clone();
    let mut ask = |user: UserId, number: u64| {
        let revoke = Request::Revoke(Member::Client(UserId(77)));
        net.ask_as(at, Member::Client(user), frame(number.into(), 1, revoke))
    };
    let Reply::Refused(refusal) = ask(ordinary, 500) else { panic!() };
    assert_eq!(refusal.kind, RefusalKind::Forbidden, "{}", refusal.message);
    assert_eq!(ask(admin, 501), Reply::Done);
    assert_ne!(*net.state(at), before);
}
