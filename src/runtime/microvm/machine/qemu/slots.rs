//! Swaps what is behind an image slot while the guest runs.
//!
//! A slot is a node of format `raw` over a file, and stays; the file below it is exchanged (`blockdev-reopen`). QEMU
//! tells the guest of a new size only after `block_resize`, which changes the file. So the slot first goes to its blank,
//! a sparse file of the VMM's own, that is resized there; then to the image, which is as large and read-only. The blank
//! was given that size before, so that QEMU, which may not write large files, has nothing to add.

use std::fs::File;

use serde_json::{Value, json};

use super::command::blank_node;
use super::qmp::Qmp;
use crate::runtime::microvm::machine::error::Result;
use crate::runtime::microvm::machine::slot_name;

/// Puts the image, of this many bytes, behind the slot.
pub(super) async fn put(qmp: &mut Qmp, slot: u8, image: &File, size: u64) -> Result<()> {
    let before = images(qmp, slot).await?;
    show_blank(qmp, slot, size).await?;
    let (path, number) = qmp.add_fd(image).await?;
    let node = format!("{}-{:08x}", slot_name(slot), rand::random::<u32>());
    let added = qmp.execute("blockdev-add", file_node(&node, &path)).await;
    // What was opened by it stays open.
    qmp.remove_fd(number).await?;
    added?;
    if let Err(error) = reopen(qmp, slot, &node, true).await {
        // The slot is blank; the error says why.
        let _ = delete(qmp, &node).await;
        return Err(error);
    }
    for node in before {
        delete(qmp, &node).await?;
    }
    Ok(())
}

/// Leaves nothing behind the slot.
pub(super) async fn take(qmp: &mut Qmp, slot: u8) -> Result<()> {
    let before = images(qmp, slot).await?;
    show_blank(qmp, slot, 0).await?;
    for node in before {
        delete(qmp, &node).await?;
    }
    Ok(())
}

async fn show_blank(qmp: &mut Qmp, slot: u8, size: u64) -> Result<()> {
    reopen(qmp, slot, &blank_node(slot), false).await?;
    let resize = json!({"node-name": slot_name(slot), "size": size});
    qmp.execute("block_resize", resize).await.map(drop)
}

async fn reopen(qmp: &mut Qmp, slot: u8, file: &str, read_only: bool) -> Result<()> {
    let node = json!({"driver": "raw", "node-name": slot_name(slot), "read-only": read_only, "file": file});
    qmp.execute("blockdev-reopen", json!({"options": [node]})).await.map(drop)
}

async fn delete(qmp: &mut Qmp, node: &str) -> Result<()> {
    qmp.execute("blockdev-del", json!({"node-name": node})).await.map(drop)
}

/// Images that are behind the slot, or were and were not removed.
async fn images(qmp: &mut Qmp, slot: u8) -> Result<Vec<String>> {
    let (begin, blank) = (format!("{}-", slot_name(slot)), blank_node(slot));
    let nodes = qmp.block_nodes().await?;
    Ok(nodes.into_iter().filter(|node| node.starts_with(&begin) && *node != blank).collect())
}

/// Without locks: images are never written, and many machines read one.
fn file_node(node: &str, path: &str) -> Value {
    json!({"driver": "file", "node-name": node, "filename": path, "read-only": true, "locking": "off"})
}
