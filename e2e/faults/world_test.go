//go:build linux

package faults_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
)

const (
	// bound is the staleness bound of every verifier and relay.
	bound = 2 * time.Second
	// askEvery is how often a credential is presented to each verifier.
	askEvery = 40 * time.Millisecond
	// maxAsks is how many may wait for the answer of one verifier: it may be paused.
	maxAsks = 200
	// patience ends a test in which something that must happen doesn't. No promise is
	// about it.
	patience = 4 * time.Minute
)

// A world is a broker on a host of its own, relays and verifiers on others, a presenter,
// and an operator. The presenter and the operator are on the bridge.
type world struct {
	t        testing.TB
	ctx      context.Context
	end      func() // of ctx, and so of the test: nothing matters once a promise is broken
	box      *sandbox.Sandbox
	broker   *host
	payments *sdk.Client
	alice    *sdk.Client

	mu        sync.Mutex
	changed   chan struct{} // closed at the next verdict, revocation or containment
	verifiers []*verifier
	live      []*credential // what is presented
	accepted  int           // verdicts
	refused   int           // those after commit and bound, or after containment
	wg        sync.WaitGroup
}

// A verifier is asked again and again, by a path that no fault touches.
type verifier struct {
	*process
	ask      *http.Client
	socket   string
	closed   time.Time // what starts later must be refused, whatever is presented; zero: nothing
	held     int       // refusals since closed
	verdicts map[*credential]string
}

// A credential is one that is presented.
type credential struct {
	*sdk.Credential
	revoked   time.Time // when the call that revoked it returned
	contained time.Time // when it was said to be
}

// newWorld starts a broker, with its store in a file that may be anywhere; "": beside all
// else.
func newWorld(t testing.TB, store string) *world {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	w := &world{t: t, ctx: ctx, end: cancel, broker: newHost(t), changed: make(chan struct{})}
	var err error
	w.box, err = sandbox.New(sandbox.Config{
		Broker: w.broker.command(command("dayfly-broker")), Agent: []string{command("dayfly-agent")},
		Host: w.broker.ip, Store: store,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(w.box.Log("broker"))
		}
		w.box.Close()
	})
	w.startBroker()
	w.payments = must(w.box.Client(ctx, sandbox.Payments, w.box.Info.GRPC))(t)
	w.alice = must(w.box.Client(ctx, sandbox.Alice, w.box.Info.GRPC))(t)
	return w
}

// must unwraps a result, or ends the test: must(f())(t).
func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func (w *world) startBroker() {
	w.t.Helper()
	if err := w.box.StartBroker(w.ctx); err != nil {
		w.t.Fatal(err)
	}
}

// relay starts an agent on a host, which follows the broker at an address.
func (w *world) relay(on *host, name, brokerAddr string) (p *process, feed string) {
	w.t.Helper()
	socket := filepath.Join(w.box.Dir, name+".sock")
	p = newProcess(w.t, w.box.Dir, name, on.command(command("dayfly-agent"),
		"--broker", brokerAddr, "--broker-id", sandbox.Broker.String(), "--workload-api", must(w.box.TD.Workload(sandbox.Orders))(w.t),
		"--grpc-socket", socket, "--max-staleness", bound.String()))
	return p, "unix://" + socket
}

// verifier starts one on a host and begins to ask it.
func (w *world) verifier(on *host, name, feed string) *verifier {
	w.t.Helper()
	cfg := verifierConfig{
		ID: sandbox.Orders, Audience: "orders", Feed: feed, Bound: bound,
		WorkloadAPI: must(w.box.TD.Workload(sandbox.Orders))(w.t), Socket: filepath.Join(w.box.Dir, name+"-https.sock"),
	}
	text := must(json.Marshal(cfg))(w.t)
	self := must(os.Executable())(w.t)
	v := &verifier{socket: cfg.Socket, verdicts: map[*credential]string{}}
	v.process = newProcess(w.t, w.box.Dir, name, on.command(self, "role-verifier", string(text)))
	v.speaks(w.ctx)
	src := must(w.box.Source(w.ctx, sandbox.Payments))(w.t)
	v.ask = &http.Client{Transport: &http.Transport{
		ForceAttemptHTTP2: true, // all that is asked shares one connection
		TLSClientConfig:   tlsconfig.MTLSClientConfig(src, src, tlsconfig.AuthorizeID(sandbox.Orders)),
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", cfg.Socket)
		},
	}}
	w.mu.Lock()
	w.verifiers = append(w.verifiers, v)
	w.mu.Unlock()
	ctx, stop := context.WithCancel(w.ctx)
	w.wg.Go(func() { w.keepAsking(ctx, v) })
	w.t.Cleanup(func() {
		stop()
		w.wg.Wait()
		v.ask.CloseIdleConnections()
	})
	return v
}

