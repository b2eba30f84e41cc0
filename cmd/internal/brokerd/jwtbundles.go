package brokerd

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// jwtBundles are the authorities of JWT-SVIDs, as the Workload API gives and rotates
// them. Before it has given any, and where it has none to give, no JWT-SVID is good.
type jwtBundles struct {
	addr string
	log  *slog.Logger

	mu   sync.Mutex
	set  *jwtbundle.Set
	told bool // of an error, since the last update
}

var errNoJWTBundles = errors.New("the Workload API has given no JWT bundles yet")

func (b *jwtBundles) GetJWTBundleForTrustDomain(td spiffeid.TrustDomain) (*jwtbundle.Bundle, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.set == nil {
		return nil, errNoJWTBundles
	}
	return b.set.GetJWTBundleForTrustDomain(td)
}

// run follows the Workload API until ctx ends.
func (b *jwtBundles) run(ctx context.Context) error {
	var options []workloadapi.ClientOption
	if b.addr != "" {
		options = append(options, workloadapi.WithAddr(b.addr))
	}
	for ctx.Err() == nil {
		if err := workloadapi.WatchJWTBundles(ctx, b, options...); err != nil && ctx.Err() == nil {
			b.OnJWTBundlesWatchError(err)
		}
		select {
		case <-time.After(reopenAfter):
		case <-ctx.Done():
		}
	}
	return nil
}

// OnJWTBundlesUpdate is called by the Workload API's client.
func (b *jwtBundles) OnJWTBundlesUpdate(set *jwtbundle.Set) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.set, b.told = set, false
}

// OnJWTBundlesWatchError is called by the Workload API's client, which tries again. What
// it gave stays in force, as X.509 bundles do.
func (b *jwtBundles) OnJWTBundlesWatchError(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.told {
		b.told = true
		b.log.Warn("asking the workload api for jwt bundles", "err", err)
	}
}
