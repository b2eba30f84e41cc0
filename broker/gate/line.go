package gate

import (
	"container/list"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// patience is what a peer gets that has to answer us before it may have to give way. It is
// for hosts that are busy, as one is whose whole fleet comes back at once.
const patience = 2 * time.Second

// silence is how long a connection may say nothing, where nobody wants its place.
const silence = time.Minute

// Pace says how many handshakes go on at once: those beyond it wait in line.
type Pace struct {
	// Working is how many are worked on.
	Working int
	// Asked is how many peers have an answer of ours that they must answer, those aside
	// that have taken longer than two seconds. Peers that say nothing aren't bounded by it:
	// they cost little, and whoever comes next takes their place.
	Asked int
}

// A Line is where connections wait for their handshake to begin. A whole fleet may come back
// in one second, and handshakes that were all begun at once would all end late, when their
// peers have given up. So a connection stands in line once its peer has spoken, few are
// worked on at a time, and of those whose peer is waited for again only the slow have to give
// way in the gate. Each source has its turn, and its newest comes first, since that one's
// peer has the most patience left. Too many close the oldest that has said nothing, of the
// source that has the most. Its methods may be called at once.
type Line struct {
	hall *Gate // those before the gate: idle until they have spoken
	gate *Gate // its lock is the line's, too, and taken before the hall's
	pace Pace

	sources map[netip.Prefix]*list.Element // of turns
	turns   list.List                      // of *queue, none empty
	working int
	resume  []chan struct{} // handshakes whose peers have answered: before any new one
	asked   list.List       // of *asking, the oldest first
	changed chan struct{}   // has a token when one more may begin, perhaps
}

// asking is a handshake whose peer must answer.
type asking struct {
	*visit
	since time.Time
}

// queue is the connections of one source that have spoken, the oldest first.
type queue struct {
	source netip.Prefix
	conns  []net.Conn
}

// NewLine returns a line before a gate, for at most max that wait.
func NewLine(g *Gate, max int, p Pace) *Line {
	return &Line{hall: New(max), gate: g, pace: p, sources: map[netip.Prefix]*list.Element{}, changed: make(chan struct{}, 1)}
}

// Waiting is how many connections wait for their handshake to begin.
func (l *Line) Waiting() int { return l.hall.Len() }

// Closed is how many it has closed to let others in.
func (l *Line) Closed() uint64 { return l.hall.Closed() }

// Listen returns a listener whose connections have waited in line. Whoever accepts one calls
// Handshake with it. It has one caller of Accept.
func (l *Line) Listen(from net.Listener) net.Listener {
	out := &listener{Listener: from, line: l, failed: make(chan error), closed: make(chan struct{})}
	go out.queue()
	return out
}

type listener struct {
	net.Listener
	line   *Line
	failed chan error
	once   sync.Once
	closed chan struct{}
}

// queue lets in whoever comes, until the listener is closed.
func (l *listener) queue() {
	for {
		conn, err := l.Listener.Accept()
		if err == nil {
			l.line.join(conn)
			continue
		}
		select {
		case l.failed <- err: // whoever accepts paces what follows, or closes
		case <-l.closed:
			return
		}
	}
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		conn, wait := l.line.next()
		if conn != nil {
			return conn, nil
		}
		var due <-chan time.Time
		if wait > 0 {
			due = time.After(wait)
		}
		select {
		case <-l.line.changed:
		case <-due:
		case err := <-l.failed:
			return nil, err
		case <-l.closed:
			return nil, net.ErrClosed
		}
	}
}

// Close closes those that wait, too.
func (l *listener) Close() error {
	err := l.Listener.Close()
	l.once.Do(func() { close(l.closed) })
	l.line.hall.clear()
	return err
}

