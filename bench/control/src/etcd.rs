//! The peer: three members of etcd with fsync and mutual TLS.

use crate::load::{Cluster, Put};
use crate::proc::{Server, free_ports};
use anyhow::{Context, Result, anyhow};
use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

pub struct Etcd {
    dir: PathBuf,
    ports: Vec<(u16, u16)>,
    members: Vec<Option<Server>>,
    tls: Tls,
}

struct Tls {
    ca: String,
    certificate: String,
    key: String,
}

impl Etcd {
    pub async fn start(dir: &Path) -> Result<Etcd> {
        std::fs::create_dir_all(dir)?;
        let tls = Tls::make()?;
        for (name, text) in [("ca.pem", &tls.ca), ("cert.pem", &tls.certificate), ("key.pem", &tls.key)] {
            std::fs::write(dir.join(name), text)?;
        }
        let ports = free_ports(6)?;
        let ports = (0..3).map(|n| (ports[2 * n], ports[2 * n + 1])).collect();
        let mut etcd = Etcd { dir: dir.to_owned(), ports, members: vec![None, None, None], tls };
        (0..3).try_for_each(|n| etcd.launch(n))?;
        etcd.wait_for_leader().await?;
        Ok(etcd)
    }

    fn launch(&mut self, n: usize) -> Result<()> {
        let url = |port: u16| format!("https://127.0.0.1:{port}");
        let member = |(n, (_, peer)): (usize, &(u16, u16))| format!("m{n}={}", url(*peer));
        let all: Vec<String> = self.ports.iter().enumerate().map(member).collect();
        let (client, peer) = self.ports[n];
        let file = |name: &str| self.dir.join(name).display().to_string();
        let (ca, cert, key) = (file("ca.pem"), file("cert.pem"), file("key.pem"));
        let mut command = Command::new("etcd");
        let data = self.dir.join(format!("m{n}"));
        command.args(["--name", &format!("m{n}"), "--data-dir", &data.display().to_string()]);
        for (flag, value) in [
            ("--listen-client-urls", url(client)),
            ("--advertise-client-urls", url(client)),
            ("--listen-peer-urls", url(peer)),
            ("--initial-advertise-peer-urls", url(peer)),
            ("--initial-cluster", all.join(",")),
            ("--initial-cluster-state", "new".to_owned()),
            ("--trusted-ca-file", ca.clone()),
            ("--cert-file", cert.clone()),
            ("--key-file", key.clone()),
            ("--peer-trusted-ca-file", ca.clone()),
            ("--peer-cert-file", cert.clone()),
            ("--peer-key-file", key.clone()),
            ("--logger", "zap".to_owned()),
            ("--log-level", "error".to_owned()),
        ] {
            command.arg(flag).arg(value);
        }
        command.args(["--client-cert-auth", "--peer-client-cert-auth"]);
        self.members[n] = Some(Server::start(&mut command, &self.dir.join(format!("m{n}.log")))?);
        Ok(())
    }

    async fn client(&self, members: &[usize]) -> Result<Client> {
        let tls = TlsOptions::new()
            .ca_certificate(Certificate::from_pem(&self.tls.ca))
            .identity(Identity::from_pem(&self.tls.certificate, &self.tls.key))
            .domain_name("localhost");
        let options = ConnectOptions::new().with_tls(tls).with_connect_timeout(Duration::from_secs(2));
        let urls: Vec<String> =
            members.iter().map(|n| format!("https://127.0.0.1:{}", self.ports[*n].0)).collect();
        Ok(Client::connect(urls, Some(options)).await?)
    }

    async fn wait_for_leader(&self) -> Result<usize> {
        for _ in 0..200 {
            if let Ok(leader) = self.leader().await {
                return Ok(leader);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Err(anyhow!("etcd found no leader within 10 s; see {}", self.dir.display()))
    }
}

impl Cluster for Etcd {
    type Client = EtcdClient;
    const NAME: &'static str = "etcd";

    async fn leader(&self) -> Result<usize> {
        for n in (0..3).filter(|n| self.members[*n].is_some()) {
            let look = async { Ok::<_, anyhow::Error>(self.client(&[n]).await?.status().await?) };
            let Ok(Ok(status)) = tokio::time::timeout(Duration::from_millis(300), look).await else {
                continue;
            };
            let own = status.header().map(|header| header.member_id());
            if own == Some(status.leader()) {
                return Ok(n);
            }
        }
        Err(anyhow!("no member leads"))
    }

    async fn term(&self) -> Result<u64> {
        let leader = self.leader().await?;
        Ok(self.client(&[leader]).await?.status().await?.raft_term())
    }

    async fn clients(&self, at: usize, count: usize, connections: usize) -> Result<Vec<EtcdClient>> {
        let mut channels = Vec::new();
        for _ in 0..connections.min(count) {
            channels.push(self.client(&[at]).await?);
        }
        Ok((0..count)
            .map(|n| EtcdClient {
                client: channels[n % channels.len()].clone(),
                key: format!("bench/{n}"),
                n: 0,
            })
            .collect())
    }

    fn kill(&mut self, n: usize) -> Result<()> {
        self.members[n].take().context("it is dead already")?.kill()
    }

    async fn restart(&mut self, n: usize) -> Result<()> {
        self.launch(n)?;
        for _ in 0..200 {
            if let Ok(mut clients) = self.clients(n, 1, 1).await
                && clients[0].put().await.is_ok()
            {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Err(anyhow!("the member did not come back"))
    }

    fn cpu_s(&self) -> Result<f64> {
        self.members.iter().flatten().map(|server| Ok(server.usage()?.0)).sum()
    }
}

#[derive(Clone)]
pub struct EtcdClient {
    client: Client,
    key: String,
    n: u64,
}

impl Put for EtcdClient {
    async fn put(&mut self) -> Result<()> {
        self.n += 1;
        let mut value = [0x5A; 256];
        value[..8].copy_from_slice(&self.n.to_le_bytes());
        self.client.put(self.key.clone(), value, None).await?;
        Ok(())
    }
}

impl Tls {
    fn make() -> Result<Tls> {
        let ca_key = KeyPair::generate()?;
        let mut ca = CertificateParams::new(Vec::<String>::new())?;
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let ca_pem = ca.self_signed(&ca_key)?.pem();
        let issuer = Issuer::new(ca, ca_key);
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()])?;
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &issuer)?.pem();
        Ok(Tls { ca: ca_pem, certificate, key: key.serialize_pem() })
    }
}
