package outgoing_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/agent/outgoing"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// TestStreams: what an upstream sends comes at once, while the request is still being sent,
// over both versions of HTTP, with its trailers, and a caller who goes ends it.
func TestStreams(t *testing.T) {
	w := newWorld(t)
	here, gone := make(chan struct{}, 2), make(chan struct{}, 2)
	at := w.upstream(orders, func(rw http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(rw).EnableFullDuplex()
		rw.Header().Set("Trailer", "X-Sum")
		lines := bufio.NewScanner(r.Body)
		for lines.Scan() {
			fmt.Fprintln(rw, "got", lines.Text())
			_ = http.NewResponseController(rw).Flush()
		}
		if r.URL.Path == "/wait" {
			here <- struct{}{}
			<-r.Context().Done()
			gone <- struct{}{}
			return
		}
		rw.Header().Set("X-Sum", "7")
	})
	p := w.start(false, outgoing.Listener{Upstreams: []outgoing.Upstream{to(at)}})
	for _, http2 := range []bool{false, true} {
		c := p.client(http2)
		body, send := io.Pipe()
		go func() { fmt.Fprintln(send, "first") }()
		resp, err := c.Post("http://x/", "", body)
		if err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewReader(resp.Body)
		for _, next := range []string{"second", "third", ""} {
			line, err := lines.ReadString('\n')
			if err != nil || !strings.HasPrefix(line, "got ") {
				t.Fatalf("http2 %v: %q %v", http2, line, err)
			}
			if next == "" {
				_ = send.Close()
			} else {
				fmt.Fprintln(send, next)
			}
		}
		if rest, err := io.ReadAll(lines); err != nil || len(rest) != 0 || resp.Trailer.Get("X-Sum") != "7" {
			t.Errorf("http2 %v: %q %v, trailer %q", http2, rest, err, resp.Trailer)
		}
		ctx, cancel := context.WithCancel(t.Context())
		req, err := http.NewRequestWithContext(ctx, "GET", "http://x/wait", nil)
		if err != nil {
			t.Fatal(err)
		}
		go func() { <-here; cancel() }()
		_, _ = c.Do(req)
		select {
		case <-gone:
		case <-time.After(patience):
			t.Fatal("the upstream never heard that the caller went")
		}
	}
}

// zeros are so many bytes.
type zeros struct{ left int64 }

func (z *zeros) Read(p []byte) (int, error) {
	if z.left == 0 {
		return 0, io.EOF
	}
	n := min(int64(len(p)), z.left)
	z.left -= n
	return int(n), nil
}

// TestLarge: a large body passes both ways, and is never in memory.
func TestLarge(t *testing.T) {
	const size = 48 << 20
	w := newWorld(t)
	at := w.upstream(orders, func(rw http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		if err != nil || n != size {
			t.Errorf("the upstream got %d bytes, %v", n, err)
		}
		_, _ = io.Copy(rw, &zeros{size})
	})
	p := w.start(false, outgoing.Listener{Upstreams: []outgoing.Upstream{to(at)}})
	var peak atomic.Uint64
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		for {
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			peak.Store(max(peak.Load(), m.HeapInuse))
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	}()
	for _, http2 := range []bool{false, true} {
		resp, err := p.client(http2).Post("http://x/", "", &zeros{size})
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
		if n != size || err != nil {
			t.Errorf("%d bytes came back, %v", n, err)
		}
	}
	if peak.Load() > 40<<20 {
		t.Errorf("the heap grew to %d MiB", peak.Load()>>20)
	}
	t.Logf("the heap's peak: %d MiB", peak.Load()>>20)
}

// TestContinue: a body is asked for when the upstream wants it, and not before.
func TestContinue(t *testing.T) {
	w := newWorld(t)
	at := w.upstream(orders, func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/no" {
			rw.WriteHeader(413)
			return
		}
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(rw, "%s", body)
	})
	p := w.start(false, outgoing.Listener{Upstreams: []outgoing.Upstream{to(at)}})
	ask := func(path string) (net.Conn, *bufio.Reader, *http.Response) {
		conn, err := p.dial()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n", path)
		r := bufio.NewReader(conn)
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		return conn, r, resp
	}
	if _, _, resp := ask("/no"); resp.StatusCode != 413 {
		t.Errorf("got %d", resp.StatusCode)
	}
	conn, r, resp := ask("/yes")
	if resp.StatusCode != 100 {
		t.Fatalf("got %d", resp.StatusCode)
	}
	fmt.Fprint(conn, "hello")
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		t.Fatal(err)
	}
	if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "hello" {
		t.Errorf("%q %v", body, err)
	}
}

