package agent

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// Pauses between attempts at the Workload API: it is on this host, and starting later
// than its workloads is its habit.
const (
	minIdentityPause = 200 * time.Millisecond
	maxIdentityPause = 3 * time.Second
)

// ErrNoIdentity is what an Identity answers before the Workload API has given an SVID.
var ErrNoIdentity = errors.New("the Workload API has given no SVID yet")

// An Identity is the workload's SVID and bundles, as the Workload API gives and rotates
// them. Until the first one is there it answers ErrNoIdentity, so that the agent may
// start before its Workload API.
type Identity struct {
	addr string
	log  *slog.Logger

	mu      sync.Mutex
	source  *workloadapi.X509Source // nil before the first SVID
	changed chan struct{}           // closed at every change
}

// NewIdentity returns an identity that asks the Workload API at addr
// (unix:///path), or at SPIFFE_ENDPOINT_SOCKET if that is empty. Run does the asking.
func NewIdentity(addr string, log *slog.Logger) *Identity {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Identity{addr: addr, log: log, changed: make(chan struct{})}
}

// Run follows the Workload API until ctx ends, and then returns nil.
func (i *Identity) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(i.options()...))
		if err != nil {
			if ctx.Err() == nil {
				i.log.WarnContext(ctx, "asking the Workload API", "err", err)
			}
			sleep(ctx, maxIdentityPause)
			continue
		}
		i.follow(ctx, source)
	}
	return nil
}

func (i *Identity) options() []workloadapi.ClientOption {
	options := []workloadapi.ClientOption{workloadapi.WithBackoffStrategy(pauses{})}
	if i.addr != "" {
		options = append(options, workloadapi.WithAddr(i.addr))
	}
	return options
}

// follow passes on what the source learns until ctx ends.
func (i *Identity) follow(ctx context.Context, source *workloadapi.X509Source) {
	i.set(source)
	defer func() {
		i.set(nil)
		_ = source.Close()
	}()
	if svid, err := source.GetX509SVID(); err == nil {
		i.log.InfoContext(ctx, "got an identity", "spiffe_id", svid.ID.String(), "expires", svid.Certificates[0].NotAfter)
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-source.Updated():
			i.set(source)
		}
	}
}

func (i *Identity) set(source *workloadapi.X509Source) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.source = source
	close(i.changed)
	i.changed = make(chan struct{})
}

// Changed returns a channel that is closed when the SVID or a bundle changes next.
func (i *Identity) Changed() <-chan struct{} {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.changed
}

func (i *Identity) current() (*workloadapi.X509Source, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.source == nil {
		return nil, ErrNoIdentity
	}
	return i.source, nil
}

// GetX509SVID returns the current SVID, or ErrNoIdentity.
func (i *Identity) GetX509SVID() (*x509svid.SVID, error) {
	source, err := i.current()
	if err != nil {
		return nil, err
	}
	return source.GetX509SVID()
}

// GetX509BundleForTrustDomain returns a bundle, or ErrNoIdentity.
func (i *Identity) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	source, err := i.current()
	if err != nil {
		return nil, err
	}
	return source.GetX509BundleForTrustDomain(td)
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
