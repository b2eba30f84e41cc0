package e2e_test

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"google.golang.org/grpc/codes"
)

// cloudPolicy entitles payments to tokens for an audience that only reads the JWK set.
const cloudPolicy = `audiences:
  cloud: {owner: cloud team, verified_by: external}
entitlements:
  spiffe://dayfly.test/ns/shop/payments:
    cloud: {scopes: [cloud.use], ttl: 5m}
`

// cloudBox is makeBox with cloudPolicy.
func cloudBox(t *testing.T, brokerConfig string) *sandbox.Sandbox {
	t.Helper()
	box := makeBox(t, brokerConfig)
	if err := os.WriteFile(filepath.Join(box.PolicyDir(), "cloud.yaml"), []byte(cloudPolicy), 0o600); err != nil {
		t.Fatal(err)
	}
	return box
}

// reader is a verifier that knows the JWK set and nothing else, and uses its copy for as
// long as it may.
type reader struct {
	url    string
	kids   map[string]bool
	asked  time.Time
	maxAge time.Duration
}

// knows reports whether the reader knows a key. It returns an error if it needs another
// copy and the broker doesn't answer.
func (r *reader) knows(ctx context.Context, kid string) (bool, error) {
	if r.kids == nil || time.Since(r.asked) >= r.maxAge {
		if err := r.read(ctx); err != nil {
			return false, err
		}
	}
	return r.kids[kid], nil
}

func (r *reader) read(ctx context.Context) error {
	asked := time.Now()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var set struct {
		Keys []struct{ Kid string }
	}
	if err := json.NewDecoder(resp.Body).Decode(&set); err != nil {
		return err
	}
	age := strings.TrimPrefix(strings.Split(resp.Header.Get("Cache-Control"), ", ")[1], "max-age=")
	seconds, err := strconv.Atoi(age)
	if err != nil {
		return err
	}
	r.asked, r.maxAge, r.kids = asked, time.Duration(seconds)*time.Second, map[string]bool{}
	for _, k := range set.Keys {
		r.kids[k.Kid] = true
	}
	return nil
}

// fetchCloud asks for tokens until it gets one. A broker that is away between two
// processes answers nothing; a refusal with one of the reasons, if any, is waited out, and
// any other fails the test.
func fetchCloud(t *testing.T, c *sdk.Client, waited ...string) *sdk.Credential {
	for {
		cred, err := c.Issue(t.Context(), sdk.Request{Audience: "cloud"})
		if err == nil {
			return cred
		}
		var refusal *sdk.Error
		if !errors.As(err, &refusal) || refusal.Code != codes.Unavailable || refusal.Reason != "" && !contains(waited, refusal.Reason) {
			t.Errorf("refused: %v", err)
			return nil
		}
		select {
		case <-t.Context().Done():
			t.Error(t.Context().Err())
			return nil
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func contains(all []string, s string) bool {
	for _, a := range all {
		if a == s {
			return true
		}
	}
	return false
}

func kidOf(t *testing.T, c *sdk.Credential) string {
	t.Helper()
	shown := must(token.Inspect(c.Token.Reveal()))(t)
	return shown.Lineage[len(shown.Lineage)-1].Key.String()
}

// TestTakeOver: over a planned restart nobody who reads the JWK set is refused a token for
// want of a key, and nobody who uses a copy of it meets a key that isn't there; what the
// process before had signed is accepted by all.
func TestTakeOver(t *testing.T) {
	ctx := t.Context()
	box := cloudBox(t, "jwks_max_age: 2s\n")
	if err := box.StartBroker(ctx); err != nil {
		t.Fatal(err)
	}
	payments := must(box.Client(ctx, sandbox.Payments, box.Info.GRPC))(t)
	feed := must(box.Client(ctx, sandbox.Orders, box.Info.GRPC))(t)
	orders := must(box.StartService(ctx, sandbox.ServiceConfig{ID: sandbox.Orders, Audience: "orders", Feed: feed}))(t)
	before := must(payments.Issue(ctx, sdk.Request{Audience: "orders"}))(t)
	first := fetchCloud(t, payments, "KEY_NOT_SPREAD_YET")
	if first == nil {
		t.FailNow()
	}

	taken := make(chan error, 1)
	go func() { taken <- box.TakeOver(ctx) }()
	r := &reader{url: "http://" + box.Info.Public + "/jwks.json"}
	kids := map[string]int{}
	for kids[kidOf(t, first)] == 0 || len(kids) < 2 || kids[otherThan(kids, kidOf(t, first))] < 3 {
		cred := fetchCloud(t, payments)
		if cred == nil {
			t.FailNow()
		}
		kid := kidOf(t, cred)
		known, err := r.knows(ctx, kid)
		for err != nil && ctx.Err() == nil { // its copy is too old, and the broker is away
			known, err = r.knows(ctx, kid)
		}
		if !known {
			t.Fatalf("key %s signs, and a copy of the JWK set that is %v old lacks it", kid, time.Since(r.asked))
		}
		kids[kid]++
		time.Sleep(10 * time.Millisecond)
	}
	if err := <-taken; err != nil {
		t.Fatalf("the process before: %v", err)
	}
	t.Logf("tokens by key: %v", kids)
	must(box.Call(ctx, sandbox.Payments, orders, before.Token))(t)
	must(box.Call(ctx, sandbox.Payments, orders, must(payments.Issue(ctx, sdk.Request{Audience: "orders"}))(t).Token))(t)
}

func otherThan(kids map[string]int, kid string) string {
	for k := range kids {
		if k != kid {
			return k
		}
	}
	return ""
}

// TestCrashMakesReadersOfTheJWKSWait: after SIGKILL, who only reads the JWK set gets no
// token that it couldn't verify, and is told when to come back; the feed's audiences are
// served at once.
func TestCrashMakesReadersOfTheJWKSWait(t *testing.T) {
	ctx := t.Context()
	box := cloudBox(t, "jwks_max_age: 5m\n")
	for range 2 {
		if err := box.StartBroker(ctx); err != nil {
			t.Fatal(err)
		}
		payments := must(box.Client(ctx, sandbox.Payments, box.Info.GRPC))(t)
		_, err := payments.Issue(ctx, sdk.Request{Audience: "cloud"})
		refusal := wantError(t, err, codes.Unavailable, "KEY_NOT_SPREAD_YET")
		if wait := refusal.RetryAfter(); wait <= 0 || wait > 330*time.Second {
			t.Errorf("told to come back in %v", wait)
		}
		must(payments.Issue(ctx, sdk.Request{Audience: "orders"}))(t)
		box.KillBroker()
	}
	if err := box.SetBrokerConfig("jwks_max_age: 1s\n"); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := box.StartBroker(ctx); err != nil {
		t.Fatal(err)
	}
	payments := must(box.Client(ctx, sandbox.Payments, box.Info.GRPC))(t)
	if fetchCloud(t, payments, "KEY_NOT_SPREAD_YET") != nil && time.Since(began) < 2*time.Second {
		t.Errorf("served %v after the start, before a second and its margin have passed", time.Since(began))
	}
}
