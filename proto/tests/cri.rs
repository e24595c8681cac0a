//! CRI v1 here is CRI v1 as published: every package, service, message and enum, and all names, numbers and types in them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto};

/// The module of Kubernetes 1.36.
const MODULE: &str = "k8s.io/cri-api@v0.36.3";
/// Where the definition is in it.
const PUBLISHED: &str = "pkg/apis/runtime/v1/api.proto";

/// One line for each fact, so that a difference is readable.
fn facts(file: &FileDescriptorProto) -> BTreeSet<String> {
    let mut facts = BTreeSet::from([format!("package {}", file.package()), format!("syntax {}", file.syntax())]);
    for service in &file.service {
        for method in &service.method {
            let stream = |yes: bool| if yes { "stream " } else { "" };
            facts.insert(format!(
                "rpc {}.{}({}{}) returns ({}{})",
                service.name(),
                method.name(),
                stream(method.client_streaming()),
                method.input_type(),
                stream(method.server_streaming()),
                method.output_type()
            ));
        }
    }
    file.enum_type.iter().for_each(|kind| of_enum("", kind, &mut facts));
    file.message_type.iter().for_each(|message| of_message("", message, &mut facts));
    facts
}

fn of_enum(within: &str, kind: &EnumDescriptorProto, facts: &mut BTreeSet<String>) {
    let values =
        kind.value.iter().map(|value| format!("enum {within}{}.{} = {}", kind.name(), value.name(), value.number()));
    facts.extend(values);
}

fn of_message(within: &str, message: &DescriptorProto, facts: &mut BTreeSet<String>) {
    let name = format!("{within}{}", message.name());
    facts.insert(format!("message {name} (map entry: {})", message.options.as_ref().is_some_and(|o| o.map_entry())));
    facts.extend(message.field.iter().map(|field| of_field(&name, field)));
    let inner = format!("{name}.");
    message.enum_type.iter().for_each(|kind| of_enum(&inner, kind, facts));
    message.nested_type.iter().for_each(|message| of_message(&inner, message, facts));
}

fn of_field(message: &str, field: &FieldDescriptorProto) -> String {
    let repeated = if field.label() == Label::Repeated { "repeated " } else { "" };
    let kind = match field.r#type() {
        Type::Message | Type::Enum => field.type_name().to_owned(),
        plain => format!("{plain:?}").to_lowercase(),
    };
    let deprecated = field.options.as_ref().is_some_and(|options| options.deprecated());
    let oneof = field.oneof_index;
    format!(
        "field {message}.{} = {}: {repeated}{kind}, deprecated {deprecated}, oneof {oneof:?}",
        field.name(),
        field.number()
    )
}

fn compiled(file: &str, folder: &Path) -> FileDescriptorProto {
    let set = protox::compile([folder.join(file)], [folder]).expect("it compiles");
    set.file.into_iter().find(|found| found.package() == "runtime.v1").expect("the package is in it")
}

/// Where the module lies, fetched with Go's own client; or why it cannot be had.
fn module() -> Result<PathBuf, String> {
    let output = Command::new("go").args(["mod", "download", "-json", MODULE]).env("GOFLAGS", "-mod=mod").output();
    let output = output.map_err(|error| format!("go cannot be run: {error}"))?;
    let told: serde_json::Value =
        serde_json::from_slice(&output.stdout).map_err(|error| format!("go says: {error}"))?;
    match told["Dir"].as_str() {
        Some(folder) => Ok(folder.into()),
        None => Err(format!("go cannot fetch {MODULE}: {}", told["Error"])),
    }
}

#[test]
fn ours_is_the_published_definition() {
    let published = match module() {
        Ok(folder) => facts(&compiled(PUBLISHED, &folder)),
        Err(why) => return eprintln!("skipped: {why}"),
    };
    let ours = facts(&compiled("runtime/v1/cri.proto", Path::new(env!("CARGO_MANIFEST_DIR"))));
    let missing: Vec<_> = published.difference(&ours).collect();
    let more: Vec<_> = ours.difference(&published).collect();
    assert!(missing.is_empty() && more.is_empty(), "only published: {missing:#?}\nonly ours: {more:#?}");
    assert!(ours.len() > 700, "{} facts are too few to be all of it", ours.len());
}

#[test]
fn no_text_of_the_published_definition_is_in_ours() {
    let folder = match module() {
        Ok(folder) => folder,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    let comments = |path: &Path| -> BTreeSet<String> {
        let text = std::fs::read_to_string(path).expect("it can be read");
        let lines = text.lines().filter_map(|line| Some(line.split_once("//")?.1.trim().to_owned()));
        lines.filter(|line| line.len() > 3).collect()
    };
    let ours = comments(&Path::new(env!("CARGO_MANIFEST_DIR")).join("runtime/v1/cri.proto"));
    let common: Vec<_> = comments(&folder.join(PUBLISHED)).intersection(&ours).cloned().collect();
    assert!(common.is_empty(), "{common:#?}");
}
