//! The rules on random sequences.
