package attest

import (
	"errors"
	"net/netip"

	"github.com/dayflyhq/dayfly/broker"
)

// Ways in which a client may prove who it is.
const (
	MethodNone = "none" // it showed nothing that could
	MethodX509 = "x509"
	MethodJWT  = "jwt"
)

// A Failure is a client that hasn't proved who it is. Nothing in it is the client's own
// words, so it can be logged and counted.
type Failure struct {
	Peer            netip.AddrPort // not valid on a unix socket
	Method          string
	Reason, Message string
}

// FailureOf is what an error of client authentication is told as.
func FailureOf(peer netip.AddrPort, method string, err error) Failure {
	f := Failure{Peer: peer, Method: method, Reason: "INTERNAL"}
	var r *broker.Refusal
	if errors.As(err, &r) {
		f.Reason, f.Message = r.Reason, r.Message
	}
	return f
}
