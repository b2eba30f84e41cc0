package sandbox

import (
	"io"
	"net"
	"sync"
)

// A Link is a TCP connection path that can be cut, as a network can.
type Link struct {
	listener net.Listener
	target   string

	mu    sync.Mutex
	cut   bool
	conns map[net.Conn]struct{}
	wg    sync.WaitGroup
}

// NewLink opens a path to an address, on a port of its own on loopback.
func NewLink(target string) (*Link, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	k := &Link{listener: l, target: target, conns: map[net.Conn]struct{}{}}
	k.wg.Go(k.accept)
	return k, nil
}

// Addr is where the path begins.
func (k *Link) Addr() string { return k.listener.Addr().String() }

// Cut ends every connection and lets no new one through.
func (k *Link) Cut() { k.set(true) }

// Restore lets connections through again.
func (k *Link) Restore() { k.set(false) }

func (k *Link) set(cut bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.cut = cut
	if cut {
		for c := range k.conns {
			c.Close()
		}
	}
}

// Close ends the link.
func (k *Link) Close() {
	k.listener.Close()
	k.Cut()
	k.wg.Wait()
}

func (k *Link) accept() {
	for {
		in, err := k.listener.Accept()
		if err != nil {
			return
		}
		k.wg.Go(func() { k.carry(in) })
	}
}

func (k *Link) carry(in net.Conn) {
	defer in.Close()
	if !k.track(in) {
		return
	}
	defer k.untrack(in)
	out, err := net.Dial("tcp", k.target)
	if err != nil {
		return
	}
	defer out.Close()
	if !k.track(out) {
		return
	}
	defer k.untrack(out)
	done := make(chan struct{})
	go func() {
		defer close(done)
		io.Copy(out, in)
		out.Close()
	}()
	io.Copy(in, out)
	in.Close()
	<-done
}

func (k *Link) track(c net.Conn) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.cut {
		return false
	}
	k.conns[c] = struct{}{}
	return true
}

func (k *Link) untrack(c net.Conn) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.conns, c)
}
