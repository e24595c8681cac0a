//! From a request to what it asks for: values only. Each refusal names the field.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use lambdalet_proto::functionserver::CreateRequest;

use super::replicas::{Refusal, ReplicaWish};
use crate::runtime::microvm::machine::arguments::LONGEST_ARGUMENTS;

/// Of a path or a word, in bytes; a path of Linux has no more.
const LONGEST: usize = 4096;
/// What image names end with where a kubelet has handled them.
const DEFAULT_TAG: &str = ":latest";
const DEFAULT_NAME_SERVER: IpAddr = IpAddr::V4(Ipv4Addr::new(8, 8, 8, 8));
const DEFAULT_CPUS: u32 = 1;
/// Firecracker's limit.
const MOST_CPUS: u32 = 32;
const DEFAULT_MIB: u64 = 512;
/// A kernel and its initramfs need that much to come up.
const LEAST_MIB: u64 = 32;
/// 1 TiB.
const MOST_MIB: u64 = 1 << 20;
/// Of an interface's name, in bytes (IFNAMSIZ - 1).
const LONGEST_INTERFACE: usize = 15;

/// What a request asks for.
///
/// # Errors
/// [`Refusal::Invalid`] with the first field that cannot be.
pub(super) fn read(request: CreateRequest) -> Result<ReplicaWish, Refusal> {
    let CreateRequest {
        kernel_image_path,
        kernel_args,
        image_name,
        image_storage_prefix,
        inet_dev,
        name_server,
        aws_access_key_id,
        aws_secret_access_key,
        cpu,
        mem,
        num_replica,
        vm_type,
        initrd_path,
    } = request;
    for (field, text) in [
        ("kernelImagePath", &kernel_image_path),
        ("imageName", &image_name),
        ("imageStoragePrefix", &image_storage_prefix),
        ("initrdPath", &initrd_path),
    ] {
        plain(field, text)?;
    }
    keys(&aws_access_key_id, &aws_secret_access_key)?;
    if num_replica > 1 {
        return Err(Refusal::invalid("numReplica", format!("{num_replica} at once: a call makes one replica")));
    }
    if !matches!(vm_type.as_str(), "" | "linux") {
        return Err(Refusal::invalid(
            "vmType",
            format!("{vm_type:?}: machines of this node boot linux and nothing else"),
        ));
    }
    Ok(ReplicaWish {
        kernel: required("kernelImagePath", kernel_image_path)?,
        initrd: required("initrdPath", initrd_path)?,
        kernel_args: arguments(&kernel_args)?,
        image: image(&image_name, &image_storage_prefix)?,
        inet_dev: interface(inet_dev)?,
        name_server: resolver(&name_server)?,
        cpus: cpus(cpu)?,
        memory: memory(mem)?,
    })
}

/// Text that is one line and not too long.
fn plain(field: &'static str, text: &str) -> Result<(), Refusal> {
    if text.len() > LONGEST {
        return Err(Refusal::invalid(field, format!("{} bytes: {LONGEST} are allowed", text.len())));
    }
    if text.contains(char::is_control) {
        return Err(Refusal::invalid(field, "it must not contain control characters"));
    }
    Ok(())
}

fn required(field: &'static str, path: String) -> Result<PathBuf, Refusal> {
    match path.as_str() {
        "" => Err(Refusal::invalid(field, "it is required: an absolute path beneath this node's --vm-asset-dirs")),
        absolute if absolute.starts_with('/') => Ok(PathBuf::from(path)),
        relative => Err(Refusal::invalid(field, format!("{relative:?}: it must be an absolute path"))),
    }
}

/// One line that fits on a kernel's command line. Everything that is no word of its own there stays as it is: these
/// arguments are the function's, and so is the guest.
fn arguments(text: &str) -> Result<String, Refusal> {
    let field = "kernelArgs";
    plain(field, text)?;
    let text = text.trim();
    if text.len() > LONGEST_ARGUMENTS {
        let reason = format!("{} bytes: a kernel's command line has room for {LONGEST_ARGUMENTS}", text.len());
        return Err(Refusal::invalid(field, reason));
    }
    if !text.is_ascii() {
        return Err(Refusal::invalid(field, "a kernel's command line is ASCII"));
    }
    Ok(text.to_owned())
}

