package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// demoTimeout bounds the whole demo; it takes some seconds.
const demoTimeout = 2 * time.Minute

func (a *app) demoCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "demo",
		Short: "Show the whole job on this machine, and check every observation",
		Long: `Show the whole job on this machine: a throwaway SPIFFE trust domain, a broker and agents as processes
of their own, and three services, all talking over real sockets with real mTLS. A line a step says what
was expected, what was observed and how long it took. The exit code is 0 only if every observation is
right. Nothing is left behind.`,
		Example: "  dayfly demo",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), demoTimeout)
			defer cancel()
			d := &demo{app: a}
			return d.run(ctx)
		},
	}
}

// demo is one run of it.
type demo struct {
	*app
	box   *sandbox.Sandbox
	wrong int

	orders, ledger, web *sandbox.Service
	payments            *sdk.Client // by its agent's socket
	ordersClient        *sdk.Client
	reports             *sdk.Client
	link                *sandbox.Link // between the broker and ledger's verifier
	alice               *sdk.Client

	token, derived, unrelated *sdk.Credential
	handedOut                 []*sdk.Credential
	lock                      uint64
}

func (d *demo) run(ctx context.Context) error {
	started := time.Now()
	if err := d.setUp(ctx); err != nil {
		return fmt.Errorf("setting up: %w", err)
	}
	defer d.box.Close()
	fmt.Fprintf(d.stdout, "set up in %s: trust domain, broker, agents, three services\n", round(time.Since(started)))
	for i, s := range []struct {
		what string
		do   func(context.Context) error
	}{
		{"payments gets a token from its agent; orders verifies it locally", d.issue},
		{"orders exchanges it for ledger: sub payments, act orders", d.exchange},
		{"what must be refused is refused, each for its reason", d.refusals},
		{"revoke --dry-run of payments", d.plan},
		{"revoke payments: dead everywhere, an unrelated identity undisturbed", d.revoke},
		{"a verifier that is cut off refuses everything past its bound, and recovers", d.cutFeed},
		{"the broker is killed and restarted: everything stands", d.restart},
		{"lift: payments gets a new token; the old ones stay dead", d.lift},
	} {
		fmt.Fprintf(d.stdout, "\n%d. %s\n", i+1, s.what)
		if err := s.do(ctx); err != nil {
			d.wrong++
			fmt.Fprintf(d.stdout, "   WRONG  %v\n", err)
			return fmt.Errorf("step %d: %w", i+1, err)
		}
	}
	if d.wrong > 0 {
		return fmt.Errorf("%d observations were not as expected", d.wrong)
	}
	fmt.Fprintf(d.stdout, "\neverything as expected, in %s\n", round(time.Since(started)))
	return nil
}

// observe prints one line: what was expected, what was observed, how long it took.
func (d *demo) observe(expected, observed string, ok bool, took time.Duration) {
	verdict := "ok   "
	if !ok {
		verdict = "WRONG"
		d.wrong++
	}
	fmt.Fprintf(d.stdout, "   %s  expected %s; observed %s  (%s)\n", verdict, expected, observed, round(took))
}

func round(t time.Duration) time.Duration {
	switch {
	case t > time.Second:
		return t.Round(10 * time.Millisecond)
	case t > time.Millisecond:
		return t.Round(100 * time.Microsecond)
	}
	return t.Round(time.Microsecond)
}

func (d *demo) setUp(ctx context.Context) (err error) {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	d.box, err = sandbox.New(sandbox.Config{Broker: []string{exe, internalBroker}, Agent: []string{exe, internalAgent}})
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			d.box.Close()
		}
	}()
	if err := d.box.StartBroker(ctx); err != nil {
		return err
	}
	if d.link, err = sandbox.NewLink(d.box.Info.GRPC); err != nil {
		return err
	}
	return d.setUpFleet(ctx)
}

