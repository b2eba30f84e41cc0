package outgoing_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/agent/outgoing"
	"github.com/dayflyhq/dayfly/sdk"
	"google.golang.org/grpc/codes"
	"pgregory.net/rapid"
)

// TestUnauthorizedOnce: for any upstream that says 401 as it likes, to requests with any
// body: a request is made twice at most, the second time with another token and the same
// body, the last answer is passed on, and the fetches are no more than their growing pauses
// allow.
func TestUnauthorizedOnce(t *testing.T) {
	w := newWorld(t)
	type got struct {
		token string
		body  []byte
		was   int
	}
	var (
		mu     sync.Mutex
		all    []got
		script []int
	)
	at := w.upstream(orders, func(rw http.ResponseWriter, r *http.Request) {
		mu.Lock()
		status, early := 200, false
		if len(script) > 0 {
			status, script = script[0], script[1:]
		}
		early = status < 0
		mu.Unlock()
		if early {
			status = -status
		}
		var body []byte
		if !early {
			body, _ = io.ReadAll(r.Body)
		}
		mu.Lock()
		all = append(all, got{r.Header.Get("Authorization"), body, status})
		mu.Unlock()
		rw.WriteHeader(status)
		fmt.Fprintf(rw, "%d", status)
	})
	p := w.start(false, outgoing.Listener{Upstreams: []outgoing.Upstream{to(at)}})
	now := time.Now()
	var clock sync.Mutex
	w.tokens.now = func() time.Time { clock.Lock(); defer clock.Unlock(); return now }
	clients := []*http.Client{p.client(false), p.client(true)}
	rapid.Check(t, func(t *rapid.T) {
		clock.Lock()
		now = now.Add(time.Hour) // whatever was before is over
		clock.Unlock()
		start := now
		before := w.tokens.fetched.Load()
		for range rapid.IntRange(1, 12).Draw(t, "requests") {
			says := rapid.SliceOfN(rapid.SampledFrom([]int{200, 401, 401, -401, 403, 503}), 2, 2).Draw(t, "script")
			mu.Lock()
			all, script = nil, says
			mu.Unlock()
			size := rapid.SampledFrom([]int{0, 1, 1000, 64 << 10, 64<<10 + 1, 1 << 20}).Draw(t, "size")
			body := bytes.Repeat([]byte("x"), size)
			var reader io.Reader = bytes.NewReader(body)
			if rapid.Bool().Draw(t, "chunked") {
				reader = io.MultiReader(reader)
			}
			req, err := http.NewRequest("POST", "http://x/", reader)
			if err != nil {
				t.Fatal(err)
			}
			client := rapid.SampledFrom(clients).Draw(t, "client")
			if size > 0 && slices.Contains(says, -401) {
				client = clients[1] // over HTTP/1.1 such an answer ends the connection, and may not be read
			}
			resp, err := client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			text, err := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			if err != nil || string(text) != fmt.Sprint(resp.StatusCode) {
				t.Fatalf("%d %q %v", resp.StatusCode, text, err)
			}
			mu.Lock()
			tries := all
			mu.Unlock()
			if len(tries) < 1 || len(tries) > 2 {
				t.Fatalf("%d tries", len(tries))
			}
			last := tries[len(tries)-1]
			if last.was != resp.StatusCode {
				t.Errorf("the upstream said %d, the proxy %d", last.was, resp.StatusCode)
			}
			t.Logf("%d bytes, %v, %d tries, %d fetches", size, says, len(tries), w.tokens.fetched.Load()-before)
			if len(tries) == 2 && (tries[0].was != 401 || tries[0].token == tries[1].token) {
				t.Errorf("repeated after %d, with another token: %v", tries[0].was, tries[0].token != tries[1].token)
			}
			if last.body != nil && !bytes.Equal(last.body, body) {
				t.Errorf("a body of %d bytes arrived with %d", size, len(last.body))
			}
			later := time.Duration(rapid.IntRange(0, 3000).Draw(t, "ms")) * time.Millisecond
			clock.Lock()
			now = now.Add(later)
			clock.Unlock()
		}
		// The first, one at once, and then with pauses of 0.5, 1, 2, 4, 8 and 15 s between.
		allowed := int64(2)
		for pause, left := 500*time.Millisecond, now.Sub(start); left >= pause; pause = min(2*pause, 15*time.Second) {
			left -= pause
			allowed++
		}
		if n := w.tokens.fetched.Load() - before; n > allowed {
			t.Errorf("%d fetches in %v, of %d", n, now.Sub(start), allowed)
		}
	})
}

