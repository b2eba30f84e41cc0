package gate_test

import (
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dayflyhq/dayfly/broker/gate"
)

// arriving is a listener that tests connect to.
type arriving struct {
	conns  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

func newArriving() *arriving {
	return &arriving{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (a *arriving) Accept() (net.Conn, error) {
	select {
	case c := <-a.conns:
		return c, nil
	case <-a.closed:
		return nil, net.ErrClosed
	}
}

func (a *arriving) Close() error { a.once.Do(func() { close(a.closed) }); return nil }

func (a *arriving) Addr() net.Addr { return &net.TCPAddr{} }

// speaking is a connection whose peer says something when it is told to.
type speaking struct {
	*conn
	said chan struct{}
}

func speaks(ip string) *speaking { return &speaking{from(ip), make(chan struct{})} }

func (s *speaking) Read([]byte) (int, error) { <-s.said; return 0, nil }

// lined is a listener behind a line, and what was accepted from it.
type lined struct {
	t        *testing.T
	from     *arriving
	line     *gate.Line
	gate     *gate.Gate
	listener net.Listener

	mu       sync.Mutex
	accepted []net.Conn
}

func newLined(t *testing.T, inGate, inLine, working int) *lined {
	t.Helper()
	g := gate.New(inGate)
	l := &lined{t: t, from: newArriving(), gate: g, line: gate.NewLine(g, inLine, working)}
	l.listener = l.line.Listen(l.from)
	go func() {
		for {
			c, err := l.listener.Accept()
			if err != nil {
				return
			}
			l.mu.Lock()
			l.accepted = append(l.accepted, c)
			l.mu.Unlock()
		}
	}()
	t.Cleanup(func() { l.listener.Close() })
	return l
}

func (l *lined) come(conns ...*speaking) {
	for _, c := range conns {
		l.from.conns <- c
	}
	synctest.Wait()
}

// took wants these to have been accepted since it was last asked, in this order.
func (l *lined) took(when string, want ...*speaking) {
	l.t.Helper()
	synctest.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	got := l.accepted
	l.accepted = nil
	if len(got) != len(want) {
		l.t.Fatalf("%s: %d were accepted, want %d", when, len(got), len(want))
	}
	for i := range want {
		if got[i] != want[i] {
			l.t.Errorf("%s: number %d is another", when, i)
		}
	}
}

// Few are worked on at once, and what waits for its peer isn't among them: each source has
// its turn, and its newest comes first.
func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLined(t, 8, 8, 1)
		first := speaks("192.0.2.1")
		l.come(first)
		l.took("with nobody before it", first)
		a, b, c, other := speaks("192.0.2.1"), speaks("192.0.2.1"), speaks("192.0.2.1"), speaks("192.0.2.2")
		l.come(a, b, c, other)
		l.took("while the first is worked on")
		if n := l.line.Waiting(); n != 4 {
			t.Errorf("%d wait", n)
		}
		h := l.line.Handshake(first)
		read := make(chan struct{})
		go func() { defer close(read); _, _ = h.Read(nil) }()
		l.took("while the first waits for its peer", c)
		first.said <- struct{}{}
		synctest.Wait()
		l.line.Handshake(c).End()
		<-read // before anybody new
		l.took("when the first's peer has answered")
		h.End()
		l.took("after the first", other)
		l.line.Handshake(other).End()
		l.took("after the other source", b)
		l.line.Handshake(b).End()
		l.took("at last", a)
		l.line.Handshake(a).End()
		if n := l.line.Waiting() + l.gate.Len(); n != 0 {
			t.Errorf("%d are counted after all have ended", n)
		}
	})
}

// Who waits for us isn't closed for others: what gives way is who lets us wait, at once for
// another source, and for its own not before it had a while.
func TestWhoWaitsForUsStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLined(t, 2, 8, 3)
		slow, ours, own := speaks("192.0.2.1"), speaks("192.0.2.1"), speaks("192.0.2.1")
		l.come(slow, ours)
		l.took("in an empty gate", slow, ours)
		go func() { _, _ = l.line.Handshake(slow).Read(nil) }()
		l.come(own)
		l.took("of the source that crowds the gate")
		if slow.isClosed() {
			t.Error("closed at once for its own source")
		}
		time.Sleep(time.Second)
		l.took("after a while", own)
		if !slow.isClosed() || ours.isClosed() {
			t.Errorf("who let us wait is closed: %v, who waits for us: %v", slow.isClosed(), ours.isClosed())
		}
		close(slow.said)
		go func() { _, _ = l.line.Handshake(own).Read(nil) }()
		synctest.Wait()
		other := speaks("192.0.2.2")
		l.come(other)
		l.took("of another source", other)
		if !own.isClosed() || ours.isClosed() {
			t.Errorf("who let us wait is closed: %v, who waits for us: %v", own.isClosed(), ours.isClosed())
		}
		close(own.said)
		l.line.Handshake(ours).End()
		l.line.Handshake(other).End()
	})
}

// A full line closes the oldest of the source that has the most, and a closed one all.
func TestFullLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLined(t, 8, 3, 1)
		busy := speaks("192.0.2.1")
		l.come(busy)
		l.took("the one that is worked on", busy)
		few, a, b, more := speaks("192.0.2.2"), speaks("192.0.2.1"), speaks("192.0.2.1"), speaks("192.0.2.3")
		l.come(few, a, b)
		l.come(more)
		if few.isClosed() || !a.isClosed() || b.isClosed() || more.isClosed() {
			t.Error("not the oldest of the largest source")
		}
		if n := l.gate.Closed(); n != 1 {
			t.Errorf("%d are counted as closed", n)
		}
		if err := l.listener.Close(); err != nil {
			t.Fatal(err)
		}
		if !few.isClosed() || !b.isClosed() || !more.isClosed() || busy.isClosed() || l.line.Waiting() != 0 {
			t.Error("those in line go with their listener, and no others")
		}
	})
}

// Who has hung up while it waited costs no handshake.
func TestHungUpInLine(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := gate.New(8)
	line := gate.NewLine(g, 8, 1)
	listener := line.Listen(inner)
	defer listener.Close()
	dial := func() net.Conn {
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	waits := func(n int) {
		for line.Waiting() != n {
			time.Sleep(time.Millisecond)
		}
	}
	accept := func() net.Conn {
		c, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	dial()
	first := accept()
	stays := dial()
	waits(1)
	gone := dial()
	waits(2)
	gone.Close()
	line.Handshake(first).End()
	if c := accept(); c.RemoteAddr().String() != stays.LocalAddr().String() {
		t.Error("not the one that is still there")
	}
}