// TestEarly: where an answer begins before its request has ended, what is left of the body
// is no request of its own.
func TestEarly(t *testing.T) {
	w := newWorld(t)
	var asked atomic.Int64
	at := w.upstream(orders, func(rw http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		rw.WriteHeader(413)
	})
	p := w.start(false, outgoing.Listener{Upstreams: []outgoing.Upstream{to(at)}})
	for _, length := range []string{"Content-Length: 1000", "Transfer-Encoding: chunked"} {
		asked.Store(0)
		conn, err := p.dial()
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n", length)
		r := bufio.NewReader(conn)
		resp, err := http.ReadResponse(r, nil)
		if err != nil || resp.StatusCode != 413 || !resp.Close {
			t.Fatalf("%s: %+v %v", length, resp, err)
		}
		_, _ = io.WriteString(conn, "GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n")
		_ = conn.(interface{ CloseWrite() error }).CloseWrite()
		_ = conn.SetReadDeadline(time.Now().Add(patience))
		_, _ = io.Copy(io.Discard, r)
		_ = conn.Close()
		if n := asked.Load(); n != 1 {
			t.Errorf("%s: the upstream was asked %d times", length, n)
		}
	}
}

// websocket is an upstream that upgrades, and sends back what it gets.
func websocket(auth chan<- string) http.HandlerFunc {
	return func(rw http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") == "" {
			auth <- r.Header.Get("Authorization")
			_ = http.NewResponseController(rw).Flush()
			<-r.Context().Done()
			return
		}
		conn, buf, err := http.NewResponseController(rw).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		auth <- r.Header.Get("Authorization")
		_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		_, _ = io.Copy(conn, buf)
	}
}

func upgraded(t *testing.T, p *proxy) (net.Conn, *bufio.Reader) {
	t.Helper()
	conn, err := p.dial()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_, _ = io.WriteString(conn, "GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nAuthorization: evil\r\n\r\n")
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != 101 {
		t.Fatalf("%v %v", resp, err)
	}
	for _, word := range []string{"ping\n", "pong\n"} {
		_, _ = io.WriteString(conn, word)
		if got, err := r.ReadString('\n'); err != nil || got != word {
			t.Fatalf("%q %v", got, err)
		}
	}
	return conn, r
}

// TestRevoked: when a token is revoked, what is under way with it ends: an answer that
// hasn't begun with a reason, a stream, a websocket; others go on. With keep all do.
func TestRevoked(t *testing.T) {
	w := newWorld(t)
	auth := make(chan string, 8)
	at := w.upstream(orders, func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/silent" {
			auth <- r.Header.Get("Authorization")
			<-r.Context().Done()
			return
		}
		websocket(auth)(rw, r)
	})
	keep := to(at)
	keep.Path, keep.KeepRevoked, keep.Request.Audience = "/ws", true, "kept"
	cut := w.start(false, outgoing.Listener{Upstreams: []outgoing.Upstream{to(at)}})
	kept := w.start(false, outgoing.Listener{Upstreams: []outgoing.Upstream{keep}})
	keptConn, keptLines := upgraded(t, kept)
	keptToken := <-auth

	_, lines := upgraded(t, cut)
	resp, err := cut.client(false).Get("http://x/stream")
	if err != nil {
		t.Fatal(err)
	}
	silent := make(chan struct{})
	go func() {
		defer close(silent)
		resp, body := get(t, cut.client(true), "http://x/silent")
		wantRefusal(t, resp, body, 502, "CREDENTIAL_REVOKED")
	}()
	used := <-auth
	for range 2 {
		if next := <-auth; next != used {
			t.Fatal("another token")
		}
	}
	w.tokens.revoke(used)
	w.tokens.revoke(keptToken)
	if _, err := lines.ReadString('\n'); err == nil {
		t.Error("the websocket goes on")
	}
	if _, err := io.ReadAll(resp.Body); err == nil {
		t.Error("the stream ended as if it were whole")
	}
	<-silent
	eventually(t, "the counts", func() bool { return cut.Counts()[1].Requests[outgoing.Cut] == 3 })
	fmt.Fprintln(keptConn, "still here")
	if got, err := keptLines.ReadString('\n'); err != nil || got != "still here\n" {
		t.Errorf("kept: %q %v", got, err)
	}
	// And what comes next has a new token.
	upgraded(t, cut)
	if next := <-auth; next == used {
		t.Error("a revoked token was sent")
	}
}