func (d *demo) setUpFleet(ctx context.Context) error {
	agent, err := d.box.StartAgent(ctx, sandbox.Payments)
	if err != nil {
		return err
	}
	if d.payments, err = sdk.New(sdk.Config{Address: agent}); err != nil {
		return err
	}
	for _, c := range []struct {
		into **sdk.Client
		id   spiffeid.ID
	}{{&d.ordersClient, sandbox.Orders}, {&d.reports, sandbox.Reports}, {&d.alice, sandbox.Alice}} {
		if *c.into, err = d.box.Client(ctx, c.id, d.box.Info.GRPC); err != nil {
			return err
		}
	}
	linked, err := d.box.Client(ctx, sandbox.Ledger, d.link.Addr())
	if err != nil {
		return err
	}
	// web's verifier follows the feed through the agent beside it.
	webAgent, err := d.box.StartAgent(ctx, sandbox.Web)
	if err != nil {
		return err
	}
	relayed, err := sdk.New(sdk.Config{Address: webAgent})
	if err != nil {
		return err
	}
	for _, s := range []struct {
		into **sandbox.Service
		cfg  sandbox.ServiceConfig
	}{
		{&d.orders, sandbox.ServiceConfig{ID: sandbox.Orders, Audience: "orders", Feed: d.ordersClient}},
		{&d.ledger, sandbox.ServiceConfig{ID: sandbox.Ledger, Audience: "ledger", Feed: linked}},
		{&d.web, sandbox.ServiceConfig{ID: sandbox.Web, Audience: "web", Feed: relayed}},
	} {
		if *s.into, err = d.box.StartService(ctx, s.cfg); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) keep(c *sdk.Credential) *sdk.Credential {
	d.handedOut = append(d.handedOut, c)
	return c
}

func (d *demo) issue(ctx context.Context) error {
	started := time.Now()
	cred, err := d.payments.Issue(ctx, sdk.Request{Audience: "orders"})
	if err != nil {
		return err
	}
	d.token = d.keep(cred)
	d.observe("a token for orders", fmt.Sprintf("grant %s, scopes %v, %s to live", cred.Grant, cred.Scopes, cred.Expires.Sub(cred.IssuedAt)), cred.Audience == "orders", time.Since(started))
	started = time.Now()
	answer, err := d.box.Call(ctx, sandbox.Payments, d.orders, cred.Token)
	if err != nil {
		return err
	}
	d.observe("orders accepts it from payments", "sub "+answer.Subject, answer.Subject == sandbox.Payments.String(), time.Since(started))
	started = time.Now()
	_, err = d.orders.Verifier.Verify(ctx, cred.Token.Reveal(), verify.Peer{ID: sandbox.Payments})
	d.observe("a local check, no call", says(err), err == nil, time.Since(started))
	return nil
}

func (d *demo) exchange(ctx context.Context) error {
	started := time.Now()
	cred, err := d.ordersClient.Exchange(ctx, d.token.Token, sdk.Request{Audience: "ledger"})
	if err != nil {
		return err
	}
	d.derived = d.keep(cred)
	d.observe("narrower and no longer than its parent", fmt.Sprintf("scopes %v, expires %s before it", cred.Scopes, d.token.Expires.Sub(cred.Expires).Round(time.Second)), !cred.Expires.After(d.token.Expires), time.Since(started))
	started = time.Now()
	answer, err := d.box.Call(ctx, sandbox.Orders, d.ledger, cred.Token)
	if err != nil {
		return err
	}
	ok := answer.Subject == sandbox.Payments.String() && len(answer.Actors) == 1 && answer.Actors[0] == sandbox.Orders.String()
	d.observe("ledger accepts it from orders", fmt.Sprintf("sub %s, act %v", answer.Subject, answer.Actors), ok, time.Since(started))

	cred, err = d.reports.Issue(ctx, sdk.Request{Audience: "orders"})
	if err != nil {
		return err
	}
	d.unrelated = d.keep(cred)
	return nil
}

// refused calls a service and observes that it refuses for a reason.
func (d *demo) refused(ctx context.Context, what string, as spiffeid.ID, svc *sandbox.Service, t token.Secret, reason verify.Reason) {
	started := time.Now()
	_, err := d.box.Call(ctx, as, svc, t)
	var refused *sandbox.Refused
	ok := errors.As(err, &refused) && refused.Reason == string(reason)
	d.observe(fmt.Sprintf("%s: %s", what, reason), says(err), ok, time.Since(started))
}

func says(err error) string {
	if err == nil {
		return "accepted"
	}
	return err.Error()
}

func (d *demo) refusals(ctx context.Context) error {
	web, err := d.payments.Issue(ctx, sdk.Request{Audience: "web"})
	if err != nil {
		return err
	}
	d.keep(web)
	d.refused(ctx, "wrong audience", sandbox.Payments, d.orders, web.Token, verify.AudienceMismatch)
	d.refused(ctx, "stolen: presented by reports", sandbox.Reports, d.orders, d.token.Token, verify.PresenterMismatch)
	d.refused(ctx, "tampered", sandbox.Payments, d.orders, tamper(d.token.Token), verify.SignatureInvalid)
	started := time.Now()
	_, err = d.reports.Issue(ctx, sdk.Request{Audience: "orders", Scopes: []string{"orders.write"}})
	d.observe("a scope that policy denies: POLICY_DENIED", says(err), errors.Is(err, sdk.ErrPolicyDenied), time.Since(started))
	brief, err := d.payments.Issue(ctx, sdk.Request{Audience: "orders", TTL: time.Second})
	if err != nil {
		return err
	}
	d.keep(brief)
	if err := waitUntil(ctx, brief.Expires); err != nil {
		return err
	}
	d.refused(ctx, "expired", sandbox.Payments, d.orders, brief.Token, verify.TokenExpired)
	return nil
}

// tamper turns a scope of the token into another, and leaves the rest as it was.
func tamper(t token.Secret) token.Secret {
	parts := strings.Split(t.Reveal(), ".")
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return t
	}
	parts[1] = base64.RawURLEncoding.EncodeToString([]byte(strings.Replace(string(payload), "orders.read", "orders.rule", 1)))
	return token.NewSecret(strings.Join(parts, "."))
}

