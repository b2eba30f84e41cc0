package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Pauses between attempts at the Workload API: it is on this host, and starting later
// than its workloads is its habit.
const (
	minIdentityPause = 200 * time.Millisecond
	maxIdentityPause = 3 * time.Second
)

// ErrNoIdentity is what an Identity answers before the Workload API has answered.
var ErrNoIdentity = errors.New("the Workload API has given no SVID yet")

// A NotIssuedError says that the Workload API has answered, and without the SVID that is
// wanted. Whatever was got with that SVID is of no more use to this workload.
type NotIssuedError struct {
	ID       spiffeid.ID   // zero: any
	Returned []spiffeid.ID // what it returned in its place
}

func (e *NotIssuedError) Error() string {
	wanted, returned := "", "none"
	if !e.ID.IsZero() {
		wanted = " for " + e.ID.String()
	}
	if len(e.Returned) > 0 {
		names := make([]string, len(e.Returned))
		for i, id := range e.Returned {
			names[i] = id.String()
		}
		returned = strings.Join(names, ", ")
	}
	return fmt.Sprintf("the Workload API returns no SVID%s; it returned %s", wanted, returned)
}

// Identities are the SVIDs and bundles that a Workload API gives and rotates. Its views,
// one for each workload, show one SVID each.
//
// While the Workload API can't be reached what it gave last goes on. What it stops
// returning isn't shown any more, nor is anything once it says that there is no identity
// (PermissionDenied).
type Identities struct {
	addr string
	log  *slog.Logger

	mu      sync.Mutex
	context *workloadapi.X509Context // nil before the first answer
	bundles *x509bundle.Set          // the last that came
	failing bool                     // was said
	views   map[spiffeid.ID]*Identity
}

// NewIdentities returns what asks the Workload API at addr (unix:///path), or at
// SPIFFE_ENDPOINT_SOCKET if that is empty. Run does the asking.
func NewIdentities(addr string, log *slog.Logger) *Identities {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Identities{addr: addr, log: log, views: map[spiffeid.ID]*Identity{}}
}

// Identity returns the view of one SVID; that of the zero ID shows the first.
func (i *Identities) Identity(id spiffeid.ID) *Identity {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.views[id] == nil {
		i.views[id] = &Identity{all: i, id: id, changed: make(chan struct{})}
	}
	return i.views[id]
}

// Run follows the Workload API until ctx ends, and then returns nil.
func (i *Identities) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		if err := i.watch(ctx); ctx.Err() == nil {
			i.failed(ctx, err)
			sleep(ctx, maxIdentityPause)
		}
	}
	return nil
}

func (i *Identities) watch(ctx context.Context) error {
	options := []workloadapi.ClientOption{workloadapi.WithBackoffStrategy(pauses{})}
	if i.addr != "" {
		options = append(options, workloadapi.WithAddr(i.addr))
	}
	client, err := workloadapi.New(ctx, options...)
	if err != nil {
		return err
	}
	defer client.Close()
	return client.WatchX509Context(ctx, watcher{i, ctx})
}

// watcher hears what the Workload API says.
type watcher struct {
	*Identities
	ctx context.Context
}

func (w watcher) OnX509ContextUpdate(c *workloadapi.X509Context) { w.set(w.ctx, c) }

func (w watcher) OnX509ContextWatchError(err error) {
	if w.ctx.Err() == nil {
		w.failed(w.ctx, err)
	}
}

// failed notes an error: once in a row in the log, and as an answer where it is one.
func (i *Identities) failed(ctx context.Context, err error) {
	i.mu.Lock()
	said := i.failing
	i.failing = true
	i.mu.Unlock()
	if !said {
		i.log.WarnContext(ctx, "asking the Workload API", "err", err)
	}
	if status.Code(err) == codes.PermissionDenied {
		i.set(ctx, &workloadapi.X509Context{})
	}
}

