//! Files for a guest: volumes that the node fills, and the files it reads back.

use bytes::Bytes;
use futures::stream;
use lambdalet_proto::agent::v1::{self, FileLayout, PushFilesRequest};
use lambdalet_proto::{MAX_FILES, MAX_PIECE, MAX_PUSHED};

use super::{Agent, PATIENCE};
use crate::runtime::{Kind, Result, RuntimeError};

/// Most bytes that [`Agent::read_file`] asks for: a termination message has at most 4 KiB.
const MAX_READ: u32 = 64 << 10;

/// What lies at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PushedContent {
    /// These bytes.
    File(Bytes),
    /// A symbolic link to this.
    Link(String),
}

/// One file of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PushedFile {
    /// Relative to the volume, without `..` and empty parts.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// Owner and group in the guest.
    pub owner: (u32, u32),
    /// Its bytes.
    pub content: PushedContent,
}

impl Agent {
    /// Makes these the files of a pushed volume, all at once; what is not among them is gone.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for more than [`MAX_FILES`] files or [`MAX_PUSHED`] bytes, and for paths that lead out;
    /// [`Kind::NotFound`] for an unknown volume.
    pub async fn push_files(&self, volume: &str, layout: FileLayout, files: &[PushedFile]) -> Result<()> {
        let tried = format!("failed to push files to volume {volume} in the guest");
        let bytes: usize = files.iter().map(|file| file.content.len()).sum();
        if files.len() > MAX_FILES || bytes > MAX_PUSHED {
            let many =
                format!("{} files of {bytes} bytes, at most {MAX_FILES} of {MAX_PUSHED} are allowed", files.len());
            return Err(RuntimeError::new(Kind::Invalid, format!("{tried}: {many}")));
        }
        let first = PushFilesRequest { volume: volume.into(), layout: layout.into(), ..PushFilesRequest::default() };
        let messages: Vec<_> = std::iter::once(first).chain(files.iter().flat_map(pieces)).collect();
        let mut client = self.client.clone();
        let call = async move { client.push_files(stream::iter(messages)).await };
        self.within(PATIENCE, &tried, call).await.map(drop)
    }

    /// The last bytes of a file in a volume, at most `limit` (64 KiB at most); `None` if there is none.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for what is no plain file below the volume.
    pub async fn read_file(&self, volume: &str, path: &str, limit: u32) -> Result<Option<Bytes>> {
        let tried = format!("failed to read {path} of volume {volume} in the guest");
        let limit = limit.min(MAX_READ);
        let request = v1::ReadFileRequest { volume: volume.into(), path: path.into(), limit };
        let mut client = self.client.clone();
        match self.within(PATIENCE, &tried, async move { client.read_file(request).await }).await {
            Ok(reply) => {
                let mut data = reply.into_inner().data;
                data.truncate(limit as usize);
                Ok(Some(data))
            }
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl PushedContent {
    fn len(&self) -> usize {
        match self {
            Self::File(bytes) => bytes.len(),
            Self::Link(target) => target.len(),
        }
    }
}

/// The messages of one file: the first names it, all carry at most [`MAX_PIECE`] bytes.
fn pieces(file: &PushedFile) -> Vec<PushFilesRequest> {
    let (uid, gid) = file.owner;
    let mut named =
        PushFilesRequest { path: file.path.clone(), mode: file.mode, uid, gid, ..PushFilesRequest::default() };
    match &file.content {
        PushedContent::Link(target) => {
            named.link.clone_from(target);
            vec![named]
        }
        PushedContent::File(bytes) => {
            let cut = |at: usize| bytes.slice(at..bytes.len().min(at + MAX_PIECE));
            named.data = cut(0);
            let rest = (MAX_PIECE..bytes.len()).step_by(MAX_PIECE);
            let rest = rest.map(|at| PushFilesRequest { data: cut(at), ..PushFilesRequest::default() });
            std::iter::once(named).chain(rest).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_file_goes_in_pieces_of_which_the_first_has_its_name() {
        let bytes: Bytes = (0..MAX_PIECE * 2 + 5).map(|at| at as u8).collect::<Vec<_>>().into();
        let content = PushedContent::File(bytes.clone());
        let pieces = pieces(&PushedFile { path: "a/b".into(), mode: 0o644, owner: (1, 2), content });
        assert_eq!(pieces.iter().map(|piece| piece.data.len()).collect::<Vec<_>>(), [MAX_PIECE, MAX_PIECE, 5]);
        assert_eq!(pieces.iter().map(|piece| piece.path.as_str()).collect::<Vec<_>>(), ["a/b", "", ""]);
        assert_eq!(pieces.iter().flat_map(|piece| piece.data.clone()).collect::<Vec<_>>(), bytes);
    }

    #[test]
    fn an_empty_file_is_one_message() {
        let content = PushedContent::File(Bytes::new());
        assert_eq!(pieces(&PushedFile { path: "a".into(), mode: 0o600, owner: (0, 0), content }).len(), 1);
    }
}
