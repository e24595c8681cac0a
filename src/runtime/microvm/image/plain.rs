//! An image of the local Docker daemon as a directory, for volumes that show one.

use std::io;
use std::path::Path;

use super::daemon::Daemon;
use super::{GivenUp, Limits, config, unpack};
use crate::runtime::types::ImageId;
use crate::runtime::{Kind, Result, RuntimeError, blocking};

/// Unpacks the image into `into`, which is made; what is needed meanwhile lies beside it. Exactly the files of its layers
/// are there then, and not what Docker puts into a container.
///
/// # Errors
/// [`Kind::NotFound`] if the daemon has no such image. What was made so far is left for the caller to remove.
pub(in crate::runtime) async fn unpacked(socket: &Path, id: &ImageId, into: &Path) -> Result<()> {
    let tried = format!("failed to unpack image {id}");
    let beside = into.parent().unwrap_or(Path::new("/")).to_owned();
    let scratch = blocking(tried.clone(), move || tempfile::tempdir_in(beside)).await?;
    let limits = Limits::default();
    let (config, layers) = Daemon::at(socket)?.save(id, scratch.path(), &limits).await?;
    let wrong = |why: &str| RuntimeError::new(Kind::Internal, format!("{tried}: {why}"));
    let read = config::read(&config).map_err(|error| wrong("its config makes no sense").with_source(error))?;
    if read.diff_ids.len() != layers.len() {
        return Err(wrong("its config and its manifest name different numbers of layers"));
    }
    let (given_up, into) = (GivenUp::default(), into.to_owned());
    let flag = given_up.0.clone();
    blocking(tried, move || {
        std::fs::create_dir(&into)?;
        // The scratch directory holds the layers.
        let (_scratch, unpacked) = (&scratch, unpack::unpack(&layers, &read.diff_ids, &into, &limits, &flag));
        unpacked.map_err(|(_, error)| io::Error::other(error))
    })
    .await
}
