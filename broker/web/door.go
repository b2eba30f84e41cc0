package web

import (
	"context"
	"net"
	"net/http"
	"sync"
	"sync/atomic"

	"github.com/dayflyhq/dayfly/broker/attest"
	"github.com/dayflyhq/dayfly/broker/gate"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// provenBounds are those of connections whose client has proved who it is: fewer than over
// gRPC, since calls are short and one connection carries many.
var provenBounds = gate.Bounds{OfOne: 256, All: 2048, Reserved: 256}

// A door bounds the connections of one server. On a new one nobody has proved anything, and
// it may have to give way; once a client has, no stranger can have it closed.
type door struct {
	strangers *gate.Gate
	proven    *gate.Proven

	mu     sync.Mutex
	leaves map[net.Conn]func() // of those that are proven
}

func newDoor() *door {
	return &door{strangers: gate.New(maxConnections), proven: gate.NewProven(provenBounds), leaves: map[net.Conn]func(){}}
}

// state follows the connections of an http.Server.
func (d *door) state(conn net.Conn, s http.ConnState) {
	switch s {
	case http.StateNew:
		d.strangers.Enter(conn)
	case http.StateClosed, http.StateHijacked:
		d.closed(conn)
	}
}

func (d *door) closed(conn net.Conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.strangers.Leave(conn)
	if leave, ok := d.leaves[conn]; ok {
		leave()
		delete(d.leaves, conn)
	}
}

// admit counts a connection by who has proved to be at its other end. One that this
// identity has too many beside stays among the strangers'.
func (d *door) admit(conn net.Conn, id spiffeid.ID) (ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	leave, ok := d.proven.Enter(id.String())
	if !ok {
		return false
	}
	if !d.strangers.Leave(conn) { // it is closed, or about to be
		leave()
		return true
	}
	d.leaves[conn] = leave
	return true
}

// A visitor is what is known of a connection.
type visitor struct {
	admit    func(spiffeid.ID) bool // nil without a server of ours
	admitted atomic.Bool

	once  sync.Once
	chain *attest.Chain
}

type visitorKey struct{}

// welcome puts the visitor beside a connection's requests.
func (d *door) welcome(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, visitorKey{}, &visitor{admit: func(id spiffeid.ID) bool { return d.admit(conn, id) }})
}

func visitorOf(r *http.Request) *visitor {
	if v, ok := r.Context().Value(visitorKey{}).(*visitor); ok {
		return v
	}
	return &visitor{}
}

// proved is told of a client that has proved who it is. The first on a connection counts:
// a proxy may bring many.
func (v *visitor) proved(id spiffeid.ID) {
	if v.admit != nil && !v.admitted.Load() && v.admit(id) {
		v.admitted.Store(true)
	}
}

// chainOf is the certificates of a request's connection, so that they aren't verified anew
// in every request.
func (v *visitor) chainOf(r *http.Request) *attest.Chain {
	v.once.Do(func() { v.chain = attest.NewChain(r.TLS.PeerCertificates) })
	return v.chain
}
