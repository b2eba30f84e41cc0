//go:build linux

package soak_test

import (
	"net"
	"sync"
)

// A path is a TCP connection path on which things get lost.
type path struct {
	listener net.Listener
	target   string

	mu      sync.Mutex
	stalled bool
	deaf    bool
	refused bool
	changed chan struct{} // closed when one of these changes
	conns   map[*carried]struct{}
	wg      sync.WaitGroup
}

// carried is a connection and its other half.
type carried struct {
	in, out   net.Conn
	forgotten bool // guarded by path.mu
}

func newPath(target string) (*path, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &path{listener: l, target: target, changed: make(chan struct{}), conns: map[*carried]struct{}{}}
	p.wg.Go(p.accept)
	return p, nil
}

func (p *path) addr() string { return p.listener.Addr().String() }

// stall has nothing pass, and nobody told, until it is ended.
func (p *path) stall(on bool) { p.set(&p.stalled, on) }

// deafen has nothing come back, until it is ended: what is asked is done, and nobody
// hears of it.
func (p *path) deafen(on bool) { p.set(&p.deaf, on) }

func (p *path) set(what *bool, on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	*what = on
	close(p.changed)
	p.changed = make(chan struct{})
}

// refuse resets what is open and refuses what comes, until it is ended.
func (p *path) refuse(on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refused = on
	if on {
		p.end()
	}
}

// forget loses the connections that are open, as a box between that was restarted does:
// whatever is sent on them vanishes, and neither end is told. New ones are as ever.
func (p *path) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		c.forgotten = true
	}
}

func (p *path) end() {
	for c := range p.conns {
		abort(c.in)
		abort(c.out)
	}
}

func abort(c net.Conn) {
	if tcp, ok := c.(*net.TCPConn); ok {
		tcp.SetLinger(0) // a reset, and not an end
	}
	c.Close()
}

func (p *path) close() {
	p.listener.Close()
	p.stall(false)
	p.deafen(false)
	p.refuse(true)
	p.wg.Wait()
}

func (p *path) accept() {
	for {
		in, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.wg.Go(func() { p.carry(in) })
	}
}

func (p *path) carry(in net.Conn) {
	defer abort(in)
	out, err := net.Dial("tcp", p.target)
	if err != nil {
		return
	}
	defer abort(out)
	c := &carried{in: in, out: out}
	p.mu.Lock()
	refused := p.refused
	if !refused {
		p.conns[c] = struct{}{}
	}
	p.mu.Unlock()
	if refused {
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.pass(c, out, in)
		abort(out)
	}()
	p.pass(c, in, out)
	abort(in)
	<-done
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
}

// pass copies until either end is gone.
func (p *path) pass(c *carried, to, from net.Conn) {
	buf := make([]byte, 16<<10)
	for {
		n, err := from.Read(buf)
		if forgotten := p.wait(c, from == c.out); err != nil {
			return
		} else if forgotten {
			continue
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}

// wait waits while the path is stalled in a direction, and reports whether it has
// forgotten the connection.
func (p *path) wait(c *carried, back bool) bool {
	for {
		p.mu.Lock()
		stalled, changed, forgotten := p.stalled || back && p.deaf, p.changed, c.forgotten
		p.mu.Unlock()
		if !stalled {
			return forgotten
		}
		<-changed
	}
}
