package rpc

import (
	"errors"
	"net"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	// maxHandshakes bounds the connections that have not proved who they are, from all
	// sources. Each may hold a descriptor and some 20 KiB for handshakeTimeout.
	maxHandshakes = 1024
	// maxConnectionsOfOne bounds the connections of one identity, as its streams are: an
	// autoscaled set shares one, and needs a connection for each process.
	maxConnectionsOfOne = 1024
	// maxConnections bounds those of all identities: some 50 KiB each, idle.
	maxConnections = 16 << 10
	// reservedConnections come on top, for identities that have none: an operator gets
	// through whatever others hold.
	reservedConnections = 1024
)

// connections counts what has proved who it is.
type connections struct {
	mu   sync.Mutex
	byID map[spiffeid.ID]int
	all  int
	// refused counts those that were closed for having too many beside them.
	refused uint64
}

// ConnectionCounts says how many connections there are, and how many were closed.
type ConnectionCounts struct {
	// Handshaking have proved nothing yet; Open have proved who they are.
	Handshaking, Open int
	// Crowded were closed in their handshake, for another to be let in; Refused were
	// closed after it, since their identity, or all together, had too many. Since the start.
	Crowded, Refused uint64
}

// Connections returns the counts of the public listener.
func (s *Server) Connections() ConnectionCounts {
	s.open.mu.Lock()
	defer s.open.mu.Unlock()
	return ConnectionCounts{
		Handshaking: s.handshakes.Len(), Open: s.open.all,
		Crowded: s.handshakes.Closed(), Refused: s.open.refused,
	}
}

var errTooManyConnections = errors.New("too many connections are open")

// admit counts a connection, which is released when it is closed.
func (c *connections) admit(conn net.Conn, id spiffeid.ID) (net.Conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	limit := maxConnections
	if c.byID[id] == 0 {
		limit += reservedConnections
	}
	if c.byID[id] >= maxConnectionsOfOne || c.all >= limit {
		c.refused++
		return nil, errTooManyConnections
	}
	if c.byID == nil {
		c.byID = map[spiffeid.ID]int{}
	}
	c.byID[id]++
	c.all++
	return &counted{Conn: conn, release: sync.OnceFunc(func() { c.release(id) })}, nil
}

func (c *connections) release(id spiffeid.ID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.all--
	if c.byID[id]--; c.byID[id] == 0 {
		delete(c.byID, id)
	}
}

type counted struct {
	net.Conn
	release func()
}

func (c *counted) Close() error {
	defer c.release()
	return c.Conn.Close()
}