fn image(name: &str, prefix: &str) -> Result<Option<PathBuf>, Refusal> {
    if !prefix.is_empty() && !prefix.starts_with('/') {
        return Err(Refusal::invalid("imageStoragePrefix", format!("{prefix:?}: it must be an absolute path")));
    }
    let name = name.strip_suffix(DEFAULT_TAG).unwrap_or(name);
    match (name, prefix) {
        ("", _) => Ok(None),
        (absolute, _) if absolute.starts_with('/') => Ok(Some(PathBuf::from(absolute))),
        (relative, "") => {
            let reason =
                format!("{relative:?}: it must be an absolute path, or imageStoragePrefix say where it counts from");
            Err(Refusal::invalid("imageName", reason))
        }
        (relative, prefix) => Ok(Some(Path::new(prefix).join(relative))),
    }
}

fn interface(name: String) -> Result<Option<String>, Refusal> {
    let of_interface = |c: char| c.is_ascii_graphic() && c != '/' && c != ':';
    if name.is_empty() {
        return Ok(None);
    }
    if name.len() > LONGEST_INTERFACE || !name.chars().all(of_interface) {
        return Err(Refusal::invalid("inetDev", "it is not the name of an interface"));
    }
    Ok(Some(name))
}

fn resolver(text: &str) -> Result<IpAddr, Refusal> {
    match text {
        "" => Ok(DEFAULT_NAME_SERVER),
        // A kernel takes name servers of this family only.
        text => match text.parse() {
            Ok(address @ IpAddr::V4(_)) => Ok(address),
            _ => Err(Refusal::invalid("nameServer", "it must be an IPv4 address")),
        },
    }
}

/// The keys are not passed on: who wants them in the guest has them in `kernelArgs`. Half a pair is a mistake all the same.
fn keys(id: &str, secret: &str) -> Result<(), Refusal> {
    match (id.is_empty(), secret.is_empty()) {
        (false, true) => Err(Refusal::invalid("awsSecretAccessKey", "it is required with awsAccessKeyID")),
        (true, false) => Err(Refusal::invalid("awsAccessKeyID", "it is required with awsSecretAccessKey")),
        _ => Ok(()),
    }
}

fn cpus(asked: i64) -> Result<u32, Refusal> {
    match u32::try_from(asked) {
        Ok(0) => Ok(DEFAULT_CPUS),
        Ok(cpus) if cpus <= MOST_CPUS => Ok(cpus),
        _ => Err(Refusal::invalid("cpu", format!("{asked}: it must be 1 to {MOST_CPUS}, or 0 for {DEFAULT_CPUS}"))),
    }
}

