//! Listening in a network namespace of the test's own.

use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc;
use std::thread;

use nix::sched::{CloneFlags, unshare};

use super::super::*;
use super::support::*;

type Work = Box<dyn FnOnce() + Send>;

/// A thread in a namespace of its own, which ends with it.
fn namespace() -> (PathBuf, mpsc::Sender<Work>) {
    let (say, hear) = mpsc::channel();
    let (work, works) = mpsc::channel::<Work>();
    thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
        let path = format!("/proc/{}/task/{}/ns/net", std::process::id(), nix::unistd::gettid());
        say.send(PathBuf::from(path)).unwrap();
        for work in works {
            work();
        }
    });
    (hear.recv().unwrap(), work)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_front_is_reached_inside_the_namespace_and_the_environment_outside() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root to make a network namespace");
        return;
    }
    let (path, inside) = namespace();
    // Any port: the namespace has all of them.
    let address: SocketAddr = ([127, 0, 0, 1], 8080).into();
    for _ in 0..2 {
        let listeners = listen_in(Some(path.clone()), vec![address]).await.unwrap();
        let front = serve_on(listeners, Limits::default());
        let rie = Rie::open().await;
        front.environment(rie.address);
        let (say, hear) = tokio::sync::oneshot::channel();
        let call = move || {
            let mut stream = std::net::TcpStream::connect(address).unwrap();
            let request =
                format!("POST {LAMBDA_PATH} HTTP/1.1\r\nHost: f\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi");
            stream.write_all(request.as_bytes()).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            say.send(answer).unwrap();
        };
        inside.send(Box::new(call)).unwrap();
        let answer = within(hear).await.unwrap();
        assert!(answer.ends_with("\r\n\r\necho: hi"), "{answer}");
        // The next round listens on the same port again, as a restarted process does.
        front.drain.send(Some(Instant::now())).unwrap();
        within(front.task).await.unwrap().unwrap();
    }
}
