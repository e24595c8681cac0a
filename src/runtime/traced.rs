//! Span, log line and metrics around every verb, once, at the seam.
