package outgoing_test

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/dayflyhq/dayfly/agent/outgoing"
	"github.com/dayflyhq/dayfly/sdk"
	"pgregory.net/rapid"
)

func configured(at ...string) (out []outgoing.Upstream) {
	for _, one := range at {
		host, path, _ := strings.Cut(one, "/")
		out = append(out, outgoing.Upstream{URL: "https://up.example:8443", Host: host, Path: strings.TrimSuffix("/"+path, "/")})
	}
	return out
}

func TestMatch(t *testing.T) {
	all := configured("a.example/", "a.example/v1", "a.example/v1/x", "b.example:81/", "[::1]/only")
	for request, want := range map[string]int{
		"a.example /": 0, "A.Example:80 /v1x": 0, "a.example:443 /v1": 1, "a.example:8443 /v1/": 1, "a.example /v1/x/y": 2, "a.example /v1/xy": 1,
		"a.example:81 /": -1, "b.example /": -1, "b.example:81 /": 3, "b.example:81 /../x": 3, "[::1] /only/x": 4, "[::1] /": -1, "[0::1]:80 /only": 4, "::1 /only": -1,
		"a.example. /": -1, "xa.example /": -1, "a.example@evil /": -1, "a.example: /": -1, "a.example:x /": -1, " /": -1, "a.example ": -1, "a.example x": -1, "a.example *": -1,
		"a.example /v1/../v2": -1, "a.example /v1/%2e%2E/v2": -1, "a.example /v1%2fx": -1, "a.example /v1/..;x/": -1, `a.example /v1\x`: -1, "a.example /v1/%5c": -1, "a.example /v1/%": -1, "a.example /v1/...": 1,
		"a.example //v1/y": -1, "a.example /v1//x/y": -1, "a.example /%761/y": -1, "a.example /v1;a/y": -1, "a.example /v1/x;a": -1, "a.example /v2//x;a/%20": 0, "a.example /v1//": 1, "a.example //": 0,
	} {
		host, path, _ := strings.Cut(request, " ")
		if got := outgoing.Match(all, true, host, path); got != want {
			t.Errorf("%s: %d, want %d", request, got, want)
		}
	}
	if got := outgoing.Match(configured("/")[:1], false, "whatever:99999999", "/a/../b"); got != 0 {
		t.Errorf("a reverse proxy of one: %d", got)
	}
}

