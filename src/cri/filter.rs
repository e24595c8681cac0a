//! Pure: which of a list a client wants.

use std::collections::HashMap;

use lambdalet_proto::cri::v1;

/// Whether every label that is asked for is there with that value.
pub(super) fn labelled(labels: &HashMap<String, String>, selector: &HashMap<String, String>) -> bool {
    selector.iter().all(|(name, value)| labels.get(name) == Some(value))
}

fn named(id: &str, asked: &str) -> bool {
    asked.is_empty() || id == asked
}

/// Whether a list of sandboxes has this one. Ids are whole.
pub(super) fn sandbox(sandbox: &v1::PodSandbox, filter: Option<&v1::PodSandboxFilter>) -> bool {
    filter.is_none_or(|filter| {
        named(&sandbox.id, &filter.id)
            && filter.state.is_none_or(|wanted| wanted.state == sandbox.state)
            && labelled(&sandbox.labels, &filter.label_selector)
    })
}

/// Whether a list of containers has this one.
pub(super) fn container(container: &v1::Container, filter: Option<&v1::ContainerFilter>) -> bool {
    filter.is_none_or(|filter| {
        named(&container.id, &filter.id)
            && named(&container.pod_sandbox_id, &filter.pod_sandbox_id)
            && filter.state.is_none_or(|wanted| wanted.state == container.state)
            && labelled(&container.labels, &filter.label_selector)
    })
}

/// Whether a list of statistics has this sandbox.
pub(super) fn sandbox_stats(stats: &v1::PodSandboxStats, filter: Option<&v1::PodSandboxStatsFilter>) -> bool {
    let about = stats.attributes.as_ref();
    filter.is_none_or(|filter| {
        about.is_some_and(|about| named(&about.id, &filter.id) && labelled(&about.labels, &filter.label_selector))
    })
}

/// Whether a list of statistics has this container of this sandbox.
pub(super) fn container_stats(
    stats: &v1::ContainerStats,
    sandbox: &str,
    filter: Option<&v1::ContainerStatsFilter>,
) -> bool {
    let about = stats.attributes.as_ref();
    filter.is_none_or(|filter| {
        named(sandbox, &filter.pod_sandbox_id)
            && about
                .is_some_and(|about| named(&about.id, &filter.id) && labelled(&about.labels, &filter.label_selector))
    })
}

/// Whether a list of images has this one: all without a name, else the one of that name or id.
pub(super) fn image(image: &v1::Image, name: &str) -> bool {
    let same = |known: &String| known == name;
    name.is_empty() || image.id == name || image.repo_tags.iter().chain(&image.repo_digests).any(same)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn sandboxes_are_filtered_by_id_state_and_every_label() {
        let ready = v1::PodSandbox {
            id: "a".into(),
            state: v1::PodSandboxState::SandboxReady.into(),
            labels: map(&[("app", "web"), ("tier", "1")]),
            ..Default::default()
        };
        let filter = |id: &str, state: Option<v1::PodSandboxState>, labels: &[(&str, &str)]| v1::PodSandboxFilter {
            id: id.into(),
            state: state.map(|state| v1::PodSandboxStateValue { state: state.into() }),
            label_selector: map(labels),
        };
        let table = [
            (filter("", None, &[]), true),
            (filter("a", Some(v1::PodSandboxState::SandboxReady), &[("app", "web")]), true),
            (filter("b", None, &[]), false),
            (filter("", Some(v1::PodSandboxState::SandboxNotready), &[]), false),
            (filter("", None, &[("app", "web"), ("tier", "2")]), false),
            (filter("", None, &[("other", "")]), false),
        ];
        for (filter, wanted) in table {
            assert_eq!(sandbox(&ready, Some(&filter)), wanted, "{filter:?}");
        }
        assert!(sandbox(&ready, None));
    }

    #[test]
    fn containers_are_filtered_by_their_sandbox_too() {
        let running = v1::Container {
            id: "c".into(),
            pod_sandbox_id: "s".into(),
            state: v1::ContainerState::ContainerRunning.into(),
            ..Default::default()
        };
        let of = |sandbox: &str| v1::ContainerFilter { pod_sandbox_id: sandbox.into(), ..Default::default() };
        assert!(container(&running, Some(&of("s"))) && !container(&running, Some(&of("t"))));
        let created = v1::ContainerStateValue { state: v1::ContainerState::ContainerCreated.into() };
        let filter = v1::ContainerFilter { state: Some(created), ..Default::default() };
        assert!(!container(&running, Some(&filter)));
    }

    #[test]
    fn an_image_is_found_by_any_of_its_names() {
        let found = v1::Image {
            id: "sha256:1".into(),
            repo_tags: vec!["busybox:1".into()],
            repo_digests: vec!["busybox@sha256:2".into()],
            ..Default::default()
        };
        for (name, wanted) in
            [("", true), ("sha256:1", true), ("busybox:1", true), ("busybox@sha256:2", true), ("b", false)]
        {
            assert_eq!(image(&found, name), wanted, "{name}");
        }
    }
}