func (w *world) keepAsking(ctx context.Context, v *verifier) {
	tick := time.NewTicker(askEvery)
	defer tick.Stop()
	slots := make(chan struct{}, maxAsks)
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		w.mu.Lock()
		live := slices.Clone(w.live)
		w.mu.Unlock()
		if len(live) == 0 {
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			continue // the verifier says nothing, and all that it was asked may still be answered
		}
		w.wg.Go(func() {
			defer func() { <-slots }()
			w.askOnce(ctx, v, live[n%len(live)])
		})
	}
}

// askOnce presents a credential and judges the verdict.
func (w *world) askOnce(ctx context.Context, v *verifier, c *credential) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://verifier/", nil)
	if err != nil {
		w.t.Error(err)
		return
	}
	req.Header.Set("Authorization", "Bearer "+c.Token.Reveal())
	start := time.Now()
	resp, err := v.ask.Do(req)
	if err != nil {
		return // killed: no verdict
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<16))
	if err != nil {
		return
	}
	var refusal struct{ Reason string }
	json.Unmarshal(body, &refusal)
	if (resp.StatusCode == http.StatusOK) == (refusal.Reason != "") {
		w.t.Errorf("%s: status %d with %q", v.name, resp.StatusCode, body)
		return
	}
	w.judge(v, c, start, refusal.Reason)
}

// judge holds a verdict against what was promised when the question was asked.
func (w *world) judge(v *verifier, c *credential, start time.Time, reason string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	v.verdicts[c] = reason
	late := !c.revoked.IsZero() && start.After(c.revoked.Add(bound))
	contained := !c.contained.IsZero() && start.After(c.contained)
	closed := !v.closed.IsZero() && start.After(v.closed)
	broken := func(what string, since time.Time) {
		w.t.Errorf("%s accepted %s %v after %s", v.name, c.Grant, start.Sub(since), what)
		w.end()
	}
	switch {
	case reason != "":
		if late || contained {
			w.refused++
		}
		if closed {
			v.held++
		}
	case late:
		broken(fmt.Sprintf("its revocation, with a bound of %v", bound), c.revoked)
	case contained:
		broken("it was said to be contained", c.contained)
	case closed:
		broken("it had to be closed", v.closed)
	default:
		w.accepted++
	}
	w.wake()
}

// wake tells those who wait that something is new. The caller holds mu.
func (w *world) wake() {
	close(w.changed)
	w.changed = make(chan struct{})
}

// until waits for what must happen by itself, however long it takes.
func (w *world) until(what string, happened func() bool) {
	w.t.Helper()
	for {
		w.mu.Lock()
		done, changed := happened(), w.changed
		w.mu.Unlock()
		if done {
			return
		}
		select {
		case <-changed:
		case <-w.ctx.Done():
			w.t.Fatalf("waited in vain: %s", what)
		}
	}
}

// present gets a credential and presents it from now on; what was before it is forgotten,
// the last one apart.
func (w *world) present() *credential {
	w.t.Helper()
	var cred *sdk.Credential
	w.retry("issuing", func(ctx context.Context) (err error) {
		cred, err = w.payments.Issue(ctx, sdk.Request{Audience: "orders"})
		return err
	})
	c := &credential{Credential: cred}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.live = append(w.live[max(0, len(w.live)-1):], c)
	return c
}

// retry repeats a call until it succeeds.
func (w *world) retry(what string, call func(context.Context) error) {
	w.t.Helper()
	for w.ctx.Err() == nil || !w.t.Failed() {
		ctx, cancel := context.WithTimeout(w.ctx, 5*time.Second)
		err := call(ctx)
		cancel()
		if err == nil {
			return
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-w.ctx.Done():
			w.t.Errorf("%s: %v", what, err)
			return
		}
	}
}

// accept waits until the verifiers accept a credential: all of them, if none is named.
func (w *world) accept(c *credential, by ...*verifier) {
	w.t.Helper()
	w.verdict(c, "", by...)
}

func (w *world) verdict(c *credential, reason verify.Reason, by ...*verifier) {
	w.t.Helper()
	if len(by) == 0 {
		by = w.verifiers
	}
	for _, v := range by {
		w.until(fmt.Sprintf("%s says %q", v.name, reason), func() bool {
			got, ok := v.verdicts[c]
			return ok && got == string(reason)
		})
	}
}

// fresh waits until every verifier accepts a new credential.
func (w *world) fresh() *credential {
	w.t.Helper()
	c := w.present()
	w.accept(c)
	return c
}