fn memory(asked: i64) -> Result<u64, Refusal> {
    let mib = match u64::try_from(asked) {
        Ok(0) => DEFAULT_MIB,
        Ok(mib) if (LEAST_MIB..=MOST_MIB).contains(&mib) => mib,
        _ => {
            let reason = format!("{asked} MiB: it must be {LEAST_MIB} to {MOST_MIB}, or 0 for {DEFAULT_MIB}");
            return Err(Refusal::invalid("mem", reason));
        }
    };
    Ok(mib << 20)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The least that can be asked for.
    fn least() -> CreateRequest {
        CreateRequest {
            kernel_image_path: "/a/vmlinux".to_owned(),
            initrd_path: "/a/initrd".to_owned(),
            ..CreateRequest::default()
        }
    }

    #[test]
    fn what_is_not_said_has_its_default() {
        let wish = read(least()).unwrap();
        let expected = ReplicaWish {
            kernel: "/a/vmlinux".into(),
            initrd: "/a/initrd".into(),
            kernel_args: String::new(),
            image: None,
            inet_dev: None,
            name_server: IpAddr::from([8, 8, 8, 8]),
            cpus: 1,
            memory: 512 << 20,
        };
        assert!(wish == expected, "{wish:?}");
    }

    #[test]
    fn what_is_said_is_taken() {
        let wish = read(CreateRequest {
            kernel_args: "  quiet --env=A=1  ".to_owned(),
            image_name: "f/image:latest".to_owned(),
            image_storage_prefix: "/images".to_owned(),
            inet_dev: "eth0".to_owned(),
            name_server: "10.0.0.53".to_owned(),
            aws_access_key_id: "id".to_owned(),
            aws_secret_access_key: "secret".to_owned(),
            cpu: 2,
            mem: 128,
            num_replica: 1,
            vm_type: "linux".to_owned(),
            ..least()
        });
        let wish = wish.unwrap();
        assert_eq!(wish.kernel_args, "quiet --env=A=1");
        assert_eq!(wish.image, Some("/images/f/image".into()));
        assert_eq!(wish.inet_dev.as_deref(), Some("eth0"));
        assert_eq!((wish.name_server, wish.cpus, wish.memory), (IpAddr::from([10, 0, 0, 53]), 2, 128 << 20));
        let image = |name: &str| {
            let request =
                CreateRequest { image_name: name.to_owned(), image_storage_prefix: "/s".to_owned(), ..least() };
            read(request).unwrap().image
        };
        assert_eq!(image("/own/image:latest"), Some("/own/image".into()), "an absolute path is where it is");
        assert_eq!(image(":latest"), None);
        assert!(!format!("{wish:?}").contains("env"), "arguments hold secrets: {wish:?}");
    }

    #[test]
    fn each_mistake_is_refused_with_the_name_of_its_field() {
        let text = |text: &str| text.to_owned();
        let long = || "x".repeat(LONGEST + 1);
        let bad = [
            ("kernelImagePath", CreateRequest { kernel_image_path: text(""), ..least() }),
            ("kernelImagePath", CreateRequest { kernel_image_path: text("vmlinux"), ..least() }),
            ("kernelImagePath", CreateRequest { kernel_image_path: format!("/{}", long()), ..least() }),
            ("kernelImagePath", CreateRequest { kernel_image_path: text("/a\0b"), ..least() }),
            ("initrdPath", CreateRequest { initrd_path: text(""), ..least() }),
            ("initrdPath", CreateRequest { initrd_path: text("./initrd"), ..least() }),
            ("kernelArgs", CreateRequest { kernel_args: text("a\nb"), ..least() }),
            ("kernelArgs", CreateRequest { kernel_args: "x".repeat(LONGEST_ARGUMENTS + 1), ..least() }),
            ("kernelArgs", CreateRequest { kernel_args: text("ä"), ..least() }),
            ("imageName", CreateRequest { image_name: text("image"), ..least() }),
            ("imageStoragePrefix", CreateRequest { image_storage_prefix: text("images"), ..least() }),
            ("inetDev", CreateRequest { inet_dev: text("../eth0"), ..least() }),
            ("inetDev", CreateRequest { inet_dev: text("an interface's name"), ..least() }),
            ("nameServer", CreateRequest { name_server: text("dns.example"), ..least() }),
            ("nameServer", CreateRequest { name_server: text("2001:db8::1"), ..least() }),
            ("awsSecretAccessKey", CreateRequest { aws_access_key_id: text("id"), ..least() }),
            ("awsAccessKeyID", CreateRequest { aws_secret_access_key: text("secret"), ..least() }),
            ("cpu", CreateRequest { cpu: -1, ..least() }),
            ("cpu", CreateRequest { cpu: i64::from(MOST_CPUS) + 1, ..least() }),
            ("mem", CreateRequest { mem: -1, ..least() }),
            ("mem", CreateRequest { mem: 1, ..least() }),
            ("mem", CreateRequest { mem: i64::MAX, ..least() }),
            ("numReplica", CreateRequest { num_replica: 2, ..least() }),
            ("vmType", CreateRequest { vm_type: text("osv"), ..least() }),
            ("vmType", CreateRequest { vm_type: text("Linux"), ..least() }),
        ];
        for (field, request) in bad {
            let refused = read(request.clone()).unwrap_err().to_string();
            assert!(refused.starts_with(&format!("{field}: ")), "{request:?}: {refused}");
            assert!(!refused.contains("secret\""), "{refused}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_let_through_is_one_line_and_bounded(
            args in ".{0,64}", name in ".{0,64}", prefix in ".{0,64}", cpu: i64, mem: i64,
        ) {
            let request = CreateRequest {
                kernel_args: args, image_name: name, image_storage_prefix: prefix, cpu, mem, ..least()
            };
            if let Ok(wish) = read(request) {
                prop_assert!(!wish.kernel_args.contains(char::is_control));
                prop_assert!(wish.image.is_none_or(|image| image.is_absolute()));
                prop_assert!((1..=MOST_CPUS).contains(&wish.cpus));
                prop_assert!(wish.memory.is_multiple_of(1 << 20) && wish.memory >= LEAST_MIB << 20);
            }
        }
    }
}
