package web

// Inner doors for the tests of this package.
const (
	MaxConnections    = maxConnections
	ReadHeaderTimeout = readHeaderTimeout
)
