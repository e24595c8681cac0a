//! `/debug/pprof/…`: what is not to be had here, why, and what to do instead.
//!
//! A sampling profiler in the process would need the symbols that shipped binaries leave out, a signal handler that
//! walks stacks, and memory for both. The kernel's profiler does better
//! from outside, without a restart and without cost while nobody looks.

use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use http::StatusCode;

/// Any method of `/debug/pprof`, `/debug/pprof/` and what is below: 501.
pub(super) async fn pprof(request: Request) -> Response {
    let what = request.uri().path().strip_prefix("/debug/pprof").unwrap_or_default().trim_matches('/');
    (StatusCode::NOT_IMPLEMENTED, advice(what, std::process::id())).into_response()
}

fn advice(what: &str, pid: u32) -> String {
    match what {
        "" | "profile" => format!(
            "lambdalet has no profiler built in: its binary carries no symbols.\n\
             On the node, the kernel's profiler sees the process as it runs (99 samples a second, for 30 s):\n\
             \n  perf record -F 99 -g -p {pid} -- sleep 30 && perf report\n\
             \nFor names of functions run a build that keeps them:\n\
             \n  cargo build --release --config 'profile.release.strip=\"none\"' --config 'profile.release.debug=1'\n"
        ),
        _ => "lambdalet has no such profile: it is not a Go program. See /debug/pprof/profile for CPU time, \
              lambdalet_process_* in /metrics for memory and open files\n"
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_profile_is_refused_with_the_command_that_makes_one() {
        for what in ["", "profile"] {
            assert!(advice(what, 4711).contains("perf record -F 99 -g -p 4711 "), "{what}");
        }
        assert!(advice("heap", 4711).contains("/metrics"));
    }
}
