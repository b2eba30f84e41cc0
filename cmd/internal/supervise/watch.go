package supervise

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/dayflyhq/dayfly/sdk"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
)

// Pauses between streams: the agent is on this host, and restarts within moments.
const (
	minPause = 100 * time.Millisecond
	maxPause = 2 * time.Second
)

// maxHeld is as many tokens as an agent judges for one caller.
const maxHeld = 256

// A Watcher is the Keeper that an agent at its socket is. While the agent is away, what it
// gave is good until it expires.
type Watcher struct {
	client dayflyv1.WatchServiceClient
	wanted []sdk.Request

	mu      sync.Mutex
	of      map[string]*watched
	held    map[string]*sdk.Credential // by grant: all that may still be presented
	revoked map[string]bool
	trouble error
	changed chan struct{}
}

type watched struct {
	cred    *sdk.Credential
	refusal *sdk.Error
}

// NewWatcher watches over a connection to an agent. Run does the work.
func NewWatcher(conn grpc.ClientConnInterface, wanted []sdk.Request) *Watcher {
	w := &Watcher{
		client: dayflyv1.NewWatchServiceClient(conn), wanted: wanted, of: map[string]*watched{},
		held: map[string]*sdk.Credential{}, revoked: map[string]bool{}, changed: make(chan struct{}),
	}
	for _, r := range wanted {
		w.of[key(r)] = &watched{}
	}
	return w
}

// Run watches until ctx ends.
func (w *Watcher) Run(ctx context.Context) {
	pause := minPause
	for ctx.Err() == nil {
		heard, err := w.follow(ctx)
		if heard {
			pause = minPause
		}
		w.broke(err)
		timer := time.NewTimer(pause/2 + rand.N(pause/2))
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
		timer.Stop()
		pause = min(2*pause, maxPause)
	}
}

// follow is one stream; it says whether anything came.
func (w *Watcher) follow(ctx context.Context) (heard bool, err error) {
	stream, err := w.client.Watch(ctx, w.request(), grpc.MaxCallSendMsgSize(agent.MaxWatchBytes))
	if err != nil {
		return false, err
	}
	for {
		m, err := stream.Recv()
		if err != nil {
			return heard, err
		}
		if err := w.take(m); err != nil {
			return heard, err
		}
		heard = true
	}
}

func (w *Watcher) request() *dayflyv1.WatchRequest {
	w.mu.Lock()
	defer w.mu.Unlock()
	m := &dayflyv1.WatchRequest{}
	for _, r := range w.wanted {
		one := &dayflyv1.IssueRequest{Audience: r.Audience, Scopes: r.Scopes, Binding: wire.Binding(r.Binding)}
		if r.TTL > 0 {
			one.Ttl = durationpb.New(r.TTL)
		}
		m.Wanted = append(m.Wanted, one)
	}
	for _, c := range w.held {
		if len(m.Held) < maxHeld {
			m.Held = append(m.Held, c.Token.Reveal())
		}
	}
	return m
}

// broke notes why a stream ended. What no agent will ever answer otherwise is a refusal.
func (w *Watcher) broke(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.trouble = err
	var e *sdk.Error
	if errors.As(sdk.FromRPC(err), &e) && stands(e.Code) {
		if e.Code == codes.Unimplemented {
			e = &sdk.Error{Code: e.Code, Message: "the agent tells nobody what becomes of credentials: it is older than this command"}
		}
		for _, one := range w.of {
			one.refusal = e
		}
	}
	w.ring()
}

// ring wakes who waits; mu is held.
func (w *Watcher) ring() {
	close(w.changed)
	w.changed = make(chan struct{})
}

func (w *Watcher) take(m *dayflyv1.WatchResponse) error {
	if len(m.GetWatched()) != len(w.wanted) {
		return errors.New("the agent doesn't answer what it was asked")
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	defer w.ring()
	w.trouble = nil
	now := time.Now()
	for grant, c := range w.held {
		if now.After(c.Expires) {
			delete(w.held, grant)
			delete(w.revoked, grant)
		}
	}
	for _, grant := range m.GetRevoked() {
		if w.held[grant] != nil {
			w.revoked[grant] = true
		}
	}
	for i, one := range m.GetWatched() {
		at := w.of[key(w.wanted[i])]
		*at = watched{refusal: refusal(one.GetRefusal())}
		c := one.GetCredential()
		if c == nil {
			continue
		}
		binding, err := wire.ToBinding(c.GetBinding())
		if err != nil || !c.GetExpiresAt().IsValid() || !c.GetIssuedAt().IsValid() {
			return errors.New("the agent gives a credential that can't be read")
		}
		at.cred = &sdk.Credential{
			Token: token.NewSecret(c.GetToken()), Grant: c.GetGrant(), Audience: c.GetAudience(), Scopes: c.GetScopes(),
			Binding: binding, IssuedAt: c.GetIssuedAt().AsTime(),
			// Its clock is ours; and by the monotonic one too, which nobody sets.
			Expires: now.Add(c.GetExpiresAt().AsTime().Sub(now)),
		}
		w.held[c.GetGrant()] = at.cred
	}
	return nil
}

func refusal(r *dayflyv1.Refusal) *sdk.Error {
	if r == nil {
		return nil
	}
	return &sdk.Error{Code: codes.Code(uint32(r.GetCode())), Reason: r.GetReason(), Message: r.GetMessage(), Hint: r.GetHint()}
}

func (w *Watcher) find(r sdk.Request) watched {
	w.mu.Lock()
	defer w.mu.Unlock()
	if one := w.of[key(r)]; one != nil {
		return *one
	}
	return watched{}
}

// Newest implements Keeper, as do the others.
func (w *Watcher) Newest(r sdk.Request) *sdk.Credential {
	c := w.find(r).cred
	if c == nil || (&held{expires: c.Expires}).over(time.Now()) || w.isRevoked(c.Grant) {
		return nil
	}
	return c
}

// Refusal implements Keeper.
func (w *Watcher) Refusal(r sdk.Request) *sdk.Error { return w.find(r).refusal }

// Changed implements Keeper.
func (w *Watcher) Changed() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.changed
}

// Alive implements Keeper.
func (w *Watcher) Alive(c *token.Claims) bool { return !w.Revoked(c) }

// Revoked implements Keeper.
func (w *Watcher) Revoked(c *token.Claims) bool { return w.isRevoked(c.Grant().String()) }

func (w *Watcher) isRevoked(grant string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.revoked[grant]
}

// Trouble implements Keeper.
func (w *Watcher) Trouble() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.trouble == nil {
		return ""
	}
	return "the agent: " + w.trouble.Error()
}