func waitUntil(ctx context.Context, t time.Time) error {
	timer := time.NewTimer(time.Until(t) + 10*time.Millisecond)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func paymentsSelector() []*dayflyv1.Selector {
	return []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Identity{Identity: sandbox.Payments.String()}}}
}

func (d *demo) plan(ctx context.Context) error {
	started := time.Now()
	plan, err := dayflyv1.NewRevocationServiceClient(d.alice.Conn()).Plan(ctx, &dayflyv1.PlanRequest{Selectors: paymentsSelector()})
	if err != nil {
		return err
	}
	var audiences []string
	for _, a := range plan.GetAudiences() {
		audiences = append(audiences, a.GetAudience())
	}
	ok := plan.GetLiveGrants() >= 3 && plan.GetDerivedGrants() == 1 && strings.Join(audiences, " ") == "ledger orders web"
	d.observe("its grants, 1 derived, reaching ledger, orders and web",
		fmt.Sprintf("%d live grants, %d derived, reaching %v", plan.GetLiveGrants(), plan.GetDerivedGrants(), audiences), ok, time.Since(started))
	return nil
}

func (d *demo) revoke(ctx context.Context) error {
	// What each verifier accepted ends, as an event, when it refuses from now on.
	atOrders, err := d.orders.Verifier.Verify(ctx, d.token.Token.Reveal(), verify.Peer{ID: sandbox.Payments})
	if err != nil {
		return err
	}
	atLedger, err := d.ledger.Verifier.Verify(ctx, d.derived.Token.Reveal(), verify.Peer{ID: sandbox.Orders})
	if err != nil {
		return err
	}
	ordersRefuses, stop := d.orders.Verifier.Watch(ctx, atOrders)
	defer stop()
	ledgerRefuses, stop := d.ledger.Verifier.Watch(ctx, atLedger)
	defer stop()

	client := dayflyv1.NewRevocationServiceClient(d.alice.Conn())
	started := time.Now()
	resp, err := client.Revoke(ctx, &dayflyv1.RevokeRequest{
		Selectors: paymentsSelector(), Reason: "demo: payments is compromised", IdempotencyKey: "demo-revoke",
	})
	if err != nil {
		return err
	}
	recorded := time.Since(started)
	<-ordersRefuses.Done()
	<-ledgerRefuses.Done()
	last := time.Since(started)
	d.lock = resp.GetRevocation().GetPosition().GetSequence()
	d.observe("a durable record", fmt.Sprintf("revocation %d with its lock", d.lock), resp.GetRevocation().GetLockMode() == dayflyv1.LockMode_LOCK_MODE_QUARANTINE, recorded)
	d.observe("from the call to the last verifier's refusal", "both verifiers refuse", true, last)
	if err := d.contained(ctx, client, started); err != nil {
		return err
	}
	d.refused(ctx, "the token", sandbox.Payments, d.orders, d.token.Token, verify.TokenRevoked)
	d.refused(ctx, "the derived token", sandbox.Orders, d.ledger, d.derived.Token, verify.TokenRevoked)
	return d.quarantined(ctx)
}

