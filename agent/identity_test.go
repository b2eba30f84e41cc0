package agent_test

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var (
	orders = spiffeid.RequireFromString("spiffe://td/orders")
	ledger = spiffeid.RequireFromString("spiffe://td/ledger")
)

// closed waits for a change.
func closed(t *testing.T, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		t.Fatalf("no change: %s", what)
	}
}

// One watch, a view for each SVID: each is told of its own changes, and what isn't returned
// any more isn't shown any more.
func TestIdentities(t *testing.T) {
	td := newDomain(t)
	addr, err := td.Workload(payments)
	must(t, err)
	must(t, td.SetOthers(payments, orders))
	all := agent.NewIdentities(addr, nil)
	first, mine, theirs, missing := all.Identity(spiffeid.ID{}), all.Identity(payments), all.Identity(orders), all.Identity(ledger)
	if _, err := mine.GetX509SVID(); !errors.Is(err, agent.ErrNoIdentity) {
		t.Errorf("before the first answer: %v", err)
	}
	began := mine.Changed()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { _ = all.Run(ctx) })
	defer wg.Wait()
	defer cancel()
	closed(t, "the first answer", began)

	shows := func(v *agent.Identity, want spiffeid.ID) {
		t.Helper()
		svid, err := v.GetX509SVID()
		if err != nil || svid.ID != want {
			t.Fatalf("got %v, %v; want %s", svid, err, want)
		}
	}
	shows(first, payments)
	shows(mine, payments)
	shows(theirs, orders)
	_, err = missing.GetX509SVID()
	if want := "the Workload API returns no SVID for spiffe://td/ledger; it returned spiffe://td/payments, spiffe://td/orders"; err == nil || err.Error() != want {
		t.Errorf("missing: %v, want %s", err, want)
	}

	quiet, loud := mine.Changed(), theirs.Changed()
	must(t, td.Rotate(orders))
	closed(t, "the rotation of orders", loud)
	select {
	case <-quiet:
		t.Error("payments was told of orders' rotation")
	default:
	}
	both := []<-chan struct{}{mine.Changed(), theirs.Changed()}
	must(t, td.RotateCA())
	for _, c := range both {
		closed(t, "the new authority", c)
	}

	came := missing.Changed()
	must(t, td.SetOthers(payments, orders, ledger))
	closed(t, "the arrival of ledger", came)
	shows(missing, ledger)
	went, next := mine.Changed(), first.Changed()
	must(t, td.SetDenied(payments, true))
	closed(t, "the end of payments", went)
	closed(t, "another first one", next)
	var notIssued *agent.NotIssuedError
	if _, err := mine.GetX509SVID(); !errors.As(err, &notIssued) || len(notIssued.Returned) != 2 {
		t.Errorf("payments is denied: %v", err)
	}
	shows(theirs, orders)
	shows(first, orders)

	// All are gone, which a Workload API says by PermissionDenied.
	went = theirs.Changed()
	must(t, td.SetOthers(payments))
	closed(t, "the end of all", went)
	if _, err := first.GetX509SVID(); err == nil || err.Error() != "the Workload API returns no SVID; it returned none" {
		t.Errorf("all are denied: %v", err)
	}
	came = mine.Changed()
	must(t, td.SetDenied(payments, false))
	closed(t, "the return of payments", came)
	shows(mine, payments)

	// One that can't be reached takes nothing away.
	must(t, td.StopSocket(payments))
	shows(mine, payments)
	came = mine.Changed()
	must(t, td.Rotate(payments))
	must(t, td.StartSocket(payments))
	closed(t, "the rotation meanwhile", came)
	if _, err := mine.GetX509BundleForTrustDomain(domain); err != nil {
		t.Error(err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Without the SVID there is nothing: no credential from memory, no call over a connection
// that was made with it, and a reason. With the SVID all is back.
func TestIdentityTakenBack(t *testing.T) {
	td := newDomain(t)
	b := newBroker(t, td)
	must(t, td.SetOthers(payments, orders))
	f := start(t, td, b, nil)
	client := f.client()
	first := f.issue(client, sdk.Request{Audience: "orders"})
	if again := f.issue(client, sdk.Request{Audience: "orders"}); again.Grant != first.Grant {
		t.Error("it isn't kept")
	}
	f.ready() // it follows the feed
	streams := b.streams.Load()

	must(t, td.SetDenied(payments, true))
	eventually(t, "an agent that isn't ready", func() error {
		if code, body, _ := f.get("/readyz"); code != http.StatusServiceUnavailable {
			return errors.New(body["state"].(string))
		}
		var page strings.Builder
		must(t, f.agent.WriteMetrics(&page))
		if !strings.Contains(page.String(), "\ndayfly_agent_dropped_total 1\n") {
			return errors.New("it isn't dropped yet")
		}
		return nil
	})
	issued := b.issued.Load()
	code, body, _ := f.get("/v1/token?audience=orders")
	if message, _ := body["message"].(string); code != http.StatusServiceUnavailable || body["reason"] != "IDENTITY_UNAVAILABLE" || !strings.Contains(message, "no SVID for spiffe://td/payments; it returned spiffe://td/orders") {
		t.Errorf("%d %v", code, body)
	}
	_, err := client.Exchange(t.Context(), token.NewSecret("subject"), sdk.Request{Audience: "ledger"})
	if reason(err) != "IDENTITY_UNAVAILABLE" {
		t.Errorf("exchange: %v", err)
	}
	if n := b.issued.Load(); n != issued {
		t.Errorf("%d calls to the broker without an SVID", n-issued)
	}
	if n := b.streams.Load(); n != streams {
		t.Errorf("%d streams without an SVID", n-streams)
	}

	must(t, td.SetDenied(payments, false))
	if again := f.issue(client, sdk.Request{Audience: "orders"}); again.Grant == first.Grant {
		t.Error("a credential of before was kept")
	}
	f.ready()
}
