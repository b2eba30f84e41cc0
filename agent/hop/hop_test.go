package hop_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/agent/hop"
)

const patience = time.Minute

func TestMain(m *testing.M) {
	*hop.RefusedWithin = 100 * time.Millisecond
	os.Exit(m.Run())
}

// serve runs a limited server, and returns a function that dials it.
func serve(t *testing.T, max int, h http.HandlerFunc) func() *caller {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: h}
	hop.Limit(s, max)
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { _ = s.Close() })
	return func() *caller {
		conn, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		_ = conn.SetDeadline(time.Now().Add(patience))
		return &caller{t, conn, bufio.NewReader(conn)}
	}
}

type caller struct {
	t *testing.T
	net.Conn
	from *bufio.Reader
}

func (c *caller) send(text string) {
	c.t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		c.t.Fatal(err)
	}
}

// answer reads one, "" if the connection is closed.
func (c *caller) answer() string {
	c.t.Helper()
	resp, err := http.ReadResponse(c.from, nil)
	if err != nil {
		if ne, ok := err.(net.Error); ok && ne.Timeout() {
			c.t.Fatal("nothing comes")
		}
		return ""
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	return string(body)
}

const get = "GET / HTTP/1.1\r\nHost: x\r\n\r\n"

// TestLimit: one connection too many takes the place of one that is idle, and if all are at
// work it is closed; none under way is.
func TestLimit(t *testing.T) {
	wait, begun := make(chan struct{}), make(chan struct{}, 2)
	dial := serve(t, 2, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/wait" {
			begun <- struct{}{}
			<-wait
		}
		fmt.Fprint(w, "ok")
	})
	busy, idle := dial(), dial()
	busy.send("GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
	<-begun
	idle.send(get)
	if got := idle.answer(); got != "ok" {
		t.Fatalf("the second: %q", got)
	}
	// The server says that it is idle a moment after the answer: those before are closed instead.
	var third *caller
	for deadline := time.Now().Add(patience); ; {
		third = dial()
		_, _ = io.WriteString(third, "GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
		one := make([]byte, 1)
		_ = idle.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		if _, err := idle.Read(one); err == io.EOF {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the idle one stays")
		}
	}
	<-begun
	if got := dial().answer(); got != "" {
		t.Errorf("one more than all that are at work: %q", got)
	}
	close(wait)
	if a, b := busy.answer(), third.answer(); a != "ok" || b != "ok" {
		t.Errorf("those under way: %q, %q", a, b)
	}
}

// TestLimitUpgraded: what a connection has become counts until it ends, and no longer.
func TestLimitUpgraded(t *testing.T) {
	wait := make(chan struct{})
	left := make(chan struct{})
	dial := serve(t, 1, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/" {
			fmt.Fprint(w, "ok")
			return
		}
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer close(left)
		defer conn.Close()
		_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nup")
		<-wait
	})
	up := dial()
	up.send("GET /up HTTP/1.1\r\nHost: x\r\n\r\n")
	if got := up.answer(); got != "up" {
		t.Fatal(got)
	}
	if got := dial().answer(); got != "" {
		t.Errorf("a second one: %q", got)
	}
	close(wait)
	<-left
	for deadline := time.Now().Add(patience); ; {
		next := dial()
		_, _ = io.WriteString(next, get)
		if next.answer() == "ok" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("there is no room after it ended")
		}
	}
}

// TestRefusing: a no is heard by one who hasn't sent its body and never will, what it sends
// later is no request, and it may not stay.
func TestRefusing(t *testing.T) {
	dial := serve(t, 9, func(w http.ResponseWriter, r *http.Request) {
		hop.Refusing(w, r)
		http.Error(w, "no", http.StatusForbidden)
	})
	for _, length := range []string{"Content-Length: 100", "Transfer-Encoding: chunked"} {
		c := dial()
		c.send("POST / HTTP/1.1\r\nHost: x\r\n" + length + "\r\n\r\n")
		if got := c.answer(); got != "no\n" {
			t.Errorf("%s: %q", length, got)
		}
		if rest, err := io.ReadAll(c.from); err != nil && !strings.Contains(err.Error(), "reset") || len(rest) > 0 {
			t.Errorf("%s: then %q, %v", length, rest, err)
		}
	}
	c := dial() // without a body the connection goes on
	for range 2 {
		c.send(get)
		if got := c.answer(); got != "no\n" {
			t.Error(got)
		}
	}
}

// TestEnds: a caller who doesn't read can't hold a response longer than its context lives;
// the next request of a connection whose context ended has its time again.
func TestEnds(t *testing.T) {
	ended := make(chan struct{})
	dial := serve(t, 9, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/later" {
			time.Sleep(2 * *hop.RefusedWithin) // past that of the request before
			fmt.Fprint(w, "ok")
			return
		}
		ctx, cancel := context.WithCancel(r.Context())
		defer hop.Ends(ctx, w)()
		cancel()
		if r.URL.Path == "/" {
			fmt.Fprint(w, "ok")
			return
		}
		defer close(ended)
		for {
			if _, err := w.Write(make([]byte, 32<<10)); err != nil {
				return
			}
		}
	})
	c := dial()
	for begun := time.Now(); ; begun, c = time.Now(), dial() {
		c.send(get)
		if got := c.answer(); got == "ok" {
			break
		} else if time.Since(begun) < *hop.RefusedWithin { // else it took all the time that it has
			t.Fatal(got)
		}
	}
	c.send("GET /later HTTP/1.1\r\nHost: x\r\n\r\n")
	if got := c.answer(); got != "ok" {
		t.Errorf("the next: %q", got)
	}
	c.send("GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
	select {
	case <-ended:
	case <-time.After(patience):
		t.Error("it goes on")
	}
}

// The server waits for a body before it writes an answer, unless that is the last one.
func TestRefusingSays(t *testing.T) {
	for body, want := range map[string]string{"": "", "x": "close"} {
		w := httptest.NewRecorder()
		if hop.Refusing(w, httptest.NewRequest("POST", "/", strings.NewReader(body))); w.Header().Get("Connection") != want {
			t.Errorf("%q: %q", body, w.Header())
		}
	}
}

func TestNames(t *testing.T) {
	for name, want := range map[string]bool{
		"X-Forwarded-For": true, "x_forwarded.client_cert": true, "Forwarded": true, "X-Real-IP": true, "Client-Cert": true, "client_cert_chain": true,
		"X-Dayfly-Subject": true, "X-Forward": false, "X-Request-Id": false, "Host": false,
	} {
		if got := hop.Identifies(hop.Fold(name)); got != want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
