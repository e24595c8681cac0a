//! Who the workload is: the image's own words for users and groups, looked up in its own files.
//!
//! The files are the workload's: they are read within bounds, and what does not parse is not there.

use std::fs::File;
use std::io::{self, Read};

use lambdalet_proto::agent::v1::ContainerSpec;
use rustix::fs::{Mode, OFlags, open};

/// What is read of a file at most.
const LONGEST: u64 = 1 << 20;

/// Numbers, and where home is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
}

impl Default for Identity {
    fn default() -> Self {
        Self { uid: 0, gid: 0, groups: Vec::new(), home: "/root".to_owned() }
    }
}

/// Looks the spec's user up, inside the container.
pub(super) fn of(spec: &ContainerSpec) -> Result<Identity, String> {
    resolve(spec, &read("/etc/passwd"), &read("/etc/group"))
}

fn read(path: &str) -> String {
    // A file that is not there, or is something else, names nobody.
    String::from_utf8_lossy(&bytes(path).unwrap_or_default()).into_owned()
}

/// A workload may have put a pipe in the place of the file, or a terminal: nothing waits for the one, or takes the other.
fn bytes(path: &str) -> io::Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(open(path, flags, Mode::empty())?);
    let mut bytes = Vec::new();
    if file.metadata()?.is_file() {
        file.take(LONGEST).read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}

/// A line of passwd(5).
struct User<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn users(passwd: &str) -> impl Iterator<Item = User<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let (name, _) = (fields.next()?, fields.next()?);
        let (uid, gid) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        Some(User { name, uid, gid, home: fields.nth(1).unwrap_or("/") })
    })
}

/// Lines of group(5): name, number, members.
fn groups(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let (name, _) = (fields.next()?, fields.next()?);
        Some((name, fields.next()?.parse().ok()?, fields.next().unwrap_or("")))
    })
}

fn resolve(spec: &ContainerSpec, passwd: &str, group: &str) -> Result<Identity, String> {
    let (user, named_group) = spec.user.split_once(':').unwrap_or((&spec.user, ""));
    // A number on the spec wins over the image's word, and over the group that goes with that.
    let number = spec.uid.map_or_else(|| user.parse().ok(), Some).or(user.is_empty().then_some(0));
    let found = match number {
        Some(uid) => users(passwd).find(|user| user.uid == uid),
        None => Some(
            users(passwd)
                .find(|known| known.name == user)
                .ok_or_else(|| format!("there is no user {user:?} in the image"))?,
        ),
    };
    let mut identity = Identity { uid: number.unwrap_or(0), gid: 0, groups: Vec::new(), home: "/".to_owned() };
    if let Some(found) = &found {
        (identity.uid, identity.gid, identity.home) = (found.uid, found.gid, found.home.to_owned());
        let member = |members: &str| members.split(',').any(|member| member == found.name);
        identity.groups = groups(group).filter(|(_, _, members)| member(members)).map(|(_, gid, _)| gid).collect();
    }
    if spec.uid.is_none() && !named_group.is_empty() {
        let known = groups(group).find(|(name, ..)| *name == named_group).map(|(_, gid, _)| gid);
        let gid = named_group.parse().ok().or(known);
        identity.gid = gid.ok_or_else(|| format!("there is no group {named_group:?} in the image"))?;
    }
    identity.gid = spec.gid.unwrap_or(identity.gid);
    identity.groups.extend(&spec.supplemental_groups);
    identity.groups.push(identity.gid);
    identity.groups.sort_unstable();
    identity.groups.dedup();
    Ok(identity)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\nwww-data:x:33:34:www:/var/www:/bin/false\n";
    const GROUP: &str = "root:x:0:\nadm:x:4:root,www-data\nwww-data:x:34:\n";

    fn who(user: &str) -> (u32, u32, Vec<u32>, String) {
        let spec = ContainerSpec { user: user.into(), ..Default::default() };
        let identity = resolve(&spec, PASSWD, GROUP).unwrap();
        (identity.uid, identity.gid, identity.groups, identity.home)
    }

    #[test]
    fn users_have_names_and_numbers() {
        assert_eq!(who(""), (0, 0, vec![0, 4], "/root".into()));
        assert_eq!(who("www-data"), (33, 34, vec![4, 34], "/var/www".into()));
        assert_eq!(who("33"), (33, 34, vec![4, 34], "/var/www".into()));
        assert_eq!(who("1000"), (1000, 0, vec![0], "/".into()));
        assert_eq!(who("1000:adm"), (1000, 4, vec![4], "/".into()));
        assert_eq!(who("www-data:7"), (33, 7, vec![4, 7], "/var/www".into()));
    }

    #[test]
    fn numbers_of_the_spec_win() {
        let spec = ContainerSpec {
            user: "www-data:adm".into(),
            uid: Some(1000),
            gid: Some(5),
            supplemental_groups: vec![9, 5],
            ..Default::default()
        };
        let identity = resolve(&spec, PASSWD, GROUP).unwrap();
        assert_eq!((identity.uid, identity.gid, identity.groups), (1000, 5, vec![5, 9]));
    }

    #[test]
    fn only_a_plain_file_is_read_and_nothing_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(path("file"), PASSWD).unwrap();
        std::fs::write(path("long"), vec![b'x'; LONGEST as usize + 1]).unwrap();
        nix::unistd::mkfifo(path("pipe").as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!((read(&path("file")).as_str(), read(&path("long")).len() as u64), (PASSWD, LONGEST));
        let others = [path("pipe"), path("none"), path(""), "/dev/zero".to_owned()];
        let (told, read_all) = std::sync::mpsc::channel();
        std::thread::spawn(move || told.send(others.map(|path| read(&path))));
        let all = read_all.recv_timeout(std::time::Duration::from_secs(30)).expect("nobody writes to the pipe");
        assert_eq!(all, [""; 4]);
    }

    #[test]
    fn whoever_is_not_there_is_refused() {
        let spec = |user: &str| ContainerSpec { user: user.into(), ..Default::default() };
        assert!(resolve(&spec("nobody"), PASSWD, GROUP).is_err());
        assert!(resolve(&spec("root:nogroup"), PASSWD, GROUP).is_err());
    }
}