// TestRevokedHalfClosed: a websocket whose upstream has ended goes on until its caller ends
// it too, but no longer than its token lives.
func TestRevokedHalfClosed(t *testing.T) {
	w := newWorld(t)
	auth := make(chan string, 1)
	at := w.upstream(orders, func(rw http.ResponseWriter, r *http.Request) {
		conn, _, err := http.NewResponseController(rw).Hijack()
		if err != nil {
			return
		}
		auth <- r.Header.Get("Authorization")
		_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		_ = conn.Close()
	})
	p := w.start(false, outgoing.Listener{Upstreams: []outgoing.Upstream{to(at)}})
	conn, err := p.dial()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, _ = io.WriteString(conn, "GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	if answer, err := io.ReadAll(conn); err != nil || !strings.Contains(string(answer), " 101 ") {
		t.Fatalf("%q, %v", answer, err)
	}
	w.tokens.revoke(<-auth)
	eventually(t, "the request to end", func() bool { c := p.Counts()[1]; return c.Open == 0 && c.Requests[outgoing.Cut] == 1 })
}

// grpcUpstream echoes messages of any method, over mTLS.
func (w *world) grpcUpstream(handle grpc.StreamHandler) string {
	w.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.Fatal(err)
	}
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(tlsconfig.MTLSServerConfig(w.td.Source(orders), w.td, tlsconfig.AuthorizeMemberOf(domain)))), grpc.UnknownServiceHandler(handle))
	go func() { _ = s.Serve(l) }()
	w.Cleanup(s.Stop)
	return "https://" + l.Addr().String()
}

func (p *proxy) grpc() *grpc.ClientConn {
	p.Helper()
	target := "unix:" + p.path
	if p.path == "" {
		target = p.addr
	}
	cc, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		p.Fatal(err)
	}
	p.Cleanup(func() { _ = cc.Close() })
	return cc
}

var bidi = &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}

