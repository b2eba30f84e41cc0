package rpc_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/boltstore"
	"github.com/dayflyhq/dayfly/broker/rpc"
	"github.com/dayflyhq/dayfly/broker/storetest"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// onDisk serves a broker on a store that syncs.
func onDisk(t *testing.T) *world {
	t.Helper()
	return newWorldOn(t, func(era broker.Record) broker.Store {
		path := filepath.Join(t.TempDir(), "store.db")
		if err := boltstore.Create(path, era); err != nil {
			t.Fatal(err)
		}
		s, err := boltstore.Open(boltstore.Config{Path: path})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		return s
	})
}

// halfOpen connects n times from an address of loopback, and says at most a little.
func (w *world) halfOpen(n int, from string, say []byte) []net.Conn {
	w.t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: time.Minute}
	conns := make([]net.Conn, n)
	for i := range conns {
		c, err := d.DialContext(soon(w.t), "tcp", w.addr)
		if err != nil {
			w.t.Fatal(err)
		}
		w.t.Cleanup(func() { c.Close() })
		_, _ = c.Write(say) // the broker may have closed it for another
		conns[i] = c
	}
	return conns
}

// clientHello is the beginning of a TLS record that never ends.
var clientHello = []byte{0x16, 0x03, 0x01, 0x02, 0x00, 0x01, 0x00, 0x01, 0xfc, 0x03, 0x03}

// revokeAndHear revokes, and waits until a verifier has heard of it.
func (w *world) revokeAndHear(operator *grpc.ClientConn, verifier stream) (answered, heard time.Duration) {
	w.t.Helper()
	began := time.Now()
	r, err := dayflyv1.NewRevocationServiceClient(operator).Revoke(soon(w.t), &dayflyv1.RevokeRequest{
		Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Identity{Identity: "spiffe://example.org/stolen"}}}, Reason: "it is stolen",
	})
	if err != nil {
		w.t.Fatal(err)
	}
	answered = time.Since(began)
	for {
		m, err := verifier.Recv()
		if err != nil {
			w.t.Fatal(err)
		}
		for _, e := range m.GetEvents().GetEvents() {
			if e.GetSequence() == r.GetRevocation().GetPosition().GetSequence() {
				return answered, time.Since(began)
			}
		}
	}
}

// Whoever connects and proves nothing holds a bounded number of places, and gives way, of
// the source that has the most.
func TestHandshakeFlood(t *testing.T) {
	w := newWorldOn(t, func(era broker.Record) broker.Store { return storetest.Memory(t, era) }, grpc.ConnectionTimeout(time.Hour)) // so that nothing ends for it
	other := w.halfOpen(1, "127.0.0.3", nil)[0]
	// Which of them are the oldest to the broker is the kernel's choice, once its queue is full.
	const beyond = 100
	conns := w.halfOpen(rpc.MaxHandshakes+beyond, "127.0.0.2", clientHello)
	gaveWay := make(chan struct{}, len(conns))
	for _, c := range conns {
		_ = c.SetReadDeadline(time.Now().Add(2 * time.Minute))
		go func() {
			if _, err := c.Read(make([]byte, 1)); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				gaveWay <- struct{}{}
			}
		}()
	}
	for n := range beyond {
		select {
		case <-gaveWay:
		case <-soon(t).Done():
			t.Fatalf("%d of %d gave way", n, beyond)
		}
	}
	if c := w.srv.Connections(); c.Crowded < beyond || c.Handshaking > rpc.MaxHandshakes || c.Open != 0 {
		t.Errorf("counted: %+v", c)
	}
	_ = other.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if _, err := other.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("one of another source gave way: %v", err)
	}
	if _, err := issue(t, w.as(payments)); err != nil {
		t.Errorf("an honest caller beside them: %v", err)
	}
}

// A connection that ends makes room, over real sockets.
func TestConnectionsAreReleased(t *testing.T) {
	w := newWorld(t)
	for range 3 {
		var conns []*grpc.ClientConn
		for range 40 {
			conns = append(conns, w.as(payments))
			if _, err := issue(t, conns[len(conns)-1]); err != nil {
				t.Fatal(err)
			}
		}
		if n := w.srv.OpenConnections(); n < 40 {
			t.Fatalf("%d connections are counted of 40", n)
		}
		for _, c := range conns {
			c.Close()
		}
		for deadline := time.Now().Add(time.Minute); w.srv.OpenConnections() > 0; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%d connections are counted that were closed", w.srv.OpenConnections())
			}
		}
	}
}

