//! Streams of processes in a guest: commands executed, containers attached to.

use std::pin::Pin;

use async_trait::async_trait;
use futures::stream::BoxStream;
use futures::{FutureExt, Stream, StreamExt, TryStreamExt};
use lambdalet_proto::agent::v1::process_input::Message as Input;
use lambdalet_proto::agent::v1::process_output::Message as Outcome;
use lambdalet_proto::agent::v1::{
    AttachStart, Empty, ExecExitRequest, ExecStart, ProcessInput, ProcessOutput, WindowSize,
};
use tokio::io::AsyncWrite;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::outlet::{Outlet, QUEUE};
use super::said::{self, OutOfBounds};
use super::{Agent, PATIENCE, hostile, refused};
use crate::runtime::session::{AttachRequest, ExecRequest, Output, Session, Terminal, TerminalSize};
use crate::runtime::types::LogSource;
use crate::runtime::{Kind, Result, RuntimeError};

/// The streams of a process once it is joined.
struct Joined {
    input: mpsc::Sender<ProcessInput>,
    output: Streaming<ProcessOutput>,
}

/// Which output is wanted.
#[derive(Clone, Copy)]
struct Wanted {
    stdout: bool,
    stderr: bool,
}

impl Agent {
    /// Runs a command in a running container; see [`SandboxRuntime::exec`](crate::runtime::SandboxRuntime::exec) for what
    /// the session does. It ends with the agent's session.
    ///
    /// # Errors
    /// [`Kind::NotFound`] for an unknown container, [`Kind::Invalid`] for one that does not run or a command that cannot be
    /// executed there.
    pub async fn exec(&self, id: &str, request: &ExecRequest) -> Result<Session> {
        let tried =
            format!("failed to execute {:?} in container {id}", request.command.first().map_or("", |name| name));
        let exec_id = format!("{:032x}", rand::random::<u128>());
        let start = ExecStart {
            container: id.to_owned(),
            args: request.command.clone(),
            tty: request.tty,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr && !request.tty,
            size: None,
            exec_id: exec_id.clone(),
        };
        let (input, messages) = first(Input::Exec(start));
        let mut client = self.client.clone();
        let call = async move { started(client.exec(messages).await?.into_inner()).await }.boxed();
        let output = self.within(PATIENCE, &tried, call).await?;
        let wanted = Wanted { stdout: request.stdout, stderr: request.stderr && !request.tty };
        let exit = self.exec_exit(exec_id, tried.clone());
        let joined = Joined { input, output };
        Ok(session(joined, request.stdin, wanted, (tried, exit.boxed())))
    }

    /// Joins the streams of a running container's own process; output is what comes from now on. Its exit code is the
    /// container's.
    ///
    /// # Errors
    /// [`Kind::NotFound`] for an unknown container, [`Kind::Invalid`] for one that does not run.
    pub async fn attach(&self, id: &str, request: &AttachRequest) -> Result<Session> {
        let tried = format!("failed to attach to container {id}");
        let start = AttachStart {
            container: id.to_owned(),
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        let (input, messages) = first(Input::Attach(start));
        let mut client = self.client.clone();
        let call = async move { started(client.attach(messages).await?.into_inner()).await }.boxed();
        let output = self.within(PATIENCE, &tried, call).await?;
        let wanted = Wanted { stdout: request.stdout, stderr: request.stderr };
        let (agent, id) = (self.clone(), id.to_owned());
        let exit = async move { agent.wait(&id).await.map(|container| container.exit_code) };
        Ok(session(Joined { input, output }, request.stdin, wanted, (tried, exit.boxed())))
    }

    /// Asks for the end of a command now; whoever drops the answer ends the command.
    fn exec_exit(&self, exec_id: String, tried: String) -> impl Future<Output = Result<i32>> + Send + use<> {
        let (mut told, ended) = oneshot::channel();
        let mut client = self.client.clone();
        self.spawn(async move {
            let asked = client.exec_exit(ExecExitRequest { exec_id: exec_id.clone(), end: false });
            // Cancel-safe: a call that is dropped is followed by the one that ends the command.
            tokio::select! {
                reply = asked => {
                    // Whoever has gone needs no answer.
                    let _ = told.send(reply);
                    return;
                }
                () = told.closed() => {}
            }
            // A call that is dropped before it has come to the guest's notice tells it nothing. A command that is not
            // there any more has ended, and a guest that does not answer is not waited for.
            let _ = timeout(PATIENCE, client.exec_exit(ExecExitRequest { exec_id, end: true })).await;
        });
        let agent = self.clone();
        async move {
            // The session lives as long as its commands are waited for.
            let _agent = agent;
            let lost =
                |_| RuntimeError::new(Kind::Unavailable, format!("{tried}: the session with the guest has ended"));
            let reply = ended.await.map_err(lost)?.map_err(|status| refused(&tried, &status))?;
            said::code(reply.into_inner().code).map_err(|error| hostile(&tried, error))
        }
    }
}

/// Reads the message that says that a process was joined.
async fn started(mut output: Streaming<ProcessOutput>) -> std::result::Result<Streaming<ProcessOutput>, tonic::Status> {
    match output.message().await? {
        Some(ProcessOutput { message: Some(Outcome::Started(_)) }) => Ok(output),
        _ => Err(tonic::Status::internal(OutOfBounds("first output").to_string())),
    }
}

/// A stream of messages that begins with this one.
fn first(start: Input) -> (mpsc::Sender<ProcessInput>, impl Stream<Item = ProcessInput> + Send + use<>) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let start = ProcessInput { message: Some(start) };
    let messages = futures::stream::once(std::future::ready(start)).chain(ReceiverStream::new(receiver));
    (sender, messages)
}

type Exit = futures::future::BoxFuture<'static, Result<i32>>;

fn session(joined: Joined, stdin: bool, wanted: Wanted, (tried, exit): (String, Exit)) -> Session {
    let Joined { input, output } = joined;
    let piece = |bytes| ProcessInput { message: Some(Input::Stdin(bytes)) };
    let end = || ProcessInput { message: Some(Input::StdinEnd(Empty {})) };
    let writer = stdin.then(|| Box::pin(Outlet::new(input.clone(), piece, end)) as Pin<Box<dyn AsyncWrite + Send>>);
    Session { stdin: writer, output: outputs(output, wanted, tried), terminal: Box::new(Pty(input)), exit }
}

fn outputs(output: Streaming<ProcessOutput>, wanted: Wanted, tried: String) -> BoxStream<'static, Result<Output>> {
    let read = move |message: ProcessOutput| {
        let (source, bytes) = match message.message {
            Some(Outcome::Stdout(bytes)) if wanted.stdout => (LogSource::Stdout, bytes),
            Some(Outcome::Stderr(bytes)) if wanted.stderr => (LogSource::Stderr, bytes),
            _ => return None,
        };
        (!bytes.is_empty()).then_some(Output { source, bytes })
    };
    let failed = move |status| refused(&tried, &status);
    output.map_err(failed).try_filter_map(move |message| std::future::ready(Ok(read(message)))).boxed()
}

/// The terminal of a process in a guest.
struct Pty(mpsc::Sender<ProcessInput>);

#[async_trait]
impl Terminal for Pty {
    async fn resize(&self, size: TerminalSize) -> Result<()> {
        let size = WindowSize { columns: u32::from(size.width), rows: u32::from(size.height) };
        // A process that has ended has no size.
        let _ = self.0.send(ProcessInput { message: Some(Input::Resize(size)) }).await;
        Ok(())
    }
}
