//! The front against real sockets: loopback listeners, a stand-in for the Lambda RIE, a plain server.
