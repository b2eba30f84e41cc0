package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/dayflyhq/dayfly/policy"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"golang.org/x/sync/errgroup"
)

const (
	// repeats of one round of what is measured in this process.
	repeats = 1000
	// repeatsOfSeen are those of a token that is seen again: it takes about a
	// microsecond, and a round is not to be over before anything else has run.
	repeatsOfSeen = 20 * repeats
)

// verifyRows: a resource server's local check, of a token that it has never seen, and of
// one that it just saw.
func verifyRows(s size) []row {
	var rows []row
	for _, depth := range s.depths {
		for _, again := range []bool{false, true} {
			r := row{row: "verify", name: fmt.Sprintf("first time, depth %d", depth), fixture: tokens, unit: inSeconds, series: "verify, first time", x: float64(depth)}
			if again {
				r.name, r.series = fmt.Sprintf("again, depth %d", depth), "verify, again"
			}
			switch {
			case again && depth == 1:
				r.target = atMost(0.02)
			case again && depth == 6:
				r.target = atMost(0.04)
			case depth == 1 || depth == 6:
				r.target = atMost(1.1)
			}
			r.setup = func(ctx context.Context, l *lab) (pair, error) {
				b, err := l.started(ctx, tokens)
				if err != nil {
					return pair{}, err
				}
				raw, err := b.distinct(ctx, l.size.tokens, depth)
				if err != nil {
					return pair{}, err
				}
				key, err := b.publicKey(ctx)
				if err != nil {
					return pair{}, err
				}
				ours, err := b.verifying(ctx, raw, depth, again)
				return pair{
					ours: ours,
					floor: func(context.Context) (sample, error) {
						return repeat(len(raw), func(i int) error {
							_, err := verifyJWT(key, raw[i])
							return err
						})
					},
				}, err
			}
			rows = append(rows, r)
		}
	}
	return rows
}

// distinct are so many tokens of a depth.
func (b *box) distinct(ctx context.Context, n, depth int) ([]string, error) {
	return shared(b.lab, fmt.Sprintf("tokens of depth %d of %s", depth, b.Dir), func() ([]string, error) {
		c, err := b.client(hop(depth - 1))
		if err != nil {
			return nil, err
		}
		above := ""
		if depth > 1 {
			if above, err = b.chain(ctx, depth-1); err != nil {
				return nil, err
			}
		}
		out := make([]string, n)
		group, ctx := errgroup.WithContext(ctx)
		group.SetLimit(exchangeCallers)
		for i := range out {
			group.Go(func() (err error) {
				out[i], err = obtain(ctx, c, above, depth)
				return err
			})
		}
		return out, group.Wait()
	})
}

// verifying measures a verifier that follows the box's broker. For what is seen for the
// first time each round has a verifier of its own.
func (b *box) verifying(ctx context.Context, raw []string, depth int, again bool) (side, error) {
	peer := verify.Peer{ID: hop(depth - 1), Address: "192.0.2.1"}
	if again {
		v, err := b.verifier(ctx)
		if err != nil {
			return nil, err
		}
		return func(ctx context.Context) (sample, error) {
			if _, err := v.Verify(ctx, raw[0], peer); err != nil {
				return sample{}, err
			}
			return repeat(repeatsOfSeen, func(int) error {
				_, err := v.Verify(ctx, raw[0], peer)
				return err
			})
		}, nil
	}
	return func(ctx context.Context) (sample, error) {
		v, err := b.verifier(ctx)
		if err != nil {
			return sample{}, err
		}
		return repeat(len(raw), func(i int) error {
			_, err := v.Verify(ctx, raw[i], peer)
			return err
		})
	}, nil
}

// verifier is one of all audiences, and fresh.
func (b *box) verifier(ctx context.Context) (*verify.Verifier, error) {
	client, err := b.client(verifier)
	if err != nil {
		return nil, err
	}
	var audiences []string
	for d := 1; d <= 6; d++ {
		audiences = append(audiences, audience(d))
	}
	v, err := verify.New(verify.Config{Conn: client.Conn(), Audiences: audiences, Bundles: b.TD.Source(verifier)})
	if err != nil {
		return nil, err
	}
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan struct{})
	go func() { defer close(done); v.Run(run) }()
	b.lab.onEnd(func() { cancel(); <-done })
	return v, v.WaitReady(ctx)
}

// publicKey is the one that the broker signs with, from its JWK set.
func (b *box) publicKey(ctx context.Context) (*ecdsa.PublicKey, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+b.Info.Public+"/jwks.json", nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var set struct{ Keys []struct{ X, Y string } }
	if err := json.NewDecoder(resp.Body).Decode(&set); err != nil {
		return nil, fmt.Errorf("reading the JWK set: %w", err)
	}
	if len(set.Keys) != 1 {
		return nil, fmt.Errorf("the JWK set has %d keys, not the one of a broker that just started", len(set.Keys))
	}
	x, xErr := base64.RawURLEncoding.DecodeString(set.Keys[0].X)
	y, yErr := base64.RawURLEncoding.DecodeString(set.Keys[0].Y)
	if err := errors.Join(xErr, yErr); err != nil {
		return nil, err
	}
	return ecdsa.ParseUncompressedPublicKey(elliptic.P256(), slices.Concat([]byte{4}, x, y))
}

