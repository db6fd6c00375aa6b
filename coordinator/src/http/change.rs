//! What may be changed over HTTP, by who has the right to.

use super::{Question, Unserved, id, unserved};
use fleet_common::protocol::Request;

const PATHS: &str = "what can be changed here is /api/v1/jobs/ID/cancel, /api/v1/nodes/ID/drain and /api/v1/nodes/ID/undrain, the first two at once with ?now";

/// Understands a POST.
pub fn change(question: &Question) -> Result<Request, Unserved> {
    let words: Vec<&str> = question.path.strip_prefix("/api/v1/").unwrap_or_default().split('/').collect();
    let now = match question.query {
        "" => false,
        "now" => true,
        _ => return Err(unserved(400, PATHS)),
    };
    match words[..] {
        ["jobs", job, "cancel"] => Ok(Request::Cancel { job: id(job)?, now }),
        ["nodes", node, "drain"] => Ok(Request::Drain { node: id(node)?, now }),
        ["nodes", node, "undrain"] if !now => Ok(Request::Undrain(id(node)?)),
        _ => Err(unserved(404, PATHS)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_common::ids::{JobId, NodeId};

    #[test]
    fn three_things_can_be_changed_and_nothing_else() {
        let post = |target: &str| {
            let (path, query) = target.split_once('?').unwrap_or((target, ""));
            change(&Question { method: "POST", path, query, host: Some("a") }).map_err(|why| why.status)
        };
        assert_eq!(post("/api/v1/jobs/job-7/cancel"), Ok(Request::Cancel { job: JobId(7), now: false }));
        assert_eq!(post("/api/v1/nodes/node-2/drain?now"), Ok(Request::Drain { node: NodeId(2), now: true }));
        assert_eq!(post("/api/v1/nodes/2/undrain"), Ok(Request::Undrain(NodeId(2))));
        assert_eq!(post("/api/v1/nodes/x/undrain"), Err(400));
        assert_eq!(post("/api/v1/nodes/2/undrain?now"), Err(404));
        assert_eq!(post("/api/v1/jobs/7/cancel?now=no"), Err(400));
        for other in ["/", "/api/v1/jobs", "/api/v1/tokens", "/api/v1/nodes/2/revoke"] {
            assert_eq!(post(other), Err(404), "{other}");
        }
    }
}
