//! Containers frozen and thawed.

use super::DockerRuntime;
use super::failure::{failed, status as http_status};
use super::sandbox::Seen;
use crate::runtime::types::ContainerId;
use crate::runtime::{Kind, Result, RuntimeError};

impl DockerRuntime {
    pub(super) async fn set_frozen(&self, id: &ContainerId, frozen: bool) -> Result<()> {
        let tried = format!("failed to {} container {id}", if frozen { "pause" } else { "unpause" });
        if self.is_frozen(id, &tried).await? == frozen {
            return Ok(());
        }
        let done = if frozen {
            self.docker.pause_container(id.as_str()).await
        } else {
            self.docker.unpause_container(id.as_str()).await
        };
        match done {
            // Somebody else did it meanwhile, or it has ended: what it is now decides.
            Err(error) if http_status(&error).is_some() && self.is_frozen(id, &tried).await? == frozen => Ok(()),
            Err(error) => Err(failed(tried, error)),
            Ok(()) => Ok(()),
        }
    }

    async fn is_frozen(&self, id: &ContainerId, tried: &str) -> Result<bool> {
        match self.see(id.as_str()).await?.filter(|seen| !seen.facts.sandbox_itself) {
            Some(seen) if seen.running() => Ok(paused(&seen)),
            Some(_) => Err(RuntimeError::new(Kind::Invalid, format!("{tried}: it does not run"))),
            None => Err(RuntimeError::new(Kind::NotFound, format!("{tried}: it does not exist"))),
        }
    }
}

fn paused(seen: &Seen) -> bool {
    seen.inspect.state.as_ref().and_then(|state| state.paused).unwrap_or(false)
}
