package rpc

import (
	"errors"
	"net"
	"runtime"

	"github.com/dayflyhq/dayfly/broker/gate"
)

const (
	// maxHandshakes bounds the connections that have not proved who they are, from all
	// sources. Each may hold a descriptor and some 20 KiB for handshakeTimeout.
	maxHandshakes = 1024
	// maxInLine bounds the connections that wait for their handshake to begin: some 4 KiB
	// each, and a descriptor.
	maxInLine = 12 << 10
	// maxConnectionsOfOne bounds the connections of one identity, as its streams are: an
	// autoscaled set shares one, and needs a connection for each process.
	maxConnectionsOfOne = 1024
	// maxConnections bounds those of all identities: some 50 KiB each, idle.
	maxConnections = 16 << 10
	// reservedConnections come on top, for identities that have none: an operator gets
	// through whatever others hold.
	reservedConnections = 1024
)

// pace is that of handshakes: enough for each core, and for peers that are far away. A core
// makes some thousand in a second.
func pace() gate.Pace {
	cores := runtime.GOMAXPROCS(0)
	return gate.Pace{Working: 2 * cores, Asked: 64 * cores}
}

var bounds = gate.Bounds{OfOne: maxConnectionsOfOne, All: maxConnections, Reserved: reservedConnections}

// ConnectionCounts says how many connections there are, and how many were closed.
type ConnectionCounts struct {
	// Waiting are in line for their handshake; Handshaking are in it and have proved
	// nothing yet; Open have proved who they are.
	Waiting, Handshaking, Open int
	// Crowded were closed before the end of it, for another to be let in; Refused were
	// closed after it, since their identity, or all together, had too many. Since the start.
	Crowded, Refused uint64
}

// Connections returns the counts of the public listener.
func (s *Server) Connections() ConnectionCounts {
	return ConnectionCounts{
		Waiting: s.line.Waiting(), Handshaking: s.handshakes.Len(), Open: s.open.Len(),
		Crowded: s.line.Closed() + s.handshakes.Closed(), Refused: s.open.Refused(),
	}
}

var errTooManyConnections = errors.New("too many connections are open")

// counted is a connection that somebody counts until it is closed.
type counted struct {
	net.Conn
	release func()
}

func (c *counted) Close() error {
	defer c.release()
	return c.Conn.Close()
}
