// Package gate bounds the connections that have proved nothing. A full gate lets a new
// one in and closes the one that has waited longest, of the source that has the most: an
// honest handshake takes milliseconds, so what has waited longest is what came to wait.
// Before it there may be a Line, where connections wait for us and not we for them.
// Those that have proved who they are leave it, and are counted by identity.
package gate

import (
	"container/list"
	"net"
	"net/netip"
	"sync"
	"time"
)

// A Gate holds connections by where they come from. Its methods may be called at once.
type Gate struct {
	max     int
	mu      sync.Mutex
	inside  map[net.Conn]*list.Element
	sources map[netip.Prefix]*list.List // of *visit, the oldest first
	number  uint64
	closed  uint64
}

type visit struct {
	conn   net.Conn
	source netip.Prefix
	number uint64
	since  time.Time
	ours   bool // it waits for us: of Lines alone
}

// New returns a gate for at most max connections.
func New(max int) *Gate {
	return &Gate{max: max, inside: map[net.Conn]*list.Element{}, sources: map[netip.Prefix]*list.List{}}
}

// Enter lets a connection in. It may close another.
func (g *Gate) Enter(conn net.Conn) {
	g.mu.Lock()
	var crowded *visit
	if len(g.inside) >= g.max {
		crowded, _ = g.oldest()
		g.leave(crowded.conn)
		g.closed++
	}
	g.enter(conn, sourceOf(conn.RemoteAddr()))
	g.mu.Unlock()
	if crowded != nil {
		_ = abruptly(crowded.conn).Close()
	}
}

// enter counts a connection in. The caller holds the lock.
func (g *Gate) enter(conn net.Conn, source netip.Prefix) *visit {
	if g.sources[source] == nil {
		g.sources[source] = list.New()
	}
	g.number++
	v := &visit{conn: conn, source: source, number: g.number, since: time.Now()}
	g.inside[conn] = g.sources[source].PushBack(v)
	return v
}

// abruptly is a connection without TLS's goodbye: its peer could let that take seconds, and
// whoever comes next would wait.
func abruptly(conn net.Conn) net.Conn {
	if t, ok := conn.(interface{ NetConn() net.Conn }); ok {
		return t.NetConn()
	}
	return conn
}

// Leave lets go of a connection, and reports whether it was inside: it is no error if it
// was closed, or never came.
func (g *Gate) Leave(conn net.Conn) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.leave(conn)
}

func (g *Gate) leave(conn net.Conn) bool {
	e, ok := g.inside[conn]
	if !ok {
		return false
	}
	delete(g.inside, conn)
	source := e.Value.(*visit).source
	l := g.sources[source]
	l.Remove(e)
	if l.Len() == 0 {
		delete(g.sources, source)
	}
	return true
}

// Len is how many connections are inside.
func (g *Gate) Len() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.inside)
}

// Closed is how many connections it has closed to let others in.
func (g *Gate) Closed() uint64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.closed
}

// oldest returns the longest visit of the source that has the most, and how many those are;
// of several such sources, the longest visit of all. One that waits for us gives way only
// where all do.
func (g *Gate) oldest() (found *visit, most int) {
	for _, l := range g.sources {
		v := patient(l)
		if l.Len() > most || l.Len() == most && v.number < found.number {
			found, most = v, l.Len()
		}
	}
	return found, most
}

// patient is the longest visit of a source that doesn't wait for us; its longest if all do.
func patient(l *list.List) *visit {
	for e := l.Front(); e != nil; e = e.Next() {
		if v := e.Value.(*visit); !v.ours {
			return v
		}
	}
	return l.Front().Value.(*visit)
}

// sourceOf is whoever may be one attacker: an address, of IPv6 the network of 64 bits
// that one host may have; zero for all that has none, as on a unix socket.
func sourceOf(addr net.Addr) netip.Prefix {
	at, err := netip.ParseAddrPort(addr.String())
	if err != nil {
		return netip.Prefix{}
	}
	bits, ip := 64, at.Addr().Unmap().WithZone("")
	if ip.Is4() {
		bits = 32
	}
	p, _ := ip.Prefix(bits) // the bits fit the address
	return p
}