// TestGRPC: calls of gRPC pass, with metadata, trailers and status; one that says
// UNAUTHENTICATED is repeated once; refusals are statuses with a reason; a revoked token
// ends a stream with one.
func TestGRPC(t *testing.T) {
	w := newWorld(t)
	auth := make(chan string, 64)
	var deny atomic.Int64
	at := w.grpcUpstream(func(_ any, s grpc.ServerStream) error {
		md, _ := metadata.FromIncomingContext(s.Context())
		auth <- strings.Join(md["authorization"], ",")
		if deny.Add(-1) >= 0 {
			return status.Error(codes.Unauthenticated, "TOKEN_REVOKED")
		}
		s.SetTrailer(metadata.Pairs("x-sum", "7"))
		for {
			m := new(wrapperspb.BytesValue)
			if err := s.RecvMsg(m); errors.Is(err, io.EOF) {
				return status.Error(codes.DataLoss, "the end")
			} else if err != nil {
				return err
			}
			if err := s.SendMsg(m); err != nil {
				return err
			}
			if method, _ := grpc.MethodFromServerStream(s); method == "/x.Y/Unary" {
				return nil
			}
		}
	})
	p := w.start(false, outgoing.Listener{Upstreams: []outgoing.Upstream{to(at)}})
	cc := p.grpc()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	evil := metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer evil")
	out := new(wrapperspb.BytesValue)
	if err := cc.Invoke(evil, "/x.Y/Unary", wrapperspb.Bytes([]byte("hello")), out); err != nil || string(out.Value) != "hello" {
		t.Fatalf("%q %v", out.Value, err)
	}
	if got := <-auth; !strings.HasPrefix(got, "Bearer eyJ") {
		t.Errorf("the upstream got %q", got)
	}
	deny.Store(1)
	if err := cc.Invoke(ctx, "/x.Y/Unary", wrapperspb.Bytes([]byte("hello")), out); err != nil || string(out.Value) != "hello" {
		t.Fatalf("%q %v", out.Value, err)
	}
	if first, second := <-auth, <-auth; first == second {
		t.Error("repeated with the same token")
	}
	deny.Store(1)
	if err := cc.Invoke(ctx, "/x.Y/Unary", wrapperspb.Bytes([]byte("x")), out); status.Code(err) != codes.Unauthenticated || !strings.Contains(err.Error(), "TOKEN_REVOKED") {
		t.Errorf("the upstream's own word: %v", err)
	}
	used := <-auth
	for range 300 { // however soon the head of an answer that is nothing else is sent
		deny.Store(1)
		if err := cc.Invoke(ctx, "/x.Y/Unary", wrapperspb.Bytes([]byte("x")), out); status.Code(err) != codes.Unauthenticated {
			t.Fatalf("the upstream's own word: %v", err)
		}
		used = <-auth
	}
	s, err := cc.NewStream(ctx, bidi, "/x.Y/Bidi")
	if err != nil {
		t.Fatal(err)
	}
	echo := func(text string) {
		t.Helper()
		if err := s.SendMsg(wrapperspb.Bytes([]byte(text))); err != nil {
			t.Fatal(err)
		}
		if err := s.RecvMsg(out); err != nil || string(out.Value) != text {
			t.Fatalf("%q %v", out.Value, err)
		}
	}
	for i := range 100 {
		echo(fmt.Sprint(i))
	}
	echo(strings.Repeat("x", 1<<20))
	_ = s.CloseSend()
	if err := s.RecvMsg(out); status.Code(err) != codes.DataLoss || s.Trailer().Get("x-sum")[0] != "7" {
		t.Errorf("%v, trailer %v", err, s.Trailer())
	}
	<-auth
	if s, err = cc.NewStream(ctx, bidi, "/x.Y/Bidi"); err != nil {
		t.Fatal(err)
	}
	echo("before")
	if got := <-auth; got != used {
		t.Error("another token")
	}
	w.tokens.revoke(used)
	wantStatus(t, s.RecvMsg(out), codes.Unauthenticated, "CREDENTIAL_REVOKED")
	w.tokens.set(func() {
		w.tokens.err = &sdk.Error{Code: codes.Unavailable, Reason: "BROKER_UNREACHABLE", Message: "away, 100 % ü"}
		clear(w.tokens.sources)
	})
	wantStatus(t, cc.Invoke(ctx, "/x.Y/Unary", wrapperspb.Bytes(nil), out), codes.Unavailable, "BROKER_UNREACHABLE")
}

func wantStatus(t *testing.T, err error, code codes.Code, reason string) {
	t.Helper()
	var e *sdk.Error
	if !errors.As(sdk.FromRPC(err), &e) || e.Code != code || e.Reason != reason {
		t.Errorf("got %v, want %v %s", err, code, reason)
	}
}

// TestEndsEarly: a stream that the upstream ends while the caller waits, having sent all it
// will for now, ends for the caller too.
func TestEndsEarly(t *testing.T) {
	w := newWorld(t)
	at := w.grpcUpstream(func(_ any, s grpc.ServerStream) error {
		if err := s.RecvMsg(new(wrapperspb.BytesValue)); err != nil {
			return err
		}
		if err := s.SendMsg(wrapperspb.Bytes([]byte("x"))); err != nil {
			return err
		}
		return status.Error(codes.DataLoss, "the end")
	})
	p := w.start(false, outgoing.Listener{Upstreams: []outgoing.Upstream{to(at)}})
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	s, err := p.grpc().NewStream(ctx, bidi, "/x.Y/Bidi")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.SendMsg(wrapperspb.Bytes(nil)); err != nil {
		t.Fatal(err)
	}
	if err := s.RecvMsg(new(wrapperspb.BytesValue)); err != nil {
		t.Fatal(err)
	}
	if err := s.RecvMsg(new(wrapperspb.BytesValue)); status.Code(err) != codes.DataLoss {
		t.Errorf("%v", err)
	}
}