// join takes a connection, and has it stand in line as soon as its peer has spoken.
func (l *Line) join(conn net.Conn) {
	from := sourceOf(conn.RemoteAddr())
	l.gate.mu.Lock()
	l.sweep(from)
	l.hall.mu.Lock()
	crowded := l.hall.enter(conn, from)
	l.hall.mu.Unlock()
	if crowded != nil {
		l.forget(crowded)
	}
	l.gate.mu.Unlock()
	if crowded != nil {
		_ = crowded.Close()
	}
	_ = conn.SetReadDeadline(time.Now().Add(silence))
	go func() {
		if speaks(conn) {
			l.stand(conn)
		} else if l.hall.Leave(conn) {
			_ = conn.Close()
		}
	}()
}

// sweep closes the oldest of a source that have hung up, where one is going to be closed for
// another: better one that is gone. The caller holds the lock.
func (l *Line) sweep(from netip.Prefix) {
	for l.hall.Len() >= l.hall.max {
		source, ok := l.sources[from]
		if !ok {
			return
		}
		oldest := source.Value.(*queue).conns[0]
		if !hungUp(oldest) {
			return
		}
		l.remove(source, 0)
		l.hall.Leave(oldest)
		_ = oldest.Close()
	}
}

// stand puts a connection in line.
func (l *Line) stand(conn net.Conn) {
	g := l.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	if !l.hall.stays(conn) {
		return // it gave way
	}
	from := sourceOf(conn.RemoteAddr())
	if l.sources[from] == nil {
		l.sources[from] = l.turns.PushBack(&queue{source: from})
	}
	q := l.sources[from].Value.(*queue)
	q.conns = append(q.conns, conn)
	l.wake()
}

// take takes the newest connection of a source out of the line. The caller holds the lock.
func (l *Line) take(source *list.Element) net.Conn {
	q := source.Value.(*queue)
	conn := q.conns[len(q.conns)-1]
	l.remove(source, len(q.conns)-1)
	l.hall.Leave(conn)
	return conn
}

// forget takes a connection that gave way out of the line, if it stands there. The caller
// holds the lock.
func (l *Line) forget(conn net.Conn) {
	source, ok := l.sources[sourceOf(conn.RemoteAddr())]
	if !ok {
		return
	}
	if i := slices.Index(source.Value.(*queue).conns, conn); i >= 0 {
		l.remove(source, i)
	}
}

func (l *Line) remove(source *list.Element, i int) {
	q := source.Value.(*queue)
	if q.conns = slices.Delete(q.conns, i, i+1); len(q.conns) == 0 {
		l.turns.Remove(source)
		delete(l.sources, q.source)
	}
}

// next lets in whose turn it is, to be worked on; nil where none may come now, but one may
// after so long, or if it is 0 when something changes.
func (l *Line) next() (conn net.Conn, wait time.Duration) {
	g := l.gate
	g.mu.Lock()
	var closing []net.Conn
	for l.turns.Len() > 0 && l.working < l.pace.Working && len(l.resume) == 0 {
		if wait = l.overdue(); wait > 0 {
			break
		}
		first := l.turns.Front()
		l.turns.MoveToBack(first)
		c := l.take(first)
		if hungUp(c) {
			closing = append(closing, c)
			continue
		}
		if crowded := g.enter(c, first.Value.(*queue).source); crowded != nil {
			closing = append(closing, abruptly(crowded))
		}
		g.setBusy(g.inside[c].Value.(*visit), true)
		l.working++
		conn = c
		break
	}
	g.mu.Unlock()
	for _, c := range closing {
		_ = c.Close()
	}
	return conn, wait
}

// overdue lets peers give way that took too long to answer, and returns how long it takes
// until the next one did; 0 if fewer must answer than may. The caller holds the lock.
func (l *Line) overdue() time.Duration {
	for l.asked.Len() >= l.pace.Asked {
		a := l.asked.Front().Value.(*asking)
		if since := time.Since(a.since); since < patience {
			return patience - since
		}
		l.answered(a.visit)
		l.gate.setBusy(a.visit, false)
	}
	return 0
}