// revoke revokes one credential and returns the number of the revocation. It repeats
// what got no answer: it is recorded once.
func (w *world) revoke(c *credential) (number uint64) {
	w.t.Helper()
	w.retry("revoking", func(ctx context.Context) error {
		resp, err := dayflyv1.NewRevocationServiceClient(w.alice.Conn()).Revoke(ctx, &dayflyv1.RevokeRequest{
			Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Grant{Grant: c.Grant}}},
			Reason:    "a test", IdempotencyKey: c.Grant,
		})
		number = resp.GetRevocation().GetPosition().GetSequence()
		return err
	})
	w.mu.Lock()
	defer w.mu.Unlock()
	c.revoked = time.Now()
	w.wake()
	return number
}

// revokeMuch makes a large revocation of what nobody has.
func (w *world) revokeMuch(n int) {
	w.t.Helper()
	many := make([]*dayflyv1.Selector, 64)
	for i := range many {
		many[i] = &dayflyv1.Selector{Selector: &dayflyv1.Selector_Identity{Identity: fmt.Sprintf("spiffe://dayfly.test/ns/gone/%d-%d", n, i)}}
	}
	w.retry("revoking much", func(ctx context.Context) error {
		_, err := dayflyv1.NewRevocationServiceClient(w.alice.Conn()).Revoke(ctx, &dayflyv1.RevokeRequest{
			Selectors: many, LockMode: dayflyv1.LockMode_LOCK_MODE_NONE, Reason: "much", IdempotencyKey: fmt.Sprint(n),
		})
		return err
	})
}

// containment waits until a revocation is said to be contained.
func (w *world) containment(c *credential, number uint64) *dayflyv1.Containment {
	w.t.Helper()
	var last *dayflyv1.Containment
	for !last.GetContained() {
		watch, err := dayflyv1.NewRevocationServiceClient(w.alice.Conn()).WatchContainment(w.ctx, &dayflyv1.WatchContainmentRequest{Sequence: number})
		for err == nil && !last.GetContained() {
			var m *dayflyv1.WatchContainmentResponse
			if m, err = watch.Recv(); err == nil {
				last = m.GetContainment()
			}
		}
		if last.GetContained() {
			break
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-w.ctx.Done():
			w.t.Errorf("waited in vain: revocation %d is contained: %v, %v", number, last, err)
			return last
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	c.contained = time.Now()
	w.wake()
	return last
}

// settled waits until each verifier has refused a credential that it was asked about
// after the bound: all of them, if none is named.
func (w *world) settled(c *credential, by ...*verifier) {
	w.t.Helper()
	select {
	case <-time.After(time.Until(c.revoked.Add(bound))): // what is asked from here on is late
	case <-w.ctx.Done():
	}
	w.mu.Lock()
	for _, v := range w.verifiers {
		delete(v.verdicts, c)
	}
	w.mu.Unlock()
	if len(by) == 0 {
		by = w.verifiers
	}
	for _, v := range by {
		w.until(v.name+" refuses what is revoked", func() bool { return v.verdicts[c] != "" })
	}
}

// closes holds that verifiers refuse everything from a bound after now, and waits until
// each was asked then.
func (w *world) closes(by ...*verifier) {
	w.t.Helper()
	w.mu.Lock()
	from := time.Now().Add(bound)
	for _, v := range by {
		v.closed, v.held = from, 0
	}
	w.mu.Unlock()
	for _, v := range by {
		w.until(v.name+" closes", func() bool { return v.held >= 3 })
	}
}

// opens ends what closes began; it comes before the fault is healed.
func (w *world) opens(by ...*verifier) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, v := range by {
		v.closed = time.Time{}
	}
}

// revokeByCommand runs "dayfly revoke" on a credential and holds what its exit code says.
func (w *world) revokeByCommand(c *credential) (exit int, output string) {
	w.t.Helper()
	cmd := exec.CommandContext(w.ctx, command("dayfly"), "--timeout", "60s", "revoke", "--grant", c.Grant, "--yes", "--reason", "a test", "--wait", "60s")
	cmd.Env = append(os.Environ(), "DAYFLY_BROKER="+w.box.Info.GRPC, "DAYFLY_BROKER_ID="+sandbox.Broker.String(),
		"SPIFFE_ENDPOINT_SOCKET="+must(w.box.TD.Workload(sandbox.Alice))(w.t))
	out, err := cmd.CombinedOutput()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		w.t.Fatal(err)
	}
	exit = cmd.ProcessState.ExitCode()
	w.mu.Lock()
	defer w.mu.Unlock()
	if c.revoked = time.Now(); exit == 0 {
		c.contained = c.revoked
	}
	w.wake()
	return exit, string(out)
}
