package rpc_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/keys"
	"github.com/dayflyhq/dayfly/broker/rpc"
	"github.com/dayflyhq/dayfly/broker/storetest"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
)

const issuer = "https://dayfly.example.org"

var (
	domain   = spiffeid.RequireTrustDomainFromString("example.org")
	brokerID = spiffeid.RequireFromString("spiffe://example.org/dayfly/broker")
	payments = spiffeid.RequireFromString("spiffe://example.org/payments")
)

// clock stands still until a test moves it.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// policy says yes, to whoever isn't denied.
type policy struct {
	mu         sync.Mutex
	denied     map[spiffeid.ID]bool
	noLedger   bool // nobody may follow for it
	nameless   bool // an identity answers to its SPIFFE ID and to no name
	twoPersons bool // a lift takes two
}

func (p *policy) Decide(_ context.Context, q broker.Question) (broker.Decision, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	scopes := q.Scopes
	if len(scopes) == 0 {
		scopes = []string{"read"}
	}
	denied := p.denied[q.Caller.ID] || p.noLedger && slices.Contains(q.Audiences, "ledger")
	return broker.Decision{Allow: !denied, Scopes: scopes, TTL: broker.DefaultTTL, SecondPerson: broker.SecondPerson{Required: p.twoPersons, Confirmers: []string{"spiffe://example.org/ops/*"}}}, nil
}

func (p *policy) AnswersTo(spiffeid.ID, string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.nameless
}

func (p *policy) Audience(name string) (broker.Audience, bool) {
	return broker.Audience{Name: name, VerifiedBy: "feed"}, true
}
func (p *policy) External() []broker.Audience { return nil }

func (p *policy) Fallback(spiffeid.ID, string) broker.Fallback {
	return broker.Fallback{Owner: "team orders", Text: "they queue up"}
}

// bundles tells of its changes, as a source of the Workload API does.
type bundles struct {
	*x509bundle.Set
	mu      sync.Mutex
	changed chan struct{}
}

func (b *bundles) Changed() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.changed
}

func (b *bundles) ring() {
	b.mu.Lock()
	defer b.mu.Unlock()
	close(b.changed)
	b.changed = make(chan struct{})
}

// world is a served broker.
type world struct {
	t       *testing.T
	clock   *clock
	td      *spiffetest.TrustDomain
	bundles *bundles
	b       *broker.Broker
	key     *ecdsa.PrivateKey // that b signs with
	alerts  atomic.Int64      // in the audit
	policy  *policy
	srv     *rpc.Server
	addr    string
	served  chan error
}

func newWorld(t *testing.T) *world {
	t.Helper()
	return newWorldOn(t, func(era broker.Record) broker.Store { return storetest.Memory(t, era) })
}

