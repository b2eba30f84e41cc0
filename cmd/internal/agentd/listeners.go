package agentd

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/dayflyhq/dayfly/agent"
)

// A shelf has what the workloads listen on. One that starts anew goes on with the listeners
// of the one before: who connects meanwhile waits, and isn't refused.
type shelf struct {
	most int64 // connections of one unix socket at once
	mu   sync.Mutex
	held map[string]*shared // by address
}

// maxConnections is of one unix socket: whoever may connect, though no list lets him call,
// could have all the descriptors there are, and so take them from other workloads.
const maxConnections = 1024

func newShelf() *shelf { return &shelf{most: maxConnections, held: map[string]*shared{}} }

// unix listens on a socket, or goes on with it, with this mode and group.
func (s *shelf) unix(cfg agent.SocketConfig) (*lease, error) {
	l, err := s.take("unix:"+cfg.Path, func() (net.Listener, error) { return agent.Listen(cfg) })
	if err != nil {
		return nil, err
	}
	if l.undo, err = agent.SetAccess(l.Listener, cfg); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// tcp listens on an address, or goes on with it.
func (s *shelf) tcp(address, what string) (*lease, error) {
	return s.take("tcp:"+address, func() (net.Listener, error) {
		l, err := net.Listen("tcp", address)
		if err != nil {
			return nil, fmt.Errorf("listening for %s: %w", what, err)
		}
		return l, nil
	})
}

func (s *shelf) take(key string, listen func() (net.Listener, error)) (*lease, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	one := s.held[key]
	if one == nil {
		l, err := listen()
		if err != nil {
			return nil, err
		}
		one = &shared{Listener: l, shelf: s, key: key, conns: make(chan net.Conn), closed: make(chan struct{}), failed: make(chan struct{})}
		s.held[key] = one
		go one.accept()
	}
	one.leases++
	return &lease{shared: one, ended: make(chan struct{})}, nil
}

// shared is a listener whose connections go to whoever has a lease and accepts.
type shared struct {
	net.Listener
	shelf  *shelf
	key    string
	leases int // guarded by shelf.mu
	conns  chan net.Conn
	open   atomic.Int64  // connections of a unix socket
	closed chan struct{} // with the last lease
	failed chan struct{} // when err was set
	err    error
}

// shortOf is what passes by itself.
var shortOf = []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED, syscall.EINTR}

func (s *shared) accept() {
	for {
		conn, err := s.Listener.Accept()
		if err == nil {
			if conn = s.admit(conn); conn != nil {
				s.offer(conn)
			}
			continue
		}
		passes := false
		for _, e := range shortOf {
			passes = passes || errors.Is(err, e)
		}
		if !passes {
			s.err = err
			close(s.failed)
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// admit counts a connection of a unix socket until it is closed, and closes at once one that
// is too many.
func (s *shared) admit(conn net.Conn) net.Conn {
	unix, ok := conn.(*net.UnixConn)
	if !ok {
		return conn
	}
	if s.open.Add(1) > s.shelf.most {
		s.open.Add(-1)
		_ = conn.Close()
		return nil
	}
	return &counted{UnixConn: unix, gone: sync.OnceFunc(func() { s.open.Add(-1) })}
}

// counted is a connection that is counted. Who is at its other end can be asked as ever.
type counted struct {
	*net.UnixConn
	gone func()
}

func (c *counted) Close() error {
	defer c.gone()
	return c.UnixConn.Close()
}

// offer waits until somebody takes the connection.
func (s *shared) offer(conn net.Conn) {
	select {
	case s.conns <- conn:
	case <-s.closed:
		_ = conn.Close()
	}
}

// lease is a workload's part in a listener.
type lease struct {
	*shared
	undo  func() error // of the socket's mode and group; nil: nothing
	once  sync.Once
	ended chan struct{}
	err   error
}

// Accept returns the next connection until the lease ends.
func (l *lease) Accept() (net.Conn, error) {
	select {
	case <-l.ended:
		return nil, net.ErrClosed
	case <-l.failed:
		return nil, l.shared.err
	case conn := <-l.conns:
		select {
		case <-l.ended: // it is the next one's
			go l.offer(conn)
			return nil, net.ErrClosed
		default:
			return conn, nil
		}
	}
}

// Close ends the lease, and with the last one the listener. A second call does nothing.
func (l *lease) Close() error {
	l.once.Do(func() {
		close(l.ended)
		l.shelf.mu.Lock()
		defer l.shelf.mu.Unlock()
		if l.leases--; l.leases > 0 {
			return
		}
		delete(l.shelf.held, l.key)
		close(l.closed)
		l.err = l.Listener.Close()
	})
	return l.err
}
