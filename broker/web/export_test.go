package web

import (
	"net/http"
	"net/url"
)

// Inner doors for the tests of this package.
const (
	MaxConnections       = maxConnections
	MaxConcurrentStreams = maxConcurrentStreams
	ReadHeaderTimeout    = readHeaderTimeout
)

// ReadForm reads a request's form.
func ReadForm(r *http.Request) (url.Values, error) {
	f, err := readForm(r)
	return f.values, err
}
