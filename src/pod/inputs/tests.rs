//! What containers get from the API, against a small API server in this process.


