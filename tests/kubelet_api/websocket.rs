//! WebSocket clients.