// FuzzMatch: whatever the request, it gets an upstream's token only if its host is that one's,
// and its path is below that one's as every server reads it, and below no longer one's.
func FuzzMatch(f *testing.F) {
	f.Add("a.example", "/v1/x")
	f.Add("a.example:80", "/v1/../x")
	f.Add("b.example:81", "/%2e%2e/x")
	f.Add("[::1]:8443", "//v1;x/..%2f")
	all := configured("a.example/v1", "a.example/v1/x", "b.example:81/", "[::1]/v1")
	f.Fuzz(func(t *testing.T, host, p string) {
		i := outgoing.Match(all, true, host, p)
		if i < 0 {
			return
		}
		name, port, _ := strings.Cut(all[i].Host, ":")
		if all[i].Host == "[::1]" {
			name, port = "[::1]", ""
		}
		u, err := url.Parse("http://" + host + "/")
		if err != nil || u.User != nil || !strings.EqualFold(u.Hostname(), strings.Trim(name, "[]")) && name != "[::1]" || port != "" && u.Port() != port {
			t.Fatalf("%q is taken for %s", host, all[i].Host)
		}
		plain, err := url.PathUnescape(p)
		if err != nil {
			if all[i].Path != "" {
				t.Fatalf("%q is taken", p)
			}
			return
		}
		for _, read := range []string{path.Clean(plain), plain, path.Clean(strings.ReplaceAll(plain, `\`, "/"))} {
			if all[i].Path != "" && read != all[i].Path && !strings.HasPrefix(read, all[i].Path+"/") {
				t.Fatalf("%q is below %s, and may mean %s", p, all[i].Path, read)
			}
		}
		if i == 0 && (p == "/v1/x" || strings.HasPrefix(p, "/v1/x/")) {
			t.Fatalf("%q has a longer one", p)
		}
	})
}

var notAWord = regexp.MustCompile(`[^a-z0-9]`)

// FuzzStrip: whatever header a caller writes, nothing is left that an upstream may take for
// the token's.
func FuzzStrip(f *testing.F) {
	f.Add([]byte("Authorization: x\r\naUTHorization: y\r\nX-Api-Token: z\r\nX_API_token: z\r\n"), "X-Api-Token")
	f.Add([]byte("X-Forwarded-Client-Cert: x\r\nX.Dayfly_Subject: x\r\nClient-Cert: x\r\nDPoP: y\r\nKeep: me\r\n"), "Authorization")
	f.Fuzz(func(t *testing.T, raw []byte, name string) {
		r, err := http.ReadRequest(bufio.NewReader(io.MultiReader(strings.NewReader("GET / HTTP/1.1\r\nHost: x\r\n"), bytes.NewReader(raw), strings.NewReader("\r\n\r\n"))))
		if err != nil {
			return
		}
		before := r.Header.Clone()
		outgoing.Strip(r.Header, name)
		cgi := func(name string) string { return notAWord.ReplaceAllString(strings.ToLower(name), "_") }
		claims := func(key string) bool {
			key = cgi(key)
			return key == cgi(name) || slices.Contains([]string{"authorization", "proxy_authorization", "dpop", "forwarded", "x_real_ip", "client_cert", "client_cert_chain"}, key) ||
				strings.HasPrefix(key, "x_forwarded_") || strings.HasPrefix(key, "x_dayfly_")
		}
		for key := range before {
			if left := r.Header[key] != nil; left == claims(key) {
				t.Fatalf("%q: left %v", key, left)
			}
		}
	})
}

// FuzzRaw: whatever a caller writes on the wire, an upstream gets requests with its own host
// and the one token.
func FuzzRaw(f *testing.F) {
	for _, text := range []string{
		"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: evil\r\n\r\n", "POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nAuthorization: evil\r\n\r\nGET /b HTTP/1.1\r\nHost: y\r\n\r\n",
		"GET http://evil/ HTTP/1.0\r\nConnection: Authorization\r\nAuthorization: evil\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "OPTIONS * HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\n\r\n",
	} {
		f.Add([]byte(text))
	}
	w := newWorld(f)
	var s seen
	at := w.upstream(orders, s.handle)
	p := w.start(false, outgoing.Listener{Upstreams: []outgoing.Upstream{to(at)}})
	f.Fuzz(func(t *testing.T, raw []byte) {
		conn, err := p.dial()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		go func() {
			_, _ = conn.Write(raw)
			_ = conn.(interface{ CloseWrite() error }).CloseWrite()
		}()
		_ = conn.SetReadDeadline(time.Now().Add(patience))
		_, _ = io.Copy(io.Discard, conn)
		for _, r := range s.take() {
			if r.Host != strings.TrimPrefix(at, "https://") || len(r.Trailer) != 0 {
				t.Errorf("the upstream is called %s, with the trailer %q", r.Host, r.Trailer)
			}
			wantToken(t, r, "orders")
		}
	})
}

// TestReplay: however a body comes in and is read, each reading is whole, unless the one
// before has read more than is kept.
func TestReplay(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		body := bytes.Repeat([]byte("0123456789abcde"), rapid.IntRange(0, 9000).Draw(t, "length"))
		var src io.Reader = bytes.NewReader(body)
		if rapid.Bool().Draw(t, "with the end") {
			src = iotest.DataErrReader(src)
		}
		if rapid.Bool().Draw(t, "by halves") {
			src = iotest.HalfReader(src)
		}
		r := outgoing.NewReplay(src)
		defer r.End()
		for try := range 3 {
			a := r.Current()
			var got []byte
			stop := rapid.IntRange(0, len(body)+1).Draw(t, "stop")
			for try == 2 || len(got) < stop {
				buf := make([]byte, rapid.IntRange(1, 40<<10).Draw(t, "buffer"))
				n, err := a.Read(buf)
				got = append(got, buf[:n]...)
				if err != nil {
					if !errors.Is(err, io.EOF) || len(got) != len(body) {
						t.Fatalf("%v after %d of %d bytes", err, len(got), len(body))
					}
					break
				}
			}
			if !bytes.Equal(got, body[:len(got)]) {
				t.Fatalf("try %d read something else", try)
			}
			if try == 2 {
				return
			}
			if again := r.Again(); !again && len(got) <= 64<<10 {
				t.Fatalf("not again after %d bytes", len(got))
			} else if !again {
				return
			}
			if n, err := a.Read(make([]byte, 10)); n != 0 || err == nil {
				t.Fatalf("the one before reads on: %d %v", n, err)
			}
		}
	})
}

// TestReplayCloses: a reading that waits for the source ends with Close.
func TestReplayCloses(t *testing.T) {
	src, _ := io.Pipe()
	defer src.Close()
	r := outgoing.NewReplay(src)
	defer r.End()
	a := r.Current()
	done := make(chan error)
	go func() { _, err := a.Read(make([]byte, 1)); done <- err }()
	_ = a.Close()
	if err := <-done; err == nil {
		t.Error("no error")
	}
}

// TestValidate: what is wrong is said by its key.
func TestValidate(t *testing.T) {
	good := outgoing.Upstream{URL: "https://x.example", Request: sdk.Request{Audience: "x"}}
	for _, c := range []struct {
		change func(*outgoing.Upstream)
		key    string
	}{
		{func(u *outgoing.Upstream) {}, ""},
		{func(u *outgoing.Upstream) { u.SPIFFEID, u.Request.Binding = orders, "x5t" }, ""},
		{func(u *outgoing.Upstream) { u.URL, u.Insecure = "http://[::1]:80/", true }, ""},
		{func(u *outgoing.Upstream) {
			u.Header, u.Scheme, u.Path, u.Host = "X-Token", "Token", "/a/b", "[::1]:80"
		}, ""},
		{func(u *outgoing.Upstream) { u.URL = "https://x/path" }, "url"},
		{func(u *outgoing.Upstream) { u.URL = "https://user@x" }, "url"},
		{func(u *outgoing.Upstream) { u.URL = "x.example" }, "url"},
		{func(u *outgoing.Upstream) { u.URL = "http://127.0.0.1" }, "url"},
		{func(u *outgoing.Upstream) { u.URL, u.Insecure = "http://x.example", true }, "url"},
		{func(u *outgoing.Upstream) { u.URL, u.Insecure, u.SPIFFEID = "http://127.0.0.1", true, orders }, "url"},
		{func(u *outgoing.Upstream) { u.Insecure = true }, "insecure"},
		{func(u *outgoing.Upstream) { u.Request.Binding = "spiffe" }, "credential.binding"},
		{func(u *outgoing.Upstream) { u.Request.Audience = "" }, "credential.audience"},
		{func(u *outgoing.Upstream) { u.Host = "x/y" }, "host"},
		{func(u *outgoing.Upstream) { u.Path = "/a/../b" }, "path"},
		{func(u *outgoing.Upstream) { u.Path = "a" }, "path"},
		{func(u *outgoing.Upstream) { u.Header = "Host" }, "header"},
		{func(u *outgoing.Upstream) { u.Header = "a b" }, "header"},
		{func(u *outgoing.Upstream) { u.Scheme = "a b" }, "scheme"},
	} {
		u := good
		c.change(&u)
		var keys []string
		for _, p := range outgoing.Problems(u.Validate()) {
			keys = append(keys, p.Key)
		}
		if c.key == "" && len(keys) > 0 || c.key != "" && !slices.Contains(keys, c.key) {
			t.Errorf("%+v: %q, want %q", u, keys, c.key)
		}
	}
	twice := outgoing.Listener{Forward: true, Upstreams: []outgoing.Upstream{good, good}}
	if p := outgoing.Problems(twice.Validate()); len(p) != 1 || p[0].Key != "upstreams[1].path" {
		t.Errorf("%v", twice.Validate())
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	for host, own := range map[string]bool{"127.0.0.1": true, "localhost": true, "[::ffff:127.0.0.1]": true, "127.0.0.2": false} {
		to := outgoing.Upstream{URL: "http://" + host + ":" + port, Insecure: true, Request: good.Request}
		_, err := outgoing.New(outgoing.Config{Tokens: new(tokens), Listeners: []outgoing.Listener{{Listener: l, Open: true, Upstreams: []outgoing.Upstream{to}}}})
		if own != (err != nil && strings.Contains(err.Error(), "own address")) {
			t.Errorf("a proxy to %s, where it listens itself: %v", host, err)
		}
	}
	for _, l := range []outgoing.Listener{{}, {Open: true, Secret: "/x"}} {
		if l.ValidateSocket(false) == nil {
			t.Errorf("%+v on TCP", l)
		}
	}
	if (&outgoing.Listener{Open: true}).ValidateSocket(true) == nil || (&outgoing.Listener{}).ValidateSocket(true) != nil {
		t.Error("on a unix socket")
	}
}
