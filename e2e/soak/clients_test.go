//go:build linux

package soak_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
)

const (
	// askEvery is the mean between two requests of one who asks.
	askEvery = 100 * time.Millisecond
	// askTimeout is how long one waits for an answer; an agent says what is wrong sooner.
	askTimeout = 15 * time.Second
)

// spread is how long after its start a broker has no tokens for those who know the JWK
// set only: twice the max-age that the sandbox's has, and a tenth.
const spread = 2200 * time.Millisecond

// A served is a credential that somebody got.
type served struct {
	raw     string // the token, if it is one
	grant   string
	issued  time.Time // at the latest: times of tokens are whole seconds
	life    time.Duration
	expires time.Time
}

// half is when half of its life is over, at the latest.
func (s *served) half() time.Time { return s.issued.Add(s.life / 2) }

// A stream is one who asks, and never stops. All of it belongs to its goroutine but last.
type stream struct {
	w    *world
	u    *unit
	kind string
	copy bool // it reads a copy, which the agent takes away or can't: a file, or what an SDK keeps
	file bool // it reads what is on disk
	x5t  bool // what it gets dies with the SVID
	keys bool // what it gets is for those who know the JWK set only
	sdk  bool // it is a TokenSource of the SDK, which asks the agent when it renews

	ask func(context.Context) ([]served, error)

	mu   sync.Mutex
	last *served   // what was valid and served last
	got  time.Time // when that was first served
	at   time.Time // and when last
	own  time.Time // when it first was, by the agent's clock
}

// A broken answer is one that must never be given.
type broken struct{ what string }

func (b *broken) Error() string { return b.what }

func brokenf(format string, args ...any) error { return &broken{fmt.Sprintf(format, args...)} }

func (w *world) stream(u *unit, kind string, ask func(context.Context) ([]served, error)) *stream {
	s := &stream{w: w, u: u, kind: kind, ask: ask}
	w.streams = append(w.streams, s)
	return s
}

func (s *stream) run(ctx context.Context) {
	for {
		start := time.Now()
		call, cancel := context.WithTimeout(ctx, askTimeout)
		got, err := s.ask(call)
		cancel()
		if ctx.Err() != nil {
			return
		}
		s.took(start, time.Now(), got, err)
		if !pause(ctx, time.Duration((0.5+rand.Float64())*float64(askEvery))) {
			return
		}
	}
}

func (s *stream) about() string { return s.kind + " of " + s.u.name }

