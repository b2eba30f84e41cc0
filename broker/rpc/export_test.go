package rpc

// Inner doors for the tests of this package.
var (
	ToStatus  = toStatus
	CodeOf    = codeOf
	ErrNoSVID = errNoSVID
)