// TestNextAfterUnauthorized: a request that can't be repeated passes its 401 on, and the
// next one has another token.
func TestNextAfterUnauthorized(t *testing.T) {
	w := newWorld(t)
	var mu sync.Mutex
	refused := map[string]bool{}
	first := true
	at := w.upstream(orders, func(rw http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		mu.Lock()
		defer mu.Unlock()
		auth := r.Header.Get("Authorization")
		if first || refused[auth] {
			first, refused[auth] = false, true
			rw.Header().Set("X-Echo", auth)
			rw.WriteHeader(401)
		}
	})
	p := w.start(false, outgoing.Listener{Upstreams: []outgoing.Upstream{to(at)}})
	c := p.client(false)
	resp, err := c.Post("http://x/", "", io.MultiReader(strings.NewReader(strings.Repeat("x", 1<<20))))
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != 401 || resp.Header.Get("X-Echo") != "" {
		t.Errorf("%d %q", resp.StatusCode, resp.Header)
	}
	if resp, _ := get(t, c, "http://x/"); resp.StatusCode != 200 {
		t.Errorf("the next one: %d", resp.StatusCode)
	}
	if n := w.tokens.fetched.Load(); n != 2 {
		t.Errorf("%d fetches", n)
	}
	eventually(t, "the counts", func() bool {
		c := p.Counts()[1]
		return c.Requests[outgoing.Unauthorized] == 1 && c.Requests[outgoing.Passed] == 1 && c.Fetched == 1 && c.Open == 0
	})
}

// TestRefusedAfterUnauthorized: where the broker refuses another token, that is the answer.
func TestRefusedAfterUnauthorized(t *testing.T) {
	w := newWorld(t)
	at := w.upstream(orders, func(rw http.ResponseWriter, r *http.Request) {
		w.tokens.set(func() {
			w.tokens.err = &sdk.Error{Code: codes.PermissionDenied, Reason: "IDENTITY_LOCKED", Message: "locked"}
		})
		rw.WriteHeader(401)
	})
	p := w.start(false, outgoing.Listener{Upstreams: []outgoing.Upstream{to(at)}})
	resp, body := get(t, p.client(false), "http://x/")
	wantRefusal(t, resp, body, 502, "IDENTITY_LOCKED")
}

// TestHammer: many at once, to an upstream that says 401 to all, make one other token be fetched.
func TestHammer(t *testing.T) {
	w := newWorld(t)
	at := w.upstream(orders, func(rw http.ResponseWriter, r *http.Request) { rw.WriteHeader(401) })
	p := w.start(false, outgoing.Listener{Upstreams: []outgoing.Upstream{to(at)}})
	frozen := time.Now()
	w.tokens.now = func() time.Time { return frozen } // no pause is ever over
	c := p.client(true)
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			for range 20 {
				resp, err := c.Get("http://x/")
				if err != nil {
					t.Error(err)
					return
				}
				_ = resp.Body.Close()
				if resp.StatusCode != 401 {
					t.Errorf("%d", resp.StatusCode)
				}
			}
		})
	}
	all.Wait()
	if n := w.tokens.fetched.Load(); n != 2 {
		t.Errorf("%d fetches", n)
	}
}
