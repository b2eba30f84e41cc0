package agent

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"google.golang.org/grpc"
)

const (
	// MaxWatched bounds what one stream of WatchService keeps fresh.
	MaxWatched = 64
	// maxHeld bounds the tokens that a caller brings along: as many as 64 credentials may
	// have had successors while they live.
	maxHeld = 256
)

// Newest returns the newest credential of a request that may be given out now, nil for
// none. The request must be among Config.Prefetch. It asks nobody.
func (a *Agent) Newest(r sdk.Request) *sdk.Credential {
	e := a.cache.find(r)
	if e == nil {
		return nil
	}
	cred, _ := a.cache.newest(e)
	return cred
}

// Refusal is why the last attempt to fetch a credential failed, nil after one that didn't.
func (a *Agent) Refusal(r sdk.Request) *sdk.Error {
	e := a.cache.find(r)
	if e == nil {
		return nil
	}
	return e.refusal()
}

// Changed returns a channel that is closed when Newest, Refusal, Alive or Revoked may
// answer otherwise next, or files have changed, but for what expires.
func (a *Agent) Changed() <-chan struct{} { return a.all.changed() }

// Alive says whether a credential may be used as far as is known: it is neither revoked nor
// bound to a certificate that this workload has no longer.
func (a *Agent) Alive(c *token.Claims) bool { return !a.cache.judged(c) }

// Revoked says whether the feed calls a credential dead.
func (a *Agent) Revoked(c *token.Claims) bool { return a.cache.revoked(c) }

// FilesThere says whether all of Config.Files are on disk.
func (a *Agent) FilesThere() bool { return a.present() == uint64(len(a.live.Load().Files)) }

// watchService is for those beside the agent who hold credentials for long.
type watchService struct {
	dayflyv1.UnimplementedWatchServiceServer
	agent *Agent
}

// Watch is one holder's stream.
func (s *watchService) Watch(m *dayflyv1.WatchRequest, stream grpc.ServerStreamingServer[dayflyv1.WatchResponse]) error {
	w, err := s.agent.newWatch(m)
	if err != nil {
		return err
	}
	defer w.close()
	for first := true; ; first = false {
		changed := w.hearer.changed() // before anything is looked at
		// Lists of who may call change, and so may the program that holds the connection.
		if err := admitted(stream.Context()); err != nil {
			return err
		}
		if resp, news := w.look(); news || first {
			if err := stream.Send(resp); err != nil {
				return err
			}
		}
		select {
		case <-changed:
		case <-s.agent.stopping:
			return stopping()
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

// A watch is what one holder wants and has.
type watch struct {
	cache   *cache
	hearer  *hearer
	entries []*entry
	sent    []watched
	held    map[string]*token.Claims // by grant: all that the holder may still present
}

// watched is what the holder was last told of one credential.
type watched struct {
	grant, refusal string
	expires        time.Time // of the grant, by the wall clock of that moment
}

// same says whether there is nothing new in what is now.
func (w *watched) same(now *watched) bool {
	return w.grant == now.grant && w.refusal == now.refusal && w.expires.Round(0).Sub(now.expires.Round(0)).Abs() < maxDrift
}

func (a *Agent) newWatch(m *dayflyv1.WatchRequest) (*watch, error) {
	if n := len(m.GetWanted()); n < 1 || n > MaxWatched {
		return nil, invalid(fmt.Sprintf("wanted: are %d, not 1 to %d", n, MaxWatched))
	}
	if len(m.GetHeld()) > maxHeld {
		return nil, invalid(fmt.Sprintf("held: are more than %d", maxHeld))
	}
	w := &watch{cache: a.cache, hearer: a.cache.hear(), held: map[string]*token.Claims{}, sent: make([]watched, len(m.GetWanted()))}
	for _, raw := range m.GetHeld() {
		t, err := token.Inspect(raw)
		if err != nil {
			return nil, invalid("held: not a token")
		}
		w.held[t.Grant().String()] = &t.Claims
	}
	for i, one := range m.GetWanted() {
		r, err := toRequest(one)
		if err == nil {
			if wrong := r.normalize(); wrong != nil {
				err = invalid(fmt.Sprintf("wanted %d: %v", i+1, wrong))
			}
		}
		var e *entry
		if err == nil {
			e, err = a.cache.acquire(r)
		}
		if err != nil {
			w.close()
			return nil, err
		}
		a.cache.watch(e)
		w.entries = append(w.entries, e)
		w.hearer.of[r.key()] = true
	}
	return w, nil
}

func (w *watch) close() {
	w.hearer.gone()
	for _, e := range w.entries {
		w.cache.release(e, errUnwatched)
	}
}

// errUnwatched lets go of an entry that nobody may want any more.
var errUnwatched = errors.New("nobody watches")

// look says what there is to tell, and whether any of it is news.
func (w *watch) look() (*dayflyv1.WatchResponse, bool) {
	resp, news := &dayflyv1.WatchResponse{}, false
	all := make([]watched, len(w.entries))
	for i, e := range w.entries {
		now, one := &all[i], &dayflyv1.Watched{}
		if cred, claims := w.cache.newest(e); cred != nil {
			now.grant, now.expires, one.Credential = cred.Grant, cred.Expires, message(cred)
			w.held[cred.Grant] = claims
		}
		if r := e.refusal(); r != nil {
			now.refusal, one.Refusal = r.Error(), &dayflyv1.Refusal{Code: int32(r.Code), Reason: r.Reason, Message: r.Message, Hint: r.Hint}
		}
		news = news || !now.same(&w.sent[i])
		resp.Watched = append(resp.Watched, one)
	}
	for _, grant := range slices.Sorted(maps.Keys(w.held)) {
		switch claims := w.held[grant]; {
		case w.cache.revoked(claims):
			resp.Revoked, news = append(resp.Revoked, grant), true
			delete(w.held, grant)
		case w.cache.now().After(claims.Expires.Add(token.Leeway)):
			delete(w.held, grant)
		}
	}
	if news {
		w.sent = all
	}
	return resp, news
}

// watch renews an entry ahead from now on: somebody waits for all it will ever hold.
func (c *cache) watch(e *entry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.keep(e)
}

// refusal is why the last fetch failed, as callers hear it; nil if it didn't.
func (e *entry) refusal() *sdk.Error {
	var refusal *sdk.Error
	if err := e.source.Status().Err; err != nil {
		errors.As(sdk.FromRPC(upstreamError(sdk.FromRPC(err))), &refusal)
	}
	return refusal
}

// revoked reports whether the feed calls claims dead.
func (c *cache) revoked(claims *token.Claims) bool {
	switch c.judge(revocation.SubjectOf(claims)).Reason {
	case revocation.Alive, revocation.Ahead:
		return false
	}
	return true
}