// answered: the peer of a visit needn't answer any more. The caller holds the lock.
func (l *Line) answered(v *visit) {
	if v.asked != nil {
		l.asked.Remove(v.asked)
		v.asked = nil
	}
}

// speaks returns true once the peer of a connection has said something, and false if it
// closes the connection instead, or says nothing.
func speaks(conn net.Conn) (yes bool) {
	raw := rawOf(conn)
	if raw == nil {
		return true // there is no telling
	}
	_ = raw.Read(func(fd uintptr) (done bool) {
		var b [1]byte
		n, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		if err == unix.EAGAIN {
			return false
		}
		yes = err == nil && n > 0
		return true
	})
	return yes
}

// hungUp reports whether the peer of a connection has closed it: its handshake would be
// for nobody.
func hungUp(conn net.Conn) (gone bool) {
	raw := rawOf(conn)
	if raw == nil {
		return false
	}
	_ = raw.Control(func(fd uintptr) {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}, 0)
		gone = err == nil && n > 0
	})
	return gone
}

func rawOf(conn net.Conn) syscall.RawConn {
	c, ok := conn.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return nil
	}
	return raw
}

// wake has Accept look again. The caller holds the lock, or a token is there already.
func (l *Line) wake() {
	select {
	case l.changed <- struct{}{}:
	default:
	}
}

// Handshake returns a connection that was accepted, for the handshake to be made over it,
// which ends with End.
func (l *Line) Handshake(conn net.Conn) *Handshake {
	l.gate.mu.Lock()
	_, inLine := l.gate.inside[conn]
	l.gate.mu.Unlock()
	if !inLine { // it came past the line
		l.gate.Enter(conn)
		l.resumed(conn)
	}
	return &Handshake{Conn: conn, line: l}
}

// A Handshake is a connection in its handshake. While it waits for its peer, others are
// worked on.
type Handshake struct {
	net.Conn
	line  *Line
	ended bool // set before anybody else reads
	asked bool // it was written to since it was last read
}

func (h *Handshake) Write(b []byte) (int, error) {
	h.asked = true
	return h.Conn.Write(b)
}

func (h *Handshake) Read(b []byte) (int, error) {
	if h.ended {
		return h.Conn.Read(b)
	}
	h.line.rests(h.Conn, h.asked)
	h.asked = false
	n, err := h.Conn.Read(b)
	h.line.resumed(h.Conn)
	return n, err
}

// End takes the connection out of the gate: it has proved who it is, or is closed.
func (h *Handshake) End() {
	h.ended = true
	h.line.rests(h.Conn, false)
	h.line.leave(h.Conn)
}

func (l *Line) leave(conn net.Conn) {
	g := l.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	if e, ok := g.inside[conn]; ok {
		l.answered(e.Value.(*visit))
		g.leave(conn)
		l.wake()
	}
}

// rests lets another be worked on, until the peer has spoken, which it must do if it was
// asked.
func (l *Line) rests(conn net.Conn, asked bool) {
	l.gate.mu.Lock()
	defer l.gate.mu.Unlock()
	if e, ok := l.gate.inside[conn]; ok {
		v := e.Value.(*visit)
		if asked && v.asked == nil {
			v.asked = l.asked.PushBack(&asking{v, time.Now()})
		}
		l.gate.setBusy(v, v.asked != nil)
	}
	if len(l.resume) > 0 {
		close(l.resume[0])
		l.resume = l.resume[1:]
		return
	}
	l.working--
	l.wake()
}

// resumed returns when a handshake is worked on again.
func (l *Line) resumed(conn net.Conn) {
	l.gate.mu.Lock()
	if e, ok := l.gate.inside[conn]; ok {
		l.gate.setBusy(e.Value.(*visit), true)
	}
	if l.working < l.pace.Working {
		l.working++
		l.gate.mu.Unlock()
		return
	}
	turn := make(chan struct{})
	l.resume = append(l.resume, turn)
	l.gate.mu.Unlock()
	<-turn
}