// contained waits for the receipts of every verifier.
func (d *demo) contained(ctx context.Context, client dayflyv1.RevocationServiceClient, started time.Time) error {
	watch, err := client.WatchContainment(ctx, &dayflyv1.WatchContainmentRequest{Sequence: d.lock})
	if err != nil {
		return err
	}
	for {
		m, err := watch.Recv()
		if err != nil {
			return err
		}
		if c := m.GetContainment(); c.GetContained() {
			n := len(c.GetReceipts())
			d.observe("receipts from every verifier", fmt.Sprintf("%d of %d confirmed, contained", c.GetConfirmed(), n), int(c.GetConfirmed()) == n && n >= 3, time.Since(started))
			return nil
		}
	}
}

// quarantined observes that payments gets nothing new, and that reports goes on.
func (d *demo) quarantined(ctx context.Context) error {
	started := time.Now()
	_, err := d.payments.Issue(ctx, sdk.Request{Audience: "orders"})
	d.observe("payments gets no new token: IDENTITY_LOCKED", says(err), errors.Is(err, sdk.ErrIdentityLocked), time.Since(started))
	started = time.Now()
	_, err = d.box.Call(ctx, sandbox.Reports, d.orders, d.unrelated.Token)
	d.observe("reports goes on", says(err), err == nil, time.Since(started))
	return nil
}

func (d *demo) cutFeed(ctx context.Context) error {
	cred, err := d.newForLedger(ctx)
	if err != nil {
		return err
	}
	started := time.Now()
	d.link.Cut()
	// Whatever is slow here: a call that starts once the bound has passed is refused.
	if err := waitUntil(ctx, started.Add(sandbox.Staleness)); err != nil {
		return err
	}
	d.refused(ctx, fmt.Sprintf("a good token, %s after the cut", sandbox.Staleness), sandbox.Orders, d.ledger, cred.Token, verify.VerifierStale)
	started = time.Now()
	d.link.Restore()
	if err := d.ledger.Verifier.WaitReady(ctx); err != nil {
		return err
	}
	_, err = d.box.Call(ctx, sandbox.Orders, d.ledger, cred.Token)
	d.observe("it recovers when the feed is back", says(err), err == nil, time.Since(started))
	return nil
}

// newForLedger gets a token of reports for orders, and exchanges it for ledger.
func (d *demo) newForLedger(ctx context.Context) (*sdk.Credential, error) {
	root, err := d.reports.Issue(ctx, sdk.Request{Audience: "orders"})
	if err != nil {
		return nil, err
	}
	d.keep(root)
	cred, err := d.ordersClient.Exchange(ctx, root.Token, sdk.Request{Audience: "ledger"})
	if err != nil {
		return nil, err
	}
	return d.keep(cred), nil
}