// set takes an answer, and wakes the views for which it is news.
func (i *Identities) set(ctx context.Context, c *workloadapi.X509Context) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if len(c.SVIDs) > 0 {
		i.failing = false
	}
	before := make(map[*Identity][]byte, len(i.views))
	for _, v := range i.views {
		before[v] = v.leaf()
	}
	known := i.context != nil
	i.context = c
	otherBundles := c.Bundles != nil && !sameBundles(i.bundles, c.Bundles)
	if otherBundles {
		i.bundles = c.Bundles
	}
	for _, v := range i.views {
		other := !bytes.Equal(before[v], v.leaf())
		if svid, err := v.get(); err != nil && (other || !known) {
			i.log.WarnContext(ctx, "an identity is missing", "err", err)
		} else if other {
			i.log.InfoContext(ctx, "got an identity", "spiffe_id", svid.ID.String(), "expires", svid.Certificates[0].NotAfter)
		}
		if other || otherBundles || !known {
			close(v.changed)
			v.changed = make(chan struct{})
		}
	}
}

func sameBundles(a, b *x509bundle.Set) bool {
	if a == nil || a.Len() != b.Len() {
		return false
	}
	for _, one := range b.Bundles() {
		if other, ok := a.Get(one.TrustDomain()); !ok || !other.Equal(one) {
			return false
		}
	}
	return true
}

// An Identity is one workload's SVID and the bundles. Until there is one it answers
// ErrNoIdentity or a *NotIssuedError, so that the agent may start before its Workload API.
type Identity struct {
	all     *Identities
	id      spiffeid.ID
	changed chan struct{} // guarded by all.mu; closed at every change
}

// NewIdentity is the view of the first SVID of a Workload API of its own. Its Run must be
// called.
func NewIdentity(addr string, log *slog.Logger) *Identity {
	return NewIdentities(addr, log).Identity(spiffeid.ID{})
}

// Run follows the Workload API, for all its views, until ctx ends, and then returns nil.
func (i *Identity) Run(ctx context.Context) error { return i.all.Run(ctx) }

// Changed returns a channel that is closed when the SVID or a bundle changes next.
func (i *Identity) Changed() <-chan struct{} {
	i.all.mu.Lock()
	defer i.all.mu.Unlock()
	return i.changed
}

// GetX509SVID returns the current SVID, or ErrNoIdentity, or a *NotIssuedError.
func (i *Identity) GetX509SVID() (*x509svid.SVID, error) {
	i.all.mu.Lock()
	defer i.all.mu.Unlock()
	return i.get()
}

// get needs all.mu.
func (i *Identity) get() (*x509svid.SVID, error) {
	if i.all.context == nil {
		return nil, ErrNoIdentity
	}
	for _, svid := range i.all.context.SVIDs {
		if i.id.IsZero() || svid.ID == i.id {
			return svid, nil
		}
	}
	missing := &NotIssuedError{ID: i.id}
	for _, svid := range i.all.context.SVIDs {
		missing.Returned = append(missing.Returned, svid.ID)
	}
	return nil, missing
}

// leaf is the certificate, nil for none; it needs all.mu.
func (i *Identity) leaf() []byte {
	svid, err := i.get()
	if err != nil {
		return nil
	}
	return svid.Certificates[0].Raw
}

// GetX509BundleForTrustDomain returns a bundle, or ErrNoIdentity.
func (i *Identity) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	i.all.mu.Lock()
	defer i.all.mu.Unlock()
	if i.all.bundles == nil {
		return nil, ErrNoIdentity
	}
	return i.all.bundles.GetX509BundleForTrustDomain(td)
}

// pauses doubles from the shortest to the longest.
type pauses struct{}

func (pauses) NewBackoff() workloadapi.Backoff { return &pause{} }

type pause struct{ last time.Duration }

func (p *pause) Next() time.Duration {
	p.last = min(max(2*p.last, minIdentityPause), maxIdentityPause)
	return p.last
}

func (p *pause) Reset() { p.last = 0 }

// sleep waits, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}
