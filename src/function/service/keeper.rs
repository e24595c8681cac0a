//! Has ready what the pool would start next.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::Replicas;
use crate::function::pool_state::Reserve;

/// How long a pool must have been calm before anything is prepared: a call that was just let in should have the
/// processor to itself, and one that is known by then needs no guess.
const CALM: Duration = Duration::from_secs(1);

/// Prepares and dismisses as `wanted` says, until that is `None` and nothing is prepared, or nobody is left to say
/// anything: what is prepared then is left as it is.
pub(super) async fn keep(replicas: Arc<dyn Replicas>, mut wanted: watch::Receiver<Option<Arc<Reserve>>>) {
    loop {
        let Some(reserve) = wanted.borrow_and_update().clone() else { break };
        replicas.dismiss_all_but(&reserve.environments.iter().chain(&reserve.starting).copied().collect()).await;
        let prepare = async {
            if reserve.calm && !reserve.environments.is_empty() {
                tokio::time::sleep(CALM).await;
                for environment in &reserve.environments {
                    replicas.prepare(*environment).await;
                }
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            biased;
            // Cancel-safe: a change not taken stays.
            changed = wanted.changed() => if changed.is_err() { return },
            // Dropped half-way, what it began is prepared or dismissed in the next round.
            () = prepare => {}
        }
    }
    replicas.dismiss_all_but(&std::collections::BTreeSet::new()).await;
}
