//! An in-memory runtime with fault knobs.
