package sdk_test

import (
	"context"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
)

// bound is a source of credentials that go with a certificate, by its number: what is
// fetched is bound to the one that is current when the fetch begins, unless it is behind.
type bound struct {
	*sdk.TokenSource
	m       *mint
	current atomic.Int64
	behind  atomic.Int64
	keeps   atomic.Bool
}

func newBound(t *testing.T) *bound {
	t.Helper()
	b := &bound{m: &mint{life: 5 * time.Minute, delay: time.Second}}
	b.keeps.Store(true)
	of := map[string]int64{} // the certificate of each grant
	var mu sync.Mutex
	s, err := sdk.NewTokenSource(sdk.SourceConfig{
		Fetch: func(ctx context.Context) (*sdk.Credential, error) {
			certificate := b.current.Load() - b.behind.Load()
			cred, err := b.m.fetch(ctx)
			if err == nil {
				cred.Binding = token.BindingX5T
				mu.Lock()
				of[cred.Grant] = certificate
				mu.Unlock()
			}
			return cred, err
		},
		Fits: func(c *sdk.Credential) bool {
			mu.Lock()
			defer mu.Unlock()
			return of[c.Grant] == b.current.Load()
		},
		Keeps: func(*sdk.Credential) bool { return b.keeps.Load() },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	b.TokenSource = s
	return b
}

func (b *bound) calls() int {
	b.m.mu.Lock()
	defer b.m.mu.Unlock()
	return b.m.calls
}

// all has many ask at once.
func (b *bound) all(t *testing.T, want string) {
	t.Helper()
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() { wantGrant(t, b.TokenSource, want) })
	}
	wg.Wait()
}

// What is bound to a certificate is not given out once that has rotated: whoever asks
// waits for the next one, which is fetched once.
func TestSourceFollowsTheCertificate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBound(t)
		b.all(t, "g1")
		b.current.Add(1)
		b.all(t, "g2")
		b.all(t, "g2")

		// It rotates while a fetch is under way: what comes is of no use, and nobody gets it.
		b.current.Add(1)
		go func() {
			time.Sleep(time.Second / 2)
			b.current.Add(1)
		}()
		b.all(t, "g4")
		if n := b.calls(); n != 4 {
			t.Errorf("%d fetches, want 4", n)
		}
	})
}

// With Run the next credential is fetched before anybody asks.
func TestSourceFollowsTheCertificateAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBound(t)
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- b.Run(ctx) }()
		time.Sleep(time.Minute)
		b.current.Add(1)
		time.Sleep(2 * time.Second)
		synctest.Wait()
		began := time.Now()
		wantGrant(t, b.TokenSource, "g2")
		if waited := time.Since(began); waited != 0 {
			t.Errorf("waited %v for it", waited)
		}
		stop()
		<-done
	})
}

// Where every credential is bound to another certificate, by a proxy for example, that is
// an error, and the broker isn't asked without pause.
func TestSourceNeverFits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBound(t)
		b.behind.Store(1)
		began := time.Now()
		for time.Since(began) < time.Minute {
			if _, err := b.Token(t.Context()); err == nil || !strings.Contains(err.Error(), "another certificate") {
				t.Fatalf("got %v", err)
			}
			time.Sleep(10 * time.Millisecond)
		}
		if n := b.calls(); n < 3 || n > 60 {
			t.Errorf("%d fetches in a minute", n)
		}
		b.behind.Store(0)
		time.Sleep(time.Second)
		if _, err := b.Token(t.Context()); err != nil {
			t.Errorf("once they fit: %v", err)
		}
	})
}

// What can't be judged isn't kept: it goes to those who wait for it, and the next one asks
// anew. Run has nothing to do then.
func TestSourceKeepsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBound(t)
		b.keeps.Store(false)
		b.all(t, "g1")
		b.all(t, "g2")
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- b.Run(ctx) }()
		time.Sleep(time.Hour)
		if n := b.calls(); n != 2 {
			t.Errorf("%d fetches, want 2", n)
		}
		wantGrant(t, b.TokenSource, "g3")
		stop()
		<-done
	})
}