func newWorldOn(t *testing.T, open func(broker.Record) broker.Store, options ...grpc.ServerOption) *world {
	t.Helper()
	start := time.Now().UTC()
	w := &world{t: t, clock: &clock{now: start}, policy: &policy{denied: map[spiffeid.ID]bool{}}}
	w.td = spiffetest.ForTest(t, spiffetest.Config{TrustDomain: domain})
	w.bundles = &bundles{Set: x509bundle.NewSet(w.td.Bundle()), changed: make(chan struct{})}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, err := token.NewPublicKey(token.ES256, &key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	w.key = key
	w.b, err = broker.New(broker.Config{
		Issuer: issuer, Policy: w.policy,
		Store:  open(storetest.Era(token.NextEra(0, start))),
		Signer: func() (broker.Signer, bool) { return broker.PrivateSigner(public, key), true },
		VerifyKey: func(k feed.Key, at time.Time) error {
			return keys.VerifyKey(issuer, k, w.td, spiffeid.MatchID(brokerID), at)
		},
		Audit: func(e broker.AuditEntry) error {
			if e.Alert {
				w.alerts.Add(1)
			}
			return nil
		},
		Now:  w.clock.Now,
		Boot: func() feed.Instant { return feed.Instant(w.clock.Now().Sub(start) + time.Hour) },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	if err := w.b.Load(ctx); err != nil {
		t.Fatal(err)
	}
	running := make(chan error, 1)
	go func() { running <- w.b.Run(ctx) }()
	if err := w.b.CheckKeys(ctx); err != nil {
		t.Fatal(err)
	}
	w.publish(public, key)

	w.srv, err = rpc.NewServer(rpc.Config{
		Broker: w.b, SVIDs: w.td.Source(brokerID), Bundle: w.bundles, BundlesChanged: w.bundles.Changed, Now: w.clock.Now, Options: options,
		TrustDomains: []spiffeid.TrustDomain{domain, spiffeid.RequireTrustDomainFromString("partner.example")},
	})
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w.addr, w.served = listener.Addr().String(), make(chan error, 1)
	go func() { w.served <- w.srv.Serve(listener) }()
	t.Cleanup(func() {
		w.srv.Stop()
		<-w.served
		cancel()
		if err := <-running; err != nil {
			t.Error(err)
		}
	})
	return w
}

func (w *world) publish(public token.PublicKey, key *ecdsa.PrivateKey) {
	w.t.Helper()
	der, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		w.t.Fatal(err)
	}
	svid := w.svid(brokerID, spiffetest.SVIDOptions{})
	signature, err := crypto.SignMessage(svid.PrivateKey, rand.Reader, feed.KeyStatement(issuer, public, der), crypto.SHA256)
	if err != nil {
		w.t.Fatal(err)
	}
	k := feed.Key{Public: public, DER: der, Signature: signature, Certificates: [][]byte{svid.Certificates[0].Raw}}
	if err := w.b.PublishKey(context.Background(), k); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) svid(id spiffeid.ID, opts spiffetest.SVIDOptions) *x509svid.SVID {
	w.t.Helper()
	if opts.NotBefore.IsZero() && opts.NotAfter.IsZero() {
		// Also for a slow test: the server's clock stands still.
		opts.NotBefore, opts.NotAfter = w.clock.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	}
	s, err := w.td.IssueSVID(id, opts)
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

// config is a client's side of mTLS.
func (w *world) config(svid x509svid.Source) *tls.Config {
	return tlsconfig.MTLSClientConfig(svid, w.td, tlsconfig.AuthorizeID(brokerID))
}

// dial connects with a TLS configuration.
func (w *world) dial(cfg *tls.Config) *grpc.ClientConn {
	w.t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+w.addr, grpc.WithTransportCredentials(credentials.NewTLS(cfg)), grpc.WithDefaultCallOptions(grpc.MaxCallSendMsgSize(16<<20)))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { conn.Close() })
	return conn
}

// as connects as an identity with a fresh SVID.
func (w *world) as(id spiffeid.ID) *grpc.ClientConn {
	w.t.Helper()
	return w.dial(w.config(w.svid(id, spiffetest.SVIDOptions{})))
}

// soon bounds what a test waits for.
func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute) // a flood takes its time on a busy machine
	t.Cleanup(cancel)
	return ctx
}

func issue(t *testing.T, conn grpc.ClientConnInterface) (*dayflyv1.IssueResponse, error) {
	t.Helper()
	return dayflyv1.NewTokenServiceClient(conn).Issue(soon(t), &dayflyv1.IssueRequest{Audience: "orders"})
}

// refused checks the status of a call, and the reason and hint with it.
func refused(t *testing.T, err error, code codes.Code, reason string) *sdk.Error {
	t.Helper()
	var e *sdk.Error
	if !errors.As(sdk.FromRPC(err), &e) {
		t.Fatalf("got %v, want %s %s", err, code, reason)
	}
	if e.Code != code || e.Reason != reason {
		t.Fatalf("got %s %v, want %s %s", e.Code, e, code, reason)
	}
	if reason != "" && (e.Hint == "" || e.Message == "") {
		t.Errorf("%s: message %q, hint %q", reason, e.Message, e.Hint)
	}
	return e
}
