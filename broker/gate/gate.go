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
)

// A Gate holds connections by where they come from. Its methods may be called at once.
type Gate struct {
	max     int
	mu      sync.Mutex
	inside  map[net.Conn]*list.Element
	sources map[netip.Prefix]*source
	number  uint64
	closed  uint64
}

// source is the connections from one place.
type source struct {
	visits list.List // of *visit, the oldest first
	idle   int       // of them
}

type visit struct {
	conn   net.Conn
	from   netip.Prefix
	number uint64
	// busy: it doesn't give way. A Line says so.
	busy  bool
	asked *list.Element // where it stands in Line.asked
}

// New returns a gate for at most max connections.
func New(max int) *Gate {
	return &Gate{max: max, inside: map[net.Conn]*list.Element{}, sources: map[netip.Prefix]*source{}}
}

// Enter lets a connection in. It may close another.
func (g *Gate) Enter(conn net.Conn) {
	g.mu.Lock()
	crowded := g.enter(conn, sourceOf(conn.RemoteAddr()))
	g.mu.Unlock()
	if crowded != nil {
		_ = abruptly(crowded).Close()
	}
}

// enter lets a connection in, and returns the one that gave way. The caller holds the lock,
// and closes that.
func (g *Gate) enter(conn net.Conn, from netip.Prefix) (crowded net.Conn) {
	if len(g.inside) >= g.max {
		crowded = g.oldest().conn
		g.leave(crowded)
		g.closed++
	}
	if g.sources[from] == nil {
		g.sources[from] = &source{}
	}
	g.number++
	g.inside[conn] = g.sources[from].visits.PushBack(&visit{conn: conn, from: from, number: g.number})
	g.sources[from].idle++
	return crowded
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
	v := e.Value.(*visit)
	g.setBusy(v, false)
	delete(g.inside, conn)
	s := g.sources[v.from]
	s.visits.Remove(e)
	s.idle--
	if s.visits.Len() == 0 {
		delete(g.sources, v.from)
	}
	return true
}

// setBusy says whether a visit may give way. The caller holds the lock.
func (g *Gate) setBusy(v *visit, busy bool) {
	if v.busy == busy {
		return
	}
	v.busy = busy
	if busy {
		g.sources[v.from].idle--
	} else {
		g.sources[v.from].idle++
	}
}

// stays reports whether a connection is inside, and has it not give way.
func (g *Gate) stays(conn net.Conn) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	e, ok := g.inside[conn]
	if ok {
		g.setBusy(e.Value.(*visit), true)
	}
	return ok
}

// clear closes all that are inside.
func (g *Gate) clear() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for conn := range g.inside {
		g.leave(conn)
		_ = abruptly(conn).Close()
	}
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

// oldest returns the longest idle visit of the source that has the most; of several such
// sources, the longest of all. Only where all are busy one of these has to do.
func (g *Gate) oldest() *visit {
	if v := g.oldestBy(func(s *source) int { return s.idle }); v != nil {
		return v
	}
	return g.oldestBy(func(s *source) int { return s.visits.Len() })
}

func (g *Gate) oldestBy(count func(*source) int) (found *visit) {
	most := 1
	for _, s := range g.sources {
		n := count(s)
		if n < most {
			continue
		}
		if v := s.oldest(); n > most || found == nil || v.number < found.number {
			found, most = v, n
		}
	}
	return found
}

func (s *source) oldest() *visit {
	for e := s.visits.Front(); e != nil; e = e.Next() {
		if v := e.Value.(*visit); !v.busy {
			return v
		}
	}
	return s.visits.Front().Value.(*visit)
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