// A stream that pings as fast as it can gets answers at a bounded rate, and what it does
// beyond that waits: it isn't cut off, and others aren't held up.
func TestPingFlood(t *testing.T) {
	w := onDisk(t)
	flood, honest := w.follow(w.as(payments), subscription()), w.follow(w.as(spiffeid.RequireFromString("spiffe://example.org/web")), subscription())
	ctx, cancel := context.WithCancel(soon(t))
	defer cancel()
	var sending sync.WaitGroup
	sending.Go(func() {
		for ctx.Err() == nil && flood.Send(ping("nonce-00")) == nil {
		}
	})
	began := time.Now()
	const extra = 50
	for range rpc.PingBurst + extra {
		if _, err := flood.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	if took, least := time.Since(began), (extra-1)*rpc.PingGap; took < least {
		t.Errorf("%d answers in %v, want at least %v", rpc.PingBurst+extra, took, least)
	}
	if err := honest.Send(ping("nonce-01")); err != nil {
		t.Fatal(err)
	}
	if m, err := honest.Recv(); err != nil || string(m.GetPong().GetNonce()) != "nonce-01" {
		t.Errorf("beside a flood: %v, %v", m, err)
	}
	cancel()
	w.srv.Stop() // the flood ends with its stream
	sending.Wait()
}

// Streams that never read, however many, cost others nothing.
func TestStreamsThatNeverRead(t *testing.T) {
	w := onDisk(t)
	for _, id := range []spiffeid.ID{payments, spiffeid.RequireFromString("spiffe://example.org/web")} {
		conn := w.as(id)
		for i := range 150 {
			sub := subscription()
			sub.Instance = fmt.Sprintf("instance-%04d", i)
			s := w.open(conn)
			if err := s.Send(subscribe(sub)); err != nil {
				t.Fatal(err)
			}
			for range 20 { // whose answers nobody reads
				if err := s.Send(ping("nonce-01")); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	verifier := w.follow(w.as(spiffeid.RequireFromString("spiffe://example.org/orders")), subscription())
	answered, heard := w.revokeAndHear(w.as(spiffeid.RequireFromString("spiffe://example.org/ops/ada")), verifier)
	t.Logf("a revoke beside 300 streams that don't read: answered in %v, heard in %v", answered, heard)
}

// A revoke goes out, from an operator who connects only now, while 256 callers ask for
// credentials as fast as they can and 2,000 connections, which come again when they are
// closed, prove nothing.
func TestRevokeUnderFlood(t *testing.T) {
	w := onDisk(t)
	verifier := w.follow(w.as(spiffeid.RequireFromString("spiffe://example.org/orders")), subscription())
	ctx, cancel := context.WithCancel(context.Background())
	var (
		load   sync.WaitGroup
		issued atomic.Int64
	)
	defer load.Wait()
	defer cancel()
	for range 16 {
		tokens := dayflyv1.NewTokenServiceClient(w.as(payments))
		for range 16 {
			load.Go(func() {
				for ctx.Err() == nil {
					if _, err := tokens.Issue(ctx, &dayflyv1.IssueRequest{Audience: "orders"}); err == nil {
						issued.Add(1)
					}
				}
			})
		}
	}
	w.halfOpen(1000, "127.0.0.2", nil)
	w.halfOpen(1000, "127.0.0.1", clientHello) // where the operator comes from, too
	load.Go(func() {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP("127.0.0.2")}}
		for ctx.Err() == nil {
			if c, err := d.DialContext(ctx, "tcp", w.addr); err == nil {
				context.AfterFunc(ctx, func() { c.Close() })
				time.Sleep(time.Millisecond)
			}
		}
	})
	for issued.Load() < 1000 { // the load is on; soon bounds what follows
		time.Sleep(time.Millisecond)
	}
	answered, heard := w.revokeAndHear(w.as(spiffeid.RequireFromString("spiffe://example.org/ops/ada")), verifier)
	t.Logf("a revoke under flood: answered in %v, heard in %v, %d credentials issued meanwhile", answered, heard, issued.Load())
}

// A frame that announces 16 MiB ends its connection before it is read; beside it, others
// go on.
func TestOversizedFrame(t *testing.T) {
	w := newWorld(t)
	cfg := w.config(w.svid(payments, spiffetest.SVIDOptions{}))
	cfg.NextProtos = []string{"h2"}
	c, err := (&tls.Dialer{Config: cfg}).DialContext(soon(t), "tcp", w.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	settings := []byte{0, 0, 0, 4, 0, 0, 0, 0, 0}
	data := []byte{0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1} // DATA of 2^24-1 bytes on stream 1
	for _, b := range [][]byte{[]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), settings, data} {
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	_ = c.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the connection stands")
	}
	if _, err := issue(t, w.as(payments)); err != nil {
		t.Error(err)
	}
}

// A thousand streams, of a hundred identities that each keep to their bounds, and that
// nobody reads: a revoke reaches who does, and what they held is let go of.
func TestStreamsOfManyIdentities(t *testing.T) {
	const identities, streams = 100, 10
	w := onDisk(t)
	conns := make([]*grpc.ClientConn, identities)
	var opening sync.WaitGroup
	for i := range conns {
		conns[i] = w.as(spiffeid.RequireFromString(fmt.Sprintf("spiffe://example.org/fleet/%d", i)))
		opening.Go(func() {
			for n := range streams {
				sub := subscription()
				sub.Instance = fmt.Sprintf("instance-%04d", n)
				s, err := dayflyv1.NewFeedServiceClient(conns[i]).Follow(t.Context())
				if err == nil {
					err = s.Send(subscribe(sub))
				}
				if err == nil {
					_, err = s.Recv() // its Welcome, and nothing more
				}
				if err != nil {
					t.Errorf("stream %d of %d: %v", n, i, err)
				}
			}
		})
	}
	opening.Wait()
	if c := w.srv.Connections(); c != (rpc.ConnectionCounts{Open: identities}) {
		t.Errorf("with all of them: %+v", c)
	}
	verifier := w.follow(w.as(spiffeid.RequireFromString("spiffe://example.org/orders")), subscription())
	answered, heard := w.revokeAndHear(w.as(spiffeid.RequireFromString("spiffe://example.org/ops/ada")), verifier)
	t.Logf("a revoke beside %d streams that nobody reads: answered in %v, heard in %v", identities*streams, answered, heard)
	for _, c := range conns {
		c.Close()
	}
	for deadline := time.Now().Add(time.Minute); w.srv.Connections().Open > 2; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%+v after they were closed", w.srv.Connections())
		}
	}
}

