package web_test

import (
	"crypto/tls"
	"encoding/binary"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker/web"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A stranger who takes every connection there is closes those of other strangers, and of no
// client that has proved who it is, by either way.
func TestProvenConnectionsStay(t *testing.T) {
	w := newWorld(t)
	withCertificate, withAssertion := w.client(payments), w.client(spiffeid.ID{})
	forms := map[*http.Client]url.Values{withCertificate: credentials("audience", "orders"), withAssertion: w.assertion(payments, credentials("audience", "orders"))}
	for c, form := range forms {
		w.post(c, "/token", form.Encode()).wantToken(t, "")
	}
	crowd(t, w.base)
	for c, form := range forms {
		reused := false
		trace := &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) { reused = i.Reused }}
		r, err := http.NewRequestWithContext(httptrace.WithClientTrace(t.Context(), trace), http.MethodPost, w.base+"/token", strings.NewReader(form.Encode()))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		w.send(c, r).wantToken(t, "")
		if !reused {
			t.Error("its connection was closed for strangers")
		}
	}
}

// crowd opens more connections than a server takes, and returns when the first are closed.
func crowd(t *testing.T, base string) {
	t.Helper()
	var conns []net.Conn
	for range web.MaxConnections + 50 {
		c, err := net.Dial("tcp", strings.TrimPrefix(base, "https://"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		conns = append(conns, c)
	}
	for _, c := range conns[:50] {
		_ = c.SetReadDeadline(time.Now().Add(time.Minute))
		_, _ = io.Copy(io.Discard, c)
	}
}

// What one connection of HTTP/2 may have under way, and so in memory, before anybody has
// proved who it is.
func TestServeBoundsStreams(t *testing.T) {
	w := newWorld(t)
	cfg := w.client(spiffeid.ID{}).Transport.(*http.Transport).TLSClientConfig.Clone()
	cfg.NextProtos = []string{"h2"}
	c, err := tls.Dial("tcp", strings.TrimPrefix(w.base, "https://"), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")); err != nil {
		t.Fatal(err)
	}
	head := make([]byte, 9) // RFC 9113 section 4.1; the first frame is SETTINGS
	if _, err := io.ReadFull(c, head); err != nil || head[3] != 4 {
		t.Fatalf("first frame %x, %v", head, err)
	}
	settings := make([]byte, int(head[1])<<8|int(head[2]))
	if _, err := io.ReadFull(c, settings); err != nil {
		t.Fatal(err)
	}
	for ; len(settings) > 0; settings = settings[6:] {
		if binary.BigEndian.Uint16(settings) == 3 { // MAX_CONCURRENT_STREAMS
			if n := binary.BigEndian.Uint32(settings[2:]); n != web.MaxConcurrentStreams {
				t.Errorf("%d requests on a connection", n)
			}
			return
		}
	}
	t.Error("any number of requests on a connection")
}