// revokedSetRows: what a set of revocations costs each verification. The tokens are older
// than all of them, so that each could matter.
func revokedSetRows(s size) []row {
	if s.revocations == 0 {
		return nil
	}
	var rows []row
	for _, again := range []bool{false, true} {
		r := row{row: "verify", name: groups(s.revocations) + " revocations, first time, depth 6", fixture: "revoked set", unit: inSeconds, target: atMost(1.1)}
		if again {
			r.name = groups(s.revocations) + " revocations, again, depth 6"
		}
		r.setup = func(ctx context.Context, l *lab) (pair, error) {
			empty, err := l.started(ctx, "empty")
			if err != nil {
				return pair{}, err
			}
			raw, err := empty.distinct(ctx, l.size.tokens, 6)
			if err != nil {
				return pair{}, err
			}
			full, err := l.started(ctx, "full")
			if err != nil {
				return pair{}, err
			}
			old, err := full.distinct(ctx, l.size.tokens, 6)
			if err != nil {
				return pair{}, err
			}
			if _, err := shared(l, "revoked", func() (bool, error) { return true, full.revokeOthers(ctx, s.revocations) }); err != nil {
				return pair{}, err
			}
			ours, err := full.verifying(ctx, old, 6, again)
			if err != nil {
				return pair{}, err
			}
			floor, err := empty.verifying(ctx, raw, 6, again)
			return pair{ours, floor}, err
		}
		rows = append(rows, r)
	}
	return rows
}

// revokeOthers makes revocations of identities that no token here has, one each.
func (b *box) revokeOthers(ctx context.Context, n int) error {
	alice, err := b.client(sandbox.Alice)
	if err != nil {
		return err
	}
	client := dayflyv1.NewRevocationServiceClient(alice.Conn())
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(64)
	for i := range n {
		group.Go(func() error { return revoke(ctx, client, benchID(fmt.Sprintf("gone/%d", i)).String()) })
	}
	return group.Wait()
}

// revoke is of an identity, without a lock.
func revoke(ctx context.Context, client dayflyv1.RevocationServiceClient, identity string) error {
	_, err := insist(ctx, func() error {
		_, err := client.Revoke(ctx, &dayflyv1.RevokeRequest{
			Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Identity{Identity: identity}}},
			LockMode:  dayflyv1.LockMode_LOCK_MODE_NONE, Reason: "bench",
		})
		return err
	})
	return err
}

// policyRows: one decision of the default rules, in this process.
func policyRows(s size) []row {
	var rows []row
	for _, n := range s.entitlements {
		r := row{row: "policy", name: groups(n) + " entitlements", fixture: "policy", unit: inSeconds, target: atMost(1.2), series: "policy", x: float64(n)}
		r.setup = func(ctx context.Context, l *lab) (pair, error) { return l.deciding(ctx, n) }
		rows = append(rows, r)
	}
	return rows
}

// deciding measures decisions of the demo's policy with more entitlements, and signing.
func (l *lab) deciding(ctx context.Context, n int) (pair, error) {
	p, err := shared(l, fmt.Sprintf("policy %d", n), func() (*policy.Policy, error) {
		dir := filepath.Join(l.newDir(fmt.Sprintf("policy %d", n)), "policy")
		if err := policy.WriteDemo(dir); err != nil {
			return nil, err
		}
		var b strings.Builder
		b.WriteString("entitlements:\n")
		for i := range n {
			fmt.Fprintf(&b, "  spiffe://dayfly.test/ns/n%d/*: {orders: {scopes: [orders.read, s%d]}}\n", i, i)
		}
		if err := os.WriteFile(filepath.Join(dir, "more.yaml"), []byte(b.String()), 0o600); err != nil {
			return nil, err
		}
		return policy.Load(ctx, policy.Config{Dir: dir})
	})
	if err != nil {
		return pair{}, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return pair{}, err
	}
	runtime.GC() // what loading left is no decision's
	caller := policy.Caller{ID: sandbox.Payments, SVIDSerial: "0a1b2c", SVIDAge: time.Minute, SVIDRemaining: time.Hour}
	in := policy.Input{Action: policy.ActionIssue, Caller: caller, Audience: "orders", Scopes: []string{"orders.read"}}
	decide := func() error {
		d, err := p.Decide(ctx, in)
		if err == nil && !d.Allow {
			err = errors.New("policy refuses")
		}
		return err
	}
	sign := func() error {
		_, err := signJWT(key, newFloorClaims(""))
		return err
	}
	return pair{
		ours: func(context.Context) (sample, error) {
			return repeat(repeats, func(int) error { return decide() })
		},
		floor: func(context.Context) (sample, error) {
			return repeat(repeats, func(int) error { return sign() })
		},
	}, nil
}
