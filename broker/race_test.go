package broker_test

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/revocation"
)

// Many issue and exchange while an identity is revoked. Every token that anyone ever
// got was issued before the revocation and is dead, or with knowledge of it; and once
// the revoke has returned, whoever asks is refused by its lock.
func TestIssueWhileRevoking(t *testing.T) {
	w := newWorld(t)
	for round := range 6 {
		mode := []broker.LockMode{broker.LockQuarantine, broker.LockNone}[round%2]
		t.Run(fmt.Sprintf("%s %d", mode, round), func(t *testing.T) { issueWhileRevoking(t, w, fmt.Sprintf("payments-%d", round), mode) })
	}
}

func issueWhileRevoking(t *testing.T, w *world, name string, mode broker.LockMode) {
	hop := id("hop-of-" + name)
	var (
		mu       sync.Mutex
		got      []*broker.Credential
		done     atomic.Bool // the revoke has returned
		enough   = make(chan struct{})
		released atomic.Int32
		wg       sync.WaitGroup
	)
	keep := func(cred *broker.Credential, err error, knew bool) {
		locked := errors.Is(err, broker.ErrLocked) || errors.Is(err, broker.ErrSubjectRevoked)
		if err != nil && !locked && !errors.Is(err, broker.ErrBusy) {
			t.Errorf("unexpected: %v", err)
		}
		if err == nil && knew && mode == broker.LockQuarantine {
			t.Errorf("%s got a credential after its quarantine", name)
		}
		if err == nil {
			mu.Lock()
			got = append(got, cred)
			mu.Unlock()
			if released.Add(1) == 40 {
				close(enough)
			}
		}
	}
	for range 8 {
		root, deriver := w.caller(name), w.callerWith(hop, spiffeOptions)
		wg.Go(func() {
			for after := 0; after < 5; {
				knew := done.Load()
				cred, err := w.b.Issue(ctx, root, broker.Request{Audience: hop.String()})
				keep(cred, err, knew)
				if err == nil {
					knew := done.Load()
					derived, err := w.b.Exchange(ctx, deriver, broker.Request{Audience: "far", Subject: cred.Token})
					keep(derived, err, knew)
				}
				if knew {
					after++
				}
			}
		})
	}
	<-enough
	rec := w.revoke(mode, revocation.Identity(id(name)))
	done.Store(true)
	wg.Wait()

	before := 0
	for _, cred := range got {
		v := w.verdict(cred.Token)
		if rev := cred.Grant.Position.Seq; rev < rec.Seq {
			before++
			if v != revocation.Revoked {
				t.Errorf("a token of position %d is %s after revocation %d", rev, v, rec.Seq)
			}
			continue
		}
		if mode == broker.LockQuarantine {
			t.Errorf("a token was issued at position %d under the quarantine of %d", cred.Grant.Position.Seq, rec.Seq)
		}
		// Only those whose whole lineage was issued with knowledge of it live on.
		if v != revocation.Alive {
			t.Errorf("issued with knowledge of the revocation, and %s", v)
		}
		parent := cred.Grant.Parent()
		if cred.Grant.Derived() {
			if g, err := w.b.Grant(ctx, parent); err != nil || g.Position.Seq < rec.Seq {
				t.Errorf("derived after the revocation from a grant of before it: %+v, %v", g, err)
			}
		}
	}
	if before < 40 {
		t.Errorf("only %d of %d tokens are from before the revocation", before, len(got))
	}
}