func (d *demo) restart(ctx context.Context) error {
	started := time.Now()
	d.box.KillBroker()
	if err := d.box.StartBroker(ctx); err != nil {
		return err
	}
	d.observe("the broker serves again on the same store and address", d.box.Info.GRPC, true, time.Since(started))
	if err := d.redialed(ctx); err != nil {
		return err
	}
	started = time.Now()
	_, err := d.payments.Issue(ctx, sdk.Request{Audience: "orders"})
	d.observe("the lock stands", says(err), errors.Is(err, sdk.ErrIdentityLocked), time.Since(started))
	grants := dayflyv1.NewGrantServiceClient(d.alice.Conn())
	started = time.Now()
	found := 0
	for _, c := range d.handedOut {
		shown, err := token.Inspect(c.Token.Reveal())
		if err != nil {
			return err
		}
		g, err := grants.GetGrant(ctx, &dayflyv1.GetGrantRequest{Grant: c.Grant})
		if err != nil {
			return err
		}
		if string(g.GetGrant().GetFingerprint()) == string(shown.Fingerprint[:]) {
			found++
		}
	}
	d.observe("every token handed out is in the records", fmt.Sprintf("%d of %d", found, len(d.handedOut)), found == len(d.handedOut), time.Since(started))
	if err := d.reconnected(ctx); err != nil {
		return err
	}
	d.refused(ctx, "the revocation stands", sandbox.Payments, d.orders, d.token.Token, verify.TokenRevoked)
	return nil
}

// redialed waits until every client has a connection again: one that dialed while the
// broker was away pauses before it dials anew.
func (d *demo) redialed(ctx context.Context) error {
	for _, c := range []*sdk.Client{d.payments, d.ordersClient, d.reports, d.alice} {
		_, err := healthpb.NewHealthClient(c.Conn()).Check(ctx, &healthpb.HealthCheckRequest{}, grpc.WaitForReady(true))
		if err != nil {
			return err
		}
	}
	// The agent stands between: its own connection is what counts.
	for {
		_, err := d.payments.Issue(ctx, sdk.Request{Audience: "orders"})
		var refused *sdk.Error
		if !errors.As(err, &refused) || refused.Code != codes.Unavailable || ctx.Err() != nil {
			return ctx.Err()
		}
		if err := waitUntil(ctx, time.Now().Add(50*time.Millisecond)); err != nil {
			return err
		}
	}
}

// reconnected waits until every verifier accepts a token that the new process signed:
// its key can only have come over a new stream.
func (d *demo) reconnected(ctx context.Context) error {
	started := time.Now()
	orders, err := d.reports.Issue(ctx, sdk.Request{Audience: "orders"})
	if err != nil {
		return err
	}
	ledger, err := d.newForLedger(ctx)
	if err != nil {
		return err
	}
	web, err := d.reports.Issue(ctx, sdk.Request{Audience: "web"})
	if err != nil {
		return err
	}
	for _, c := range []struct {
		as   spiffeid.ID
		at   *sandbox.Service
		cred *sdk.Credential
	}{{sandbox.Reports, d.orders, orders}, {sandbox.Orders, d.ledger, ledger}, {sandbox.Reports, d.web, web}} {
		for err = errors.New("not tried"); err != nil; {
			if ctx.Err() != nil {
				return err
			}
			_, err = d.box.Call(ctx, c.as, c.at, c.cred.Token) // an unknown key is waited for inside
		}
	}
	d.observe("verifiers and agents reconnect by themselves", "all accept what the new process signed", true, time.Since(started))
	return nil
}

func (d *demo) lift(ctx context.Context) error {
	started := time.Now()
	_, err := dayflyv1.NewRevocationServiceClient(d.alice.Conn()).Lift(ctx, &dayflyv1.LiftRequest{
		Lock: d.lock, Reason: "demo: payments is clean", IdempotencyKey: "demo-lift",
	})
	if err != nil {
		return err
	}
	cred, err := d.payments.Issue(ctx, sdk.Request{Audience: "orders"})
	if err != nil {
		return err
	}
	_, err = d.box.Call(ctx, sandbox.Payments, d.orders, cred.Token)
	d.observe("a new token that works", says(err), err == nil, time.Since(started))
	d.refused(ctx, "the old token", sandbox.Payments, d.orders, d.token.Token, verify.TokenRevoked)
	d.refused(ctx, "the old derived token", sandbox.Orders, d.ledger, d.derived.Token, verify.TokenRevoked)
	return nil
}
