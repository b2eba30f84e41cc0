// Package hop is what the agent's proxies have in common: how headers are named and
// spoofed, how many connections a listener has, and how a no is said to a caller who is
// still sending.
package hop

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

// MaxConnections is how many connections a listener has at a time, if nothing else is said.
const MaxConnections = 4096

// refusedWithin is how long one that is refused may go on to send its body, or not to read.
var refusedWithin = 5 * time.Second

// Fold is a header's name as CGI, WSGI and their like make a variable of it: whatever is no
// letter or digit is one and the same.
func Fold(name string) string {
	return strings.Map(func(c rune) rune {
		if 'a' <= c && c <= 'z' || '0' <= c && c <= '9' {
			return c
		}
		return '-'
	}, strings.ToLower(name))
}

// Identifies reports whether a header, by its folded name, says who makes a request, or for
// whom it is passed on: only the proxy that was asked last may say that.
func Identifies(folded string) bool {
	switch folded {
	case "forwarded", "x-real-ip", "client-cert", "client-cert-chain": // RFC 7239, nginx, RFC 9440
		return true
	}
	return strings.HasPrefix(folded, "x-forwarded-") || strings.HasPrefix(folded, "x-dayfly-")
}

// IsGRPC reports whether a request is a call of gRPC's, which wants its refusal in its own
// form.
func IsGRPC(r *http.Request) bool {
	kind, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	return r.ProtoMajor >= 2 && (kind == "application/grpc" || strings.HasPrefix(kind, "application/grpc+"))
}

// TrailersOnly makes an answer of gRPC's that is nothing but a status end with it. The head
// may be sent before it is known that nothing follows, and a status in it would be lost.
func TrailersOnly(resp *http.Response) {
	if resp.ProtoMajor != 2 || len(resp.Header["Grpc-Status"]) == 0 {
		return
	}
	resp.Trailer = http.Header{}
	for name, values := range resp.Header {
		if name != "Content-Type" && name != "Date" {
			resp.Trailer[name] = values
			delete(resp.Header, name)
		}
	}
}

// GRPCMessage is the percent-encoding of grpc-message.
func GRPCMessage(s string) string {
	var b strings.Builder
	for _, c := range []byte(s) {
		if c < ' ' || c > '~' || c == '%' {
			fmt.Fprintf(&b, "%%%02X", c)
			continue
		}
		b.WriteByte(c)
	}
	return b.String()
}

// Refusing must be called before a refusal is written. Over HTTP/1 the server would first
// wait for the body, for as long as its sender likes.
func Refusing(w http.ResponseWriter, r *http.Request) {
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(refusedWithin))
	if r.ProtoMajor == 1 && r.ContentLength != 0 {
		w.Header().Set("Connection", "close") // so it doesn't, and what is left is no request
	}
}

// Ends makes a context's end the end of what is written to a caller who doesn't read, too,
// and of what is read from one who doesn't write, on a connection that was upgraded: what
// waits for that doesn't look at the context. A refusal still has time. The handler calls
// the function when it is done.
func Ends(ctx context.Context, w http.ResponseWriter) (done func()) {
	c := http.NewResponseController(w)
	set := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(set)
		last := time.Now().Add(refusedWithin)
		_, _ = c.SetWriteDeadline(last), c.SetReadDeadline(last)
	})
	return func() {
		if !stop() {
			<-set // the server begins the next request without it
		}
	}
}

type connKey struct{}

// Conn is the connection of a request, from the context of one whose server is limited.
func Conn(ctx context.Context) net.Conn { return ctx.Value(connKey{}).(net.Conn) }

// limit is how many connections a server has at a time.
type limit struct {
	max int

	mu  sync.Mutex
	all map[net.Conn]http.ConnState
}

// Limit lets a server, which is set up but for this and doesn't run yet, have max connections
// at most. One more closes one that waits for its next request, or else is closed itself: to
// take none would leave the callers hanging, and to take all would leave the agent without
// files to open.
func Limit(s *http.Server, max int) {
	l := &limit{max: max, all: map[net.Conn]http.ConnState{}}
	next := s.Handler
	s.ConnState = l.note
	s.ConnContext = func(ctx context.Context, conn net.Conn) context.Context {
		return context.WithValue(ctx, connKey{}, conn)
	}
	s.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer l.ended(Conn(r.Context()))
		next.ServeHTTP(w, r)
	})
}

func (l *limit) note(conn net.Conn, state http.ConnState) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if state == http.StateClosed {
		delete(l.all, conn)
		return
	}
	l.all[conn] = state
	if state != http.StateNew || len(l.all) <= l.max {
		return
	}
	for c, s := range l.all {
		if s == http.StateIdle {
			delete(l.all, c)
			go func() { _ = c.Close() }() // that of TLS may wait for its peer
			return
		}
	}
	delete(l.all, conn)
	_ = conn.Close() // before anything is read of it
}

// ended forgets a connection that became something else, when that has ended too: the server
// doesn't hear of it.
func (l *limit) ended(conn net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all[conn] == http.StateHijacked {
		delete(l.all, conn)
	}
}
