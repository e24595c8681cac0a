//! The bridge that Pods hang on, and the cable that joins a sandbox to it.