// took judges an answer.
func (s *stream) took(start, end time.Time, got []served, err error) {
	n := s.w.log.of(s.kind)
	n.requests.Add(1)
	var wrong *broken
	switch {
	case errors.As(err, &wrong):
		s.w.violate(s.about(), "%v", err)
		return
	case err != nil:
		s.missed(start, end, err)
		return
	}
	for _, c := range got {
		if !c.expires.After(start) {
			s.expired(start, end, c)
			return
		}
		if !s.copy && s.dead(start, c) {
			return
		}
	}
	n.served.Add(1)
	first := got[0]
	for _, c := range got[1:] { // the one that has to be renewed first
		if c.half().Before(first.half()) {
			first = c
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.last == nil || s.last.grant != first.grant {
		if first.issued.After(end) {
			first.issued = end
		}
		s.last, s.own, s.got = &first, s.u.now(), end
	}
	s.at = end
	if c := s.u.clock; c != nil && !s.copy {
		// By the agent's clock its life began no later than when it was first served.
		if over := c.at(start).Sub(s.own) - first.life; over > 0 {
			s.w.violate(s.about(), "served %v after its end by the agent's clock", over)
		}
	}
}

// dead reports whether a credential was served although the agent had confirmed its
// revocation.
func (s *stream) dead(start time.Time, c served) bool {
	r, ok := s.w.book.of(c, s.u.id.String())
	if !ok {
		return false
	}
	acked, ok := r.acked[s.u.id.String()]
	if !ok || !acked.Before(start) {
		return false
	}
	s.w.violate(s.about(), "served %s %v after the agent had confirmed its revocation", c.grant, start.Sub(acked))
	return true
}

// expired judges a credential that had expired when somebody began to ask for it. A
// file's agent may have been unable to take it away.
func (s *stream) expired(start, end time.Time, c served) {
	if s.file {
		from := c.expires.Add(-3 * time.Second)
		if s.u.down.meets(from, end) || s.w.late.meets(from, end) {
			s.missed(start, end, errors.New("expired, and nobody there to take it away"))
			return
		}
	}
	s.w.violate(s.about(), "%s had expired %v before it was asked for", c.grant, start.Sub(c.expires))
}

// missed judges a request without an answer.
func (s *stream) missed(start, end time.Time, err error) {
	n := s.w.log.of(s.kind)
	if s.u.down.meets(start, end) {
		n.down.Add(1)
		return
	}
	s.u.unserved.Add(1)
	since := s.since()
	open, notice := s.u.reach.longest(since, start), s.w.notice
	if s.keys {
		notice += spread
	}
	if open < notice {
		n.away.Add(1)
		s.w.log.unused(open)
		return
	}
	n.lost.Add(1)
	s.w.complain("LOST: "+s.about(), "%v; the broker had been reachable for %v in the %v before", err, open.Round(time.Millisecond), start.Sub(since).Round(time.Millisecond))
}

// since is from when on a reachable broker is enough for a request to be served: the
// half-life of what was served last, or the moment at which that or all else was lost.
func (s *stream) since() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	since := s.u.down.since()
	later := func(t time.Time) {
		if t.After(since) {
			since = t
		}
	}
	if s.last != nil {
		half := s.last.half()
		if c := s.u.clock; c != nil {
			half = c.real(s.own.Add(s.last.life / 2))
		}
		if r, ok := s.w.book.of(*s.last, s.u.id.String()); ok {
			half = r.heard(s.u.id.String())
		}
		later(half)
		if s.sdk && s.u.down.since().After(s.got) {
			// Nobody has asked the agent that runs now before the source renews.
			later(s.got.Add(time.Duration(sdk.RenewTo * float64(s.last.expires.Sub(s.got)))))
		}
	}
	if s.x5t {
		s.u.mu.Lock()
		later(s.u.rotated)
		if s.u.noAPI {
			later(time.Now())
		}
		s.u.mu.Unlock()
	}
	return since
}

// now is the time by the agent's clock.
func (u *unit) now() time.Time {
	if u.clock == nil {
		return time.Now()
	}
	return u.clock.now()
}

// newest is the grant that was served last by an agent.
func (w *world) newest(u *unit) (grant string) {
	var at time.Time
	for _, s := range w.streams {
		if s.u != u {
			continue
		}
		s.mu.Lock()
		if s.last != nil && s.at.After(at) {
			at, grant = s.at, s.last.grant
		}
		s.mu.Unlock()
	}
	return grant
}

// read checks a token of an agent's identity.
func (w *world) read(u *unit, raw, audience string) (served, error) {
	c, err := w.checker.check(raw, u.id, audience)
	if err != nil {
		return served{}, brokenf("%v", err)
	}
	return served{raw: raw, grant: c.grant, issued: c.issued.Add(time.Second), life: c.expires.Sub(c.issued), expires: c.expires}, nil
}

// asks has many ask an agent over its two sockets.
func (w *world) asks(u *unit) {
	for i := range 4 {
		fresh := i%2 == 0
		client := overUnix(u.http, fresh)
		w.stream(u, "HTTP", func(ctx context.Context) ([]served, error) {
			a, err := get(ctx, client, "http://agent/v1/token?audience="+goods, "")
			if err != nil {
				return nil, err
			}
			if a.status != http.StatusOK {
				return nil, a
			}
			return w.readJSON(u, a.body)
		})
	}
	for range 3 {
		client := must(sdk.New(sdk.Config{Address: "unix://" + u.grpc}))(w.t)
		w.t.Cleanup(func() { client.Close() })
		w.stream(u, "gRPC", func(ctx context.Context) ([]served, error) {
			return w.readSDK(u)(client.Issue(ctx, sdk.Request{Audience: goods}))
		})
	}
	cfg := sdk.Config{Address: "unix://" + u.grpc}
	if u.clock != nil { // it is one machine
		cfg.Now, cfg.Boot = u.clock.now, u.clock.boot
	}
	client := must(sdk.New(cfg))(w.t)
	w.t.Cleanup(func() { client.Close() })
	source := client.TokenSource(sdk.Request{Audience: goods, Scopes: []string{"read"}})
	w.t.Cleanup(source.Close)
	s := w.stream(u, "SDK token source", func(ctx context.Context) ([]served, error) { return w.readSDK(u)(source.Token(ctx)) })
	s.copy, s.sdk = true, true
	w.stream(u, "bound to the SVID", func(ctx context.Context) ([]served, error) {
		return w.readSDK(u)(client.Issue(ctx, sdk.Request{Audience: goods, Binding: token.BindingX5T}))
	}).x5t = true
}

func (w *world) readSDK(u *unit) func(*sdk.Credential, error) ([]served, error) {
	return func(c *sdk.Credential, err error) ([]served, error) {
		if err != nil {
			return nil, err
		}
		s, err := w.read(u, c.Token.Reveal(), goods)
		return []served{s}, err
	}
}

// readJSON reads what the agent answers over HTTP and writes in files.
func (w *world) readJSON(u *unit, text []byte) ([]served, error) {
	var said struct {
		AccessToken string    `json:"access_token"`
		Grant       string    `json:"grant"`
		ExpiresAt   time.Time `json:"expires_at"`
	}
	if err := json.Unmarshal(text, &said); err != nil {
		return nil, brokenf("%d bytes that are no JSON: %v", len(text), err)
	}
	s, err := w.read(u, said.AccessToken, goods)
	if err == nil && said.Grant != s.grant {
		return nil, brokenf("grant %q in the answer, %q in the token", said.Grant, s.grant)
	}
	return []served{s}, err
}

// files returns the configuration of files, and has them read.
func (w *world) files(u *unit) string {
	dir := filepath.Join(w.box.Dir, "delivered")
	if err := os.Mkdir(dir, 0o700); err != nil {
		w.t.Fatal(err)
	}
	w.readFile(u, "file", dir+"/raw.jwt", func(text []byte) ([]served, error) {
		s, err := w.read(u, string(text), goods)
		return []served{s}, err
	})
	w.readFile(u, "template", dir+"/two", func(text []byte) ([]served, error) {
		lines := strings.Split(string(text), "\n")
		if len(lines) != 3 || lines[2] != "" {
			return nil, brokenf("a template of two lines has %d", len(lines)-1)
		}
		one, err := w.read(u, lines[0], goods)
		two, err2 := w.read(u, lines[1], exchange)
		return []served{one, two}, errors.Join(err, err2)
	}).keys = true
	s := w.stream(u, "folder of files", func(context.Context) ([]served, error) { return w.readFolder(u, dir+"/all") })
	s.copy, s.file = true, true
	return fmt.Sprintf(`
files:
  - {path: %[1]s/raw.jwt, credential: {audience: %[2]s}, on_change: {command: [/bin/true]}}
  - path: %[1]s/two
    format: template
    credentials: {one: {audience: %[2]s}, two: {audience: %[3]s}}
    template: |
      {{ token "one" }}
      {{ token "two" }}
directories:
  - path: %[1]s/all
    files:
      - {name: json, format: json, credential: {audience: %[2]s}}
      - {name: env, format: env, credential: {audience: %[2]s}}
`, dir, goods, exchange)
}

func (w *world) readFile(u *unit, kind, path string, read func([]byte) ([]served, error)) *stream {
	s := w.stream(u, kind, func(context.Context) ([]served, error) {
		info, err := os.Stat(path)
		if err != nil {
			return nil, err
		}
		if info.Mode().Perm() != 0o600 {
			return nil, brokenf("%s has mode %v", path, info.Mode())
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		return read(text)
	})
	s.copy, s.file = true, true
	return s
}

// readFolder reads two files of one generation.
func (w *world) readFolder(u *unit, dir string) ([]served, error) {
	gen, err := os.OpenRoot(dir + "/..data") // what it leads to now, and stays there
	if err != nil {
		return nil, err
	}
	defer gen.Close()
	text, err := gen.ReadFile("json")
	env, err2 := gen.ReadFile("env")
	if err := errors.Join(err, err2); err != nil {
		return nil, err // taken away meanwhile
	}
	got, err := w.readJSON(u, text)
	if err != nil {
		return nil, err
	}
	if want := "DAYFLY_TOKEN=" + got[0].raw + "\n"; !strings.HasPrefix(string(env), want) {
		return nil, brokenf("the files of one folder are of two credentials, or torn")
	}
	return got, nil
}

// aws returns the configuration of a container endpoint, and asks it.
func (w *world) aws(u *unit) string {
	at := must(freePort())(w.t)
	file := filepath.Join(w.box.Dir, "aws-authorization")
	client := &http.Client{Transport: &http.Transport{}}
	for range 2 {
		s := w.stream(u, "AWS session", func(ctx context.Context) ([]served, error) {
			authorization, err := os.ReadFile(file)
			if err != nil {
				return nil, err
			}
			a, err := get(ctx, client, "http://"+at+"/v1/credentials", string(authorization))
			if err != nil {
				return nil, err
			}
			if a.status != http.StatusOK {
				return nil, a
			}
			var said struct {
				AccessKeyID string `json:"AccessKeyId"`
				Expiration  time.Time
			}
			if err := json.Unmarshal(a.body, &said); err != nil {
				return nil, brokenf("no JSON: %v", err)
			}
			issued, ok := w.sts.session(said.AccessKeyID)
			if !ok {
				return nil, brokenf("a session that nobody gave")
			}
			return []served{{grant: said.AccessKeyID, issued: issued, life: said.Expiration.Sub(issued), expires: said.Expiration}}, nil
		})
		s.keys = true
	}
	return fmt.Sprintf("aws_container: {listen: %q, audience: %s, sts_endpoint: %q, authorization_token_file: %q}\n", at, exchange, w.sts.url, file)
}
