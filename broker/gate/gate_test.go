package gate_test

import (
	"net"
	"sync"
	"testing"

	"github.com/dayflyhq/dayfly/broker/gate"
)

// conn comes from an address and remembers that it was closed.
type conn struct {
	net.Conn
	from   net.Addr
	mu     sync.Mutex
	closed bool
}

func (c *conn) RemoteAddr() net.Addr { return c.from }

func (c *conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	return nil
}

func (c *conn) isClosed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

func from(ip string) *conn { return &conn{from: &net.TCPAddr{IP: net.ParseIP(ip), Port: 1}} }

// The source with the most gives way, its oldest first; a host of IPv6 is one source,
// whatever addresses of its network it takes.
func TestWhoGivesWay(t *testing.T) {
	g := gate.New(4)
	first := from("192.0.2.1")
	many := []*conn{from("2001:db8::1"), from("2001:db8::2"), from("2001:db8::3")}
	g.Enter(first)
	for _, c := range many {
		g.Enter(c)
	}
	g.Enter(from("192.0.2.2"))
	if first.isClosed() || !many[0].isClosed() || many[1].isClosed() {
		t.Error("not the oldest of the largest source")
	}
	g.Leave(many[0]) // again, by its own handshake
	g.Leave(many[1])
	g.Leave(many[2])
	if g.Len() != 2 {
		t.Errorf("%d inside, want 2", g.Len())
	}
	g.Enter(from("192.0.2.3"))
	g.Enter(from("192.0.2.4"))
	if first.isClosed() {
		t.Error("closed though there was room")
	}
	g.Enter(from("192.0.2.5"))
	if !first.isClosed() {
		t.Error("of sources that have one each, the oldest gives way")
	}
}

func TestUnixIsOneSource(t *testing.T) {
	g := gate.New(1)
	a := &conn{from: &net.UnixAddr{Name: "@", Net: "unix"}}
	g.Enter(a)
	g.Enter(&conn{from: &net.UnixAddr{Name: "@", Net: "unix"}})
	if !a.isClosed() || g.Len() != 1 {
		t.Errorf("closed %v, %d inside", a.isClosed(), g.Len())
	}
}

func TestRace(t *testing.T) {
	g := gate.New(8)
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			for range 200 {
				c := from("192.0.2.1")
				g.Enter(c)
				if n := g.Len(); n > 8 {
					t.Errorf("%d inside", n)
				}
				g.Leave(c)
			}
		})
	}
	wg.Wait()
	if g.Len() != 0 {
		t.Errorf("%d inside after all left", g.Len())
	}
}

// encrypted is a connection of TLS whose peer lets its goodbye wait.
type encrypted struct{ *conn }

func (e encrypted) NetConn() net.Conn { return e.conn }

func (e encrypted) Close() error { panic("says goodbye") }

// Closing one doesn't wait for its peer: who comes next would wait too.
func TestGivesWayAtOnce(t *testing.T) {
	g := gate.New(1)
	slow := encrypted{from("192.0.2.1")}
	g.Enter(slow)
	g.Enter(from("192.0.2.2"))
	if !slow.isClosed() {
		t.Error("it stands")
	}
	if g.Leave(slow) {
		t.Error("it is still inside")
	}
}
