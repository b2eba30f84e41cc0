package gate_test

import (
	"net"
	"slices"
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

func (s *speaking) SetReadDeadline(time.Time) error { return nil }

func (s *speaking) Write([]byte) (int, error) { return 0, nil }

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

func newLined(t *testing.T, inGate, inLine int, pace gate.Pace) *lined {
	t.Helper()
	g := gate.New(inGate)
	l := &lined{t: t, from: newArriving(), gate: g, line: gate.NewLine(g, inLine, pace)}
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
		synctest.Wait()
	}
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
		l := newLined(t, 8, 8, gate.Pace{Working: 1, Asked: 8})
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

// Who waits for us, or has just been asked, isn't closed for others: what gives way is who
// is silent, or has let us wait for long.
func TestWhoWaitsForUsStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLined(t, 3, 8, gate.Pace{Working: 3, Asked: 3})
		ours, asked, silent, one, two := speaks("192.0.2.1"), speaks("192.0.2.1"), speaks("192.0.2.1"), speaks("192.0.2.1"), speaks("192.0.2.1")
		gone := func(want ...*speaking) {
			t.Helper()
			for i, c := range []*speaking{ours, asked, silent, one, two} {
				if c.isClosed() != slices.Contains(want, c) {
					t.Errorf("connection %d is closed: %v", i, c.isClosed())
				}
			}
		}
		waitFor := func(c *speaking, ask bool) {
			h := l.line.Handshake(c)
			if ask {
				_, _ = h.Write(nil)
			}
			go func() { _, _ = h.Read(nil); h.End() }()
		}
		l.come(ours)
		l.come(asked)
		waitFor(asked, true)
		l.come(silent)
		waitFor(silent, false)
		l.took("in an empty gate", ours, asked, silent)
		l.come(one)
		l.took("with a silent one inside", one)
		gone(silent)
		waitFor(one, false)
		time.Sleep(time.Minute)
		l.come(two)
		l.took("with a silent one, and one that lets us wait", two)
		gone(silent, one)
		for _, c := range []*speaking{asked, silent, one} {
			close(c.said)
		}
		l.line.Handshake(ours).End()
		l.line.Handshake(two).End()
	})
}

// So many peers may have to answer us, and who takes too long isn't counted, and gives way.
func TestAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLined(t, 2, 8, gate.Pace{Working: 2, Asked: 1})
		slow, next, last := speaks("192.0.2.1"), speaks("192.0.2.1"), speaks("192.0.2.2")
		l.come(slow)
		l.took("the first", slow)
		h := l.line.Handshake(slow)
		_, _ = h.Write(nil)
		read := make(chan struct{})
		go func() { defer close(read); _, _ = h.Read(nil); h.End() }()
		synctest.Wait()
		l.come(next)
		l.took("while a peer must answer")
		time.Sleep(time.Minute)
		l.took("after a while", next)
		l.come(last)
		l.took("while there is one that took too long", last)
		if !slow.isClosed() || next.isClosed() {
			t.Errorf("the slow one is closed: %v, who waits for us: %v", slow.isClosed(), next.isClosed())
		}
		l.line.Handshake(next).End()
		l.line.Handshake(last).End()
		close(slow.said)
		<-read
		if n := l.gate.Len(); n != 0 {
			t.Errorf("%d are inside after all have ended", n)
		}
	})
}

// A full line closes the oldest of the source that has the most, and a closed one all.
func TestFullLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLined(t, 8, 3, gate.Pace{Working: 1, Asked: 8})
		busy := speaks("192.0.2.1")
		l.come(busy)
		l.took("the one that is worked on", busy)
		few, a, b, more := speaks("192.0.2.2"), speaks("192.0.2.1"), speaks("192.0.2.1"), speaks("192.0.2.3")
		l.come(few, a, b)
		l.come(more)
		if few.isClosed() || !a.isClosed() || b.isClosed() || more.isClosed() {
			t.Error("not the oldest of the largest source")
		}
		if n := l.line.Closed(); n != 1 {
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

// Who has said nothing, or hung up while it waited, costs no handshake.
func TestHungUpInLine(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := gate.New(8)
	line := gate.NewLine(g, 8, gate.Pace{Working: 1, Asked: 8})
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
	hello := func(c net.Conn) net.Conn {
		if _, err := c.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		return c
	}
	hello(dial())
	first := accept()
	silent, stays := dial(), hello(dial())
	waits(2)
	gone := hello(dial())
	waits(3)
	gone.Close()
	line.Handshake(first).End()
	second := accept()
	if c := second; c.RemoteAddr().String() != stays.LocalAddr().String() {
		t.Error("not the one that is still there")
	}
	waits(1)
	silent.Close()
	waits(0)

	// A full line: one that is gone makes room, and not one that is only silent.
	full := make([]net.Conn, 0, 8)
	for range 7 {
		full = append(full, hello(dial()))
	}
	waits(7)
	dial()
	waits(8)
	full[0].Close()
	full = append(full, hello(dial()))
	line.Handshake(second).End()
	for range full[1:] {
		line.Handshake(accept()).End()
	}
	waits(1)
	if n := line.Closed(); n != 0 {
		t.Errorf("%d gave way", n)
	}
}