// trickle is a connection that passes a byte at a time, each a while after the last.
type trickle struct {
	net.Conn
	gap  time.Duration
	slow *atomic.Bool
}

func (c *trickle) Read(p []byte) (int, error) {
	if c.slow.Load() && len(p) > 1 {
		time.Sleep(c.gap)
		p = p[:1]
	}
	return c.Conn.Read(p)
}

func (c *trickle) Write(p []byte) (n int, err error) {
	for len(p) > 0 && c.slow.Load() {
		time.Sleep(c.gap)
		m, err := c.Conn.Write(p[:1])
		if n, p = n+m, p[m:]; err != nil {
			return n, err
		}
	}
	m, err := c.Conn.Write(p)
	return n + m, err
}

// Peers that pass a byte at a time cost others nothing: those that do so in the handshake
// are closed when its time is over, those that do so in their stream only wait themselves.
func TestByteAtATime(t *testing.T) {
	w := newWorldOn(t, func(era broker.Record) broker.Store { return storetest.Memory(t, era) }, grpc.ConnectionTimeout(time.Second))
	const peers = 20
	follow := func(path string, slow *atomic.Bool) (stream, error) {
		cfg := w.config(w.svid(spiffeid.RequireFromString("spiffe://example.org/"+path), spiffetest.SVIDOptions{}))
		conn, err := grpc.NewClient("passthrough:///"+w.addr, grpc.WithTransportCredentials(credentials.NewTLS(cfg)),
			grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
				c, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
				return &trickle{c, 5 * time.Millisecond, slow}, err
			}))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		s, err := dayflyv1.NewFeedServiceClient(conn).Follow(t.Context())
		if err == nil {
			err = s.Send(subscribe(subscription()))
		}
		if err == nil {
			_, err = s.Recv()
		}
		return s, err
	}
	var waiting sync.WaitGroup
	ended := make(chan error, peers)
	for i := range peers {
		waiting.Go(func() {
			var slow atomic.Bool
			slow.Store(true)
			_, err := follow(fmt.Sprintf("handshake/%d", i), &slow)
			ended <- err
		})
		var slow atomic.Bool
		if _, err := follow(fmt.Sprintf("stream/%d", i), &slow); err != nil {
			t.Fatal(err)
		}
		slow.Store(true)
	}
	verifier := w.follow(w.as(spiffeid.RequireFromString("spiffe://example.org/orders")), subscription())
	answered, heard := w.revokeAndHear(w.as(spiffeid.RequireFromString("spiffe://example.org/ops/ada")), verifier)
	t.Logf("a revoke beside %d peers of a byte at a time: answered in %v, heard in %v", 2*peers, answered, heard)
	for range peers {
		select {
		case err := <-ended:
			if err == nil {
				t.Error("a handshake of a byte at a time came through")
			}
		case <-soon(t).Done():
			t.Fatal("a handshake of a byte at a time isn't ended")
		}
	}
	waiting.Wait()
}
