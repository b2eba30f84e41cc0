//go:build linux

package faults_test

import (
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"time"
)

// A proxy is a TCP path to an address, on which whoever calls it meets what a network
// does to them.
type proxy struct {
	listener net.Listener
	target   string

	mu      sync.Mutex
	random  *rand.Rand
	how     weather
	changed chan struct{} // closed when how changes
	closed  bool
	conns   map[net.Conn]struct{}
	wg      sync.WaitGroup
}

// weather is how a proxy passes things on. The zero value is the best.
type weather struct {
	name string
	// delay is how long a piece waits, at most: half of it at least.
	delay time.Duration
	// loss is the share of connections, and of pieces, at which the connection is reset;
	// in the midst of the piece.
	loss float64
	// drip passes on a byte, and the next after this time.
	drip time.Duration
	// silent passes on nothing and says nothing; connections are accepted.
	silent bool
}

var (
	clear   = weather{name: "clear"}
	delayed = weather{name: "delayed", delay: 300 * time.Millisecond}
	lossy   = weather{name: "lossy", loss: 0.2}
	byByte  = weather{name: "a byte a second", drip: time.Second}
	silent  = weather{name: "silent", silent: true}
	refused = weather{name: "reset", loss: 1}
)

// newProxy opens a path to an address.
func newProxy(t testing.TB, target string, seed uint64) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", bridgeIP+":0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{
		listener: l, target: target, random: rand.New(rand.NewPCG(seed, 1)),
		changed: make(chan struct{}), conns: map[net.Conn]struct{}{},
	}
	p.wg.Go(p.accept)
	t.Cleanup(p.close)
	return p
}

func (p *proxy) addr() string { return p.listener.Addr().String() }

// set changes the weather, for the connections that are open too.
func (p *proxy) set(w weather) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.how = w
	close(p.changed)
	p.changed = make(chan struct{})
	if w.loss == 1 {
		p.reset()
	}
}

func (p *proxy) reset() {
	for c := range p.conns {
		abort(c)
	}
}

func abort(c net.Conn) {
	if tcp, ok := c.(*net.TCPConn); ok {
		tcp.SetLinger(0) // a reset, and not an end
	}
	c.Close()
}

func (p *proxy) close() {
	p.listener.Close()
	p.mu.Lock()
	p.closed = true
	close(p.changed)
	p.changed = make(chan struct{})
	p.reset()
	p.mu.Unlock()
	p.wg.Wait()
}

func (p *proxy) accept() {
	for {
		c, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.wg.Go(func() { p.carry(c) })
	}
}

// keep remembers a connection that set and close may end; false: it ends at once.
func (p *proxy) keep(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.random.Float64() < p.how.loss {
		return false
	}
	p.conns[c] = struct{}{}
	return true
}

func (p *proxy) forget(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
}

func (p *proxy) carry(in net.Conn) {
	defer abort(in)
	if !p.keep(in) {
		return
	}
	defer p.forget(in)
	out, err := net.Dial("tcp", p.target)
	if err != nil {
		return
	}
	defer abort(out)
	if !p.keep(out) {
		return
	}
	defer p.forget(out)
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.pass(out, in)
		abort(out)
	}()
	p.pass(in, out)
	abort(in)
	<-done
}

// pass copies until either end is gone or the network takes the connection.
func (p *proxy) pass(to, from net.Conn) {
	buf := make([]byte, 16<<10)
	for {
		n, err := from.Read(buf)
		if !p.piece(to, buf[:n]) || err != nil {
			return
		}
	}
}

// piece passes on what was read at once.
func (p *proxy) piece(to net.Conn, b []byte) bool {
	waited := false
	for len(b) > 0 {
		p.mu.Lock()
		w, changed, closed := p.how, p.changed, p.closed
		lost := p.random.Float64() < w.loss
		wait := w.delay/2 + time.Duration(p.random.Float64()*float64(w.delay/2))
		part := 1 + p.random.IntN(len(b))
		p.mu.Unlock()
		switch {
		case closed:
			return false
		case w.silent:
			<-changed
			continue
		case lost:
			to.Write(b[:part-1])
			return false
		case wait > 0 && !waited:
			waited = true
			pause := time.NewTimer(wait)
			select {
			case <-changed:
			case <-pause.C:
			}
			pause.Stop()
			continue
		}
		n := len(b)
		if w.drip > 0 {
			n = 1
		}
		if _, err := to.Write(b[:n]); err != nil {
			return false
		}
		if b = b[n:]; w.drip > 0 {
			pause := time.NewTimer(w.drip)
			select {
			case <-changed:
			case <-pause.C:
			}
			pause.Stop()
		}
	}
	return true
}

// TestProxy holds each kind of weather to its name.
func TestProxy(t *testing.T) {
	echo, err := net.Listen("tcp", bridgeIP+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer echo.Close()
	go func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
	p := newProxy(t, echo.Addr().String(), 1)
	c := must(net.Dial("tcp", p.addr()))(t)
	defer c.Close()
	// send returns when what was sent is back, how long it took, and why it isn't.
	send := func(text string) (time.Duration, error) {
		start := time.Now()
		c.SetDeadline(start.Add(time.Minute))
		if _, err := io.WriteString(c, text); err != nil {
			return 0, err
		}
		back := make([]byte, len(text))
		_, err := io.ReadFull(c, back)
		if err == nil && string(back) != text {
			t.Errorf("sent %q, back came %q", text, back)
		}
		return time.Since(start), err
	}
	for _, w := range []weather{clear, delayed, byByte} {
		p.set(w)
		// Two bytes come back the second after the first, and each way has its delay.
		if took, err := send("ab"); err != nil || took < w.delay || took < w.drip {
			t.Errorf("%s: %v after %v", w.name, err, took)
		}
	}
	p.set(silent)
	c.SetDeadline(time.Now().Add(200 * time.Millisecond))
	io.WriteString(c, "cd")
	if n, err := c.Read(make([]byte, 2)); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("silent: %d bytes, %v", n, err)
	}
	p.set(clear)
	c.SetDeadline(time.Now().Add(time.Minute))
	if back := make([]byte, 2); must(io.ReadFull(c, back))(t) != 2 || string(back) != "cd" {
		t.Errorf("%q came back after the silence", back)
	}
	p.set(lossy)
	for err == nil {
		_, err = send("efgh")
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("lossy: %v", err)
	}
	p.set(refused)
	if c, err = net.Dial("tcp", p.addr()); err == nil { // the reset may come before Dial returns
		defer c.Close()
		_, err = send("i")
	}
	if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("reset: %v", err)
	}
}
