//! Tests of the raft thread on the simulated disk: many callers at once, full disks, little space.

use super::*;
use crate::cluster::tests::submit;
use crate::raft::memory::MemoryDisk;
use fleet_common::ids::{ClientId, JobId};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

struct Fixture {
    disk: Arc<MemoryDisk>,
    free: Arc<AtomicU64>,
    handle: Handle,
    _thread: Thread,
}

async fn start() -> Fixture {
    let disk = Arc::new(MemoryDisk::default());
    let free = Arc::new(AtomicU64::new(1 << 40));
    let replica = Replica::create(disk.clone(), 1, &[1], State::new("test".into()), 7).unwrap();
    let probe = free.clone();
    let driver = Driver::new(replica, Box::new(move || Some(probe.load(Ordering::SeqCst))), Box::new(|_| {}));
    let (handle, thread) = driver.spawn().unwrap();
    handle.until_leading().await.unwrap();
    Fixture { disk, free, handle, _thread: thread }
}

impl Fixture {
    async fn submit(&self, seq: u64) -> Result<Answer, Refusal> {
        self.handle.propose(Some(RequestId { client: ClientId(1), seq }), submit(1)).await
    }

    async fn until(&self, wanted: impl FnMut(&Status) -> bool) {
        let mut status = self.handle.status.clone();
        timeout(Duration::from_secs(10), status.wait_for(wanted)).await.unwrap().unwrap();
    }

    async fn jobs(&self) -> usize {
        self.handle.read(|state| state.jobs().len()).await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_share_syncs_and_each_gets_its_own_answer() {
    let fixture = start().await;
    let before = fixture.disk.syncs();
    let handle = &fixture.handle;
    let calls = (0..500u64).map(|client| {
        let handle = handle.clone();
        tokio::spawn(async move {
            let request = RequestId { client: ClientId(client.into()), seq: 1 };
            handle.propose(Some(request), submit(1)).await.unwrap()
        })
    });
    let mut jobs = Vec::new();
    for call in calls.collect::<Vec<_>>() {
        match call.await.unwrap() {
            Answer::Submitted { job } => jobs.push(job),
            other => panic!("{other:?}"),
        }
    }
    jobs.sort();
    assert_eq!(jobs, (1..=500).map(JobId).collect::<Vec<_>>());
    assert!(fixture.disk.syncs() - before < 500);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_writes_answers_reads_and_recovers() {
    let fixture = start().await;
    fixture.submit(1).await.unwrap();
    fixture.disk.set_full(true);
    let refusal = fixture.submit(2).await.unwrap_err();
    assert_eq!(refusal.kind, RefusalKind::Unavailable);
    fixture.until(|status| status.read_only.is_some()).await;
    assert_eq!(fixture.jobs().await, 1);
    assert!(fixture.submit(3).await.unwrap_err().message.contains("full"));
    fixture.disk.set_full(false);
    fixture.until(|status| status.read_only.is_none()).await;
    assert_eq!(fixture.submit(2).await.unwrap(), Answer::Submitted { job: JobId(2) });
    assert_eq!(fixture.submit(3).await.unwrap(), Answer::Submitted { job: JobId(3) });
    assert_eq!(fixture.jobs().await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn writing_stops_before_the_disk_is_full() {
    let fixture = start().await;
    fixture.free.store(RESERVE_BYTES - 1, Ordering::SeqCst);
    fixture.until(|status| status.read_only.is_some()).await;
    let refusal = fixture.submit(1).await.unwrap_err();
    assert!(
        refusal.kind == RefusalKind::Unavailable && refusal.message.contains("15 MiB"),
        "{}",
        refusal.message
    );
    fixture.free.store(RESERVE_BYTES, Ordering::SeqCst);
    assert!(fixture.submit(1).await.is_err());
    fixture.free.store(RESUME_BYTES, Ordering::SeqCst);
    fixture.until(|status| status.read_only.is_none()).await;
    fixture.submit(1).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_sees_what_was_acknowledged_before_it() {
    let fixture = start().await;
    for seq in 1..=50 {
        fixture.submit(seq).await.unwrap();
        assert_eq!(fixture.jobs().await as u64, seq);
    }
}
