//! What a container needs from the API: ConfigMaps, Secrets, service variables, pull secrets.

pub mod downward;
pub mod objects;
