//! Pods as Docker containers.
