//! How much one peer may take: time, streams, bytes.
//!
//! | who connects | to which socket | keeps it alive | is missed after |
//! |---|---|---|---|
//! | `fleet`, a joiner | clients' | itself, by pings | 2 s |
//! | an agent | members' | its heartbeats, each second | 3 s |
//! | a coordinator | members' | raft's heartbeats, ten a second | 2 s |
//! | an agent that fetches a checkpoint | another agent's | itself, by pings | 3 s |

use super::Link;
use quinn::congestion::CubicConfig;
use quinn::{Connection, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};
use std::sync::Arc;
use std::time::Duration;

/// A dead UDP port gives no error: this long and no answer counts as unreachable.
pub(super) const CONNECT_DEADLINE: Duration = Duration::from_secs(1);
/// The next coordinator is tried when one has not answered for so long (RFC 8305, section 8). Less makes a crowd that comes back at once
/// shake hands with everybody.
pub(super) const STAGGER: Duration = Duration::from_millis(250);
/// For one peer's handshake as the listener sees it.
pub(super) const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);

/// Handshakes that may wait to be accepted: more are refused at once and come back a moment later.
pub(super) const INCOMING_MAX: usize = 1024;
/// Bytes kept for one and for all waiting handshakes.
pub(super) const INCOMING_BYTES: u64 = 16 << 10;
pub(super) const INCOMING_BYTES_TOTAL: u64 = 4 << 20;
/// Room in the kernel for what arrives while this process does not run: a thousand handshakes. The system may give less.
pub(super) const SOCKET_BUFFER: usize = 4 << 20;

/// Between packets that tell a stranger that its connection is over: ten thousand agents learn it within a second.
pub(super) const RESET_INTERVAL: Duration = Duration::from_micros(100);

/// A dead peer is noticed after this long.
const IDLE: Duration = Duration::from_secs(2);
/// Agents send once a second and nobody pings them: two heartbeats may be late.
const IDLE_AGENT: Duration = Duration::from_secs(3);
/// Four chances within the idle timeout.
const KEEP_ALIVE: Duration = Duration::from_millis(500);
/// Of an agent that waits for its welcome; later its heartbeats come before this runs out.
const KEEP_ALIVE_AGENT: Duration = Duration::from_millis(1200);
/// Until the first answer tells how far away the other side is: a lost first packet is sent again after three times this.
const FIRST_RTT: Duration = Duration::from_millis(50);

/// Requests that one client may have under way.
const CLIENT_STREAMS: u32 = 256;
/// One for raft, one for what is large, and their successors.
const PEER_STREAMS: u32 = 4;
/// Files that one agent reads of another at a time.
const FETCH_STREAMS: u32 = 4;
/// What coordinators may send each other before the first acknowledgement: a batch of entries.
const PEER_WINDOW: u64 = 1 << 20;

/// Unread bytes of one stream, of one connection, and unacknowledged ones.
struct Windows {
    stream: u32,
    connection: u32,
    send: u64,
}

const CLIENT: Windows = Windows { stream: 256 << 10, connection: 1 << 20, send: 2 << 20 };
const AGENT: Windows = Windows { stream: 256 << 10, connection: 512 << 10, send: 1 << 20 };
/// A hundred megabytes a second over a tenth of a second.
const FETCH: Windows = Windows { stream: 8 << 20, connection: 8 << 20, send: 8 << 20 };
const PEER: Windows = Windows { stream: 8 << 20, connection: 16 << 20, send: 16 << 20 };

/// Settings of the side that connects.
pub(super) fn connecting(link: Link) -> Arc<TransportConfig> {
    let mut config = match link {
        // The welcome is a stream of the other side's.
        Link::Client => windows(&CLIENT, IDLE, 0, 1),
        Link::Agent => windows(&AGENT, IDLE_AGENT, 0, 1),
        Link::Coordinator => peers(0, 1),
    };
    config.keep_alive_interval(Some(match link {
        Link::Agent => KEEP_ALIVE_AGENT,
        Link::Client | Link::Coordinator => KEEP_ALIVE,
    }));
    Arc::new(config)
}

/// Settings of a joiner's connection.
pub(super) fn joining() -> Arc<TransportConfig> {
    let mut config = windows(&CLIENT, IDLE, 0, 0);
    config.keep_alive_interval(Some(KEEP_ALIVE));
    Arc::new(config)
}

/// Settings of the listener for clients and joiners. It pings nobody: who wants something keeps the connection alive.
pub(super) fn clients() -> Arc<TransportConfig> {
    Arc::new(windows(&CLIENT, IDLE, CLIENT_STREAMS, 0))
}

/// Settings of the listener for agents and coordinators, who share it. What a connection may hold is an agent's share; see `widen`.
pub(super) fn members() -> Arc<TransportConfig> {
    let mut config = windows(&AGENT, IDLE_AGENT, 1, PEER_STREAMS);
    config.stream_receive_window(PEER.stream.into());
    Arc::new(config)
}

/// Gives an accepted connection the share of a coordinator.
pub fn widen(connection: &Connection) {
    connection.set_receive_window(PEER.connection.into());
}

/// Settings of an agent that fetches checkpoints.
pub(super) fn fetching() -> Arc<TransportConfig> {
    let mut config = fetches(0);
    config.keep_alive_interval(Some(KEEP_ALIVE));
    Arc::new(config)
}

/// Settings of an agent that lends them.
pub(super) fn lending() -> Arc<TransportConfig> {
    Arc::new(fetches(FETCH_STREAMS))
}

fn fetches(bidi: u32) -> TransportConfig {
    let mut config = windows(&FETCH, IDLE_AGENT, bidi, 0);
    config.mtu_discovery_config(Some(MtuDiscoveryConfig::default()));
    config
}

fn peers(bidi: u32, uni: u32) -> TransportConfig {
    let mut config = windows(&PEER, IDLE, bidi, uni);
    let mut congestion = CubicConfig::default();
    congestion.initial_window(PEER_WINDOW);
    config
        .congestion_controller_factory(Arc::new(congestion))
        .mtu_discovery_config(Some(MtuDiscoveryConfig::default()));
    config
}

/// Small messages on many connections: looking for the largest packet that a path takes would cost more than it saves.
fn windows(windows: &Windows, idle: Duration, bidi: u32, uni: u32) -> TransportConfig {
    let mut config = TransportConfig::default();
    let idle = VarInt::from_u32(idle.as_millis() as u32);
    config
        .max_idle_timeout(Some(IdleTimeout::from(idle)))
        .initial_rtt(FIRST_RTT)
        .max_concurrent_bidi_streams(bidi.into())
        .max_concurrent_uni_streams(uni.into())
        .stream_receive_window(windows.stream.into())
        .receive_window(windows.connection.into())
        .send_window(windows.send)
        .mtu_discovery_config(None)
        .datagram_receive_buffer_size(None);
    config
}