// TestRotation: after the SVID has rotated, requests go over connections that show the new
// one, as does a token that is bound to it; what was under way goes on.
func TestRotation(t *testing.T) {
	w := newWorld(t)
	type got struct {
		thumb [32]byte
		token string
	}
	all := make(chan got, 64)
	auth := make(chan string, 8)
	at := w.upstream(orders, func(rw http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "" {
			websocket(auth)(rw, r)
			return
		}
		all <- got{thumb(r.TLS.PeerCertificates[0].Raw), r.Header.Get("Authorization")}
	})
	w.tokens.binding = token.BindingX5T
	p := w.start(false, outgoing.Listener{Upstreams: []outgoing.Upstream{to(at)}})
	ws, lines := upgraded(t, p)
	for range 3 {
		for range 2 {
			if resp, body := get(t, p.client(true), "http://x/"); resp.StatusCode != 200 {
				t.Fatalf("%d %s", resp.StatusCode, body)
			}
			g := <-all
			svid, err := w.td.Source(payments).GetX509SVID()
			if err != nil {
				t.Fatal(err)
			}
			tok, err := token.Inspect(strings.TrimPrefix(g.token, "Bearer "))
			if err != nil || tok.Claims.Certificate != g.thumb || g.thumb != thumb(svid.Certificates[0].Raw) {
				t.Errorf("the token is bound to %x, the connection shows %x, the SVID is %x; %v", tok.Claims.Certificate, g.thumb, thumb(svid.Certificates[0].Raw), err)
			}
		}
		if err := w.td.Rotate(payments); err != nil {
			t.Fatal(err)
		}
	}
	fmt.Fprintln(ws, "still here")
	if got, err := lines.ReadString('\n'); err != nil || got != "still here\n" {
		t.Errorf("%q %v", got, err)
	}
}

// TestStop: requests under way may end, and what doesn't is cut.
func TestStop(t *testing.T) {
	w := newWorld(t)
	started, finish := make(chan struct{}, 2), make(chan struct{})
	auth := make(chan string, 1)
	at := w.upstream(orders, func(rw http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "" {
			websocket(auth)(rw, r)
			return
		}
		started <- struct{}{}
		if r.URL.Path == "/ends" {
			<-finish
			return
		}
		<-r.Context().Done()
	})
	p := w.start(false, outgoing.Listener{Upstreams: []outgoing.Upstream{to(at)}})
	_, ws := upgraded(t, p)
	ends, never := make(chan int, 1), make(chan int, 1)
	go func() { resp, _ := get(t, p.client(true), "http://x/ends"); ends <- resp.StatusCode }()
	go func() {
		resp, err := p.client(false).Get("http://x/never")
		if err != nil {
			never <- 0 // its connection was closed before it heard why
			return
		}
		never <- resp.StatusCode
	}()
	<-started
	<-started
	stopped := make(chan error, 1)
	go func() { stopped <- p.stop() }()
	eventually(t, "the listener to close", func() bool { _, err := p.dial(); return err != nil })
	close(finish)
	if got := <-ends; got != 200 {
		t.Errorf("what could end: %d", got)
	}
	if got := <-never; got != 0 && got != 503 {
		t.Errorf("what didn't end: %d", got)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	if _, err := ws.ReadString('\n'); err == nil {
		t.Error("the websocket goes on")
	}
}

// TestHints: an upstream that repeats the token in an answer before its answer doesn't tell it
// to the program either.
func TestHints(t *testing.T) {
	w := newWorld(t)
	at := w.upstream(orders, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Link", "<"+r.Header.Get("Authorization")+">")
		w.Header().Set("X-Other", "other")
		w.WriteHeader(http.StatusEarlyHints)
		w.Header().Del("Link")
	})
	p := w.start(false, outgoing.Listener{Upstreams: []outgoing.Upstream{to(at)}})
	for _, http2 := range []bool{false, true} {
		var hints []textproto.MIMEHeader
		ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{Got1xxResponse: func(_ int, h textproto.MIMEHeader) error {
			hints = append(hints, h)
			return nil
		}})
		req, err := http.NewRequestWithContext(ctx, "GET", "http://x/", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := p.client(http2).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if len(hints) != 1 || hints[0].Get("X-Other") != "other" || hints[0].Get("Link") != "" {
			t.Errorf("hints: %v", hints)
		}
	}
}

// TestRevokedUnread: nor does it help against a revocation to leave an answer unread.
func TestRevokedUnread(t *testing.T) {
	w := newWorld(t)
	auth := make(chan string, 1)
	at := w.upstream(orders, func(w http.ResponseWriter, r *http.Request) {
		auth <- r.Header.Get("Authorization")
		for {
			if _, err := w.Write(make([]byte, 32<<10)); err != nil {
				return
			}
		}
	})
	p := w.start(false, outgoing.Listener{Upstreams: []outgoing.Upstream{to(at)}})
	conn, err := p.dial()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	w.tokens.revoke(<-auth)
	eventually(t, "the request to end", func() bool { return p.Counts()[1].Open == 0 })
}
