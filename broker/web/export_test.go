package web

// MaxConnections bounds the connections of a server.
const MaxConnections = maxConnections
