package verify_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/durationpb"
)

const issuer = "https://dayfly.example.org"

var (
	payments = spiffeid.RequireFromString("spiffe://example.org/payments")
	orders   = spiffeid.RequireFromString("spiffe://example.org/orders")
	thief    = spiffeid.RequireFromString("spiffe://example.org/thief")
)

// A broker serves the feed of a real feed.Log by a script: what a test sets decides how
// honest and how quick it is.
type broker struct {
	dayflyv1.UnimplementedFeedServiceServer

	key    *ecdsa.PrivateKey
	public token.PublicKey

	mu      sync.Mutex
	log     feed.Log
	changed chan struct{}

	mute     bool                           // answers no ping
	age      time.Duration                  // of its answers
	bound    time.Duration                  // of its welcome, 0 for what is asked
	issuer   string                         // of its welcome
	pongHead *feed.Position                 // in place of the head
	held     bool                           // delivers no events
	tamper   func(*dayflyv1.FollowResponse) // what goes out
	onPing   func()                         // before a ping is answered
	signs    *signer                        // of its heads, nil for none
	signed   time.Duration                  // age that it signs
	subs     []*dayflyv1.Subscribe
	acks     []feed.Position
	uses     []*dayflyv1.Use
	dropped  uint64
	reports  map[uint64]int // number to how often it came
	pings    int
	streams  int
}

func newBroker(t testing.TB) *broker {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, err := token.NewPublicKey(token.ES256, &key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	b := &broker{key: key, public: public, changed: make(chan struct{}), issuer: issuer, reports: map[uint64]int{}}
	b.append(t, feed.Event{Era: &feed.Era{Era: 0x1000}})
	b.publish(t, public)
	return b
}

// do changes the script.
func (b *broker) do(f func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f()
	close(b.changed)
	b.changed = make(chan struct{})
}

// until waits for something that a test can see of the broker.
func (b *broker) until(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.After(time.Minute)
	for {
		b.mu.Lock()
		ok, changed := cond(), b.changed
		b.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("waited in vain for: %s", what)
		}
	}
}

func (b *broker) append(t testing.TB, e feed.Event) uint64 {
	t.Helper()
	var err error
	b.do(func() {
		e.Seq = b.log.Head().Seq + 1
		e.Private = sha256.Sum256([]byte{byte(e.Seq)})
		e.Sum = e.Chain(b.log.Head().Sum)
		err = b.log.Append(e)
	})
	if err != nil {
		t.Fatal(err)
	}
	return e.Seq
}

func (b *broker) publish(t testing.TB, key token.PublicKey) uint64 {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key.Key)
	if err != nil {
		t.Fatal(err)
	}
	return b.append(t, feed.Event{Key: &feed.Key{Public: key, DER: der}})
}

func (b *broker) revoke(t testing.TB, selectors ...revocation.Selector) uint64 {
	t.Helper()
	return b.append(t, feed.Event{Revocation: &feed.Revocation{Selectors: selectors}})
}

func (b *broker) head() feed.Position {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.log.Head()
}

// claims returns those of a good token: payments', for orders, five minutes.
func (b *broker) claims(t testing.TB) *token.Claims {
	t.Helper()
	now := time.Now().Truncate(time.Second)
	grant, err := token.NewGrantID(payments, now, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &token.Claims{
		Issuer:      issuer,
		Audience:    "orders",
		Lineage:     []token.Member{{Identity: payments, Grant: grant, Key: b.public.ID, SVID: token.Thumbprint{7}}},
		Scopes:      []string{"orders:read", "orders:write"},
		IssuedAt:    now,
		NotBefore:   now,
		Expires:     now.Add(5 * time.Minute),
		Binding:     token.BindingSPIFFE,
		Transaction: "txn-1",
		Position:    b.head().Token(),
	}
}

func (b *broker) sign(t testing.TB, c *token.Claims) string {
	t.Helper()
	return signWith(t, c, b.key)
}

func signWith(t testing.TB, c *token.Claims, key *ecdsa.PrivateKey) string {
	t.Helper()
	u, err := token.Encode(c, token.ES256)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := u.Sign(key)
	if err != nil {
		t.Fatal(err)
	}
	return secret.Reveal()
}

// good returns a good token.
func (b *broker) good(t testing.TB) string {
	t.Helper()
	return b.sign(t, b.claims(t))
}

func (b *broker) Follow(rpc dayflyv1.FeedService_FollowServer) error {
	first, err := rpc.Recv()
	if err != nil {
		return err
	}
	sub, err := wire.ToSubscription(first.GetSubscribe())
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	b.do(func() { b.subs = append(b.subs, first.GetSubscribe()); b.streams++ })
	defer b.do(func() { b.streams-- })
	pings := make(chan []byte, 64)
	ctx, cancel := context.WithCancelCause(rpc.Context())
	go func() { cancel(b.listen(rpc, pings)) }()
	return b.serve(ctx, rpc, sub, pings)
}

func (b *broker) listen(rpc dayflyv1.FeedService_FollowServer, pings chan<- []byte) error {
	for {
		m, err := rpc.Recv()
		if err != nil {
			return err
		}
		b.do(func() {
			if a := m.GetAcknowledge(); a != nil {
				p, _ := wire.ToPosition(a.GetPosition())
				b.acks = append(b.acks, p)
			}
			if r := m.GetUseReport(); r != nil {
				if b.reports[r.GetNumber()]++; b.reports[r.GetNumber()] > 1 {
					return // as a broker does: it was counted
				}
				b.uses = append(b.uses, r.GetUses()...)
				b.dropped += r.GetDropped()
			}
			if m.GetPing() != nil {
				b.pings++
			}
		})
		if p := m.GetPing(); p != nil {
			pings <- p.GetNonce()
		}
	}
}

func (b *broker) serve(ctx context.Context, rpc dayflyv1.FeedService_FollowServer, sub wire.Subscription, pings <-chan []byte) error {
	b.mu.Lock()
	bound := sub.Bound
	if b.bound != 0 {
		bound = b.bound
	}
	welcome := &dayflyv1.Welcome{MaxStaleness: durationpb.New(bound), MaxTokenTtl: durationpb.New(30 * time.Minute), Issuer: b.issuer}
	b.mu.Unlock()
	if err := b.send(rpc, &dayflyv1.FollowResponse{Message: &dayflyv1.FollowResponse_Welcome{Welcome: welcome}}); err != nil {
		return err
	}
	cursor := feed.NewCursor(sub.Position)
	for {
		b.mu.Lock()
		changed := b.changed
		d, news := feed.Delivery{}, false
		if !b.held {
			d, news = cursor.Next(&b.log, 2)
		}
		b.mu.Unlock()
		if news {
			if err := b.send(rpc, wire.Delivery(d)); err != nil {
				return err
			}
			continue
		}
		select {
		case nonce := <-pings:
			if err := b.pong(rpc, nonce); err != nil {
				return err
			}
		case <-changed:
		case <-ctx.Done():
			if err := context.Cause(ctx); errors.Is(err, io.EOF) {
				return nil
			}
			return ctx.Err()
		}
	}
}

func (b *broker) pong(rpc dayflyv1.FeedService_FollowServer, nonce []byte) error {
	b.mu.Lock()
	onPing := b.onPing
	b.mu.Unlock()
	if onPing != nil {
		onPing()
	}
	b.mu.Lock()
	mute := b.mute
	p := wire.Pong{Nonce: string(nonce), Head: b.log.Head(), Age: b.age, Horizon: b.log.Horizon()}
	if b.pongHead != nil {
		p.Head = *b.pongHead
	}
	if b.signs != nil {
		// Somebody else's ping waited for the same proof.
		tree := feed.NewNonceTree([]string{"nonce-of-somebody", p.Nonce})
		p.Signed, p.Path = b.signs.sign(&b.log, tree.Root(), b.signed), tree.Path(1)
	}
	b.mu.Unlock()
	if mute {
		return nil
	}
	return b.send(rpc, wire.PongMessage(p))
}

func (b *broker) send(rpc dayflyv1.FeedService_FollowServer, m *dayflyv1.FollowResponse) error {
	b.mu.Lock()
	tamper := b.tamper
	b.mu.Unlock()
	if tamper != nil {
		tamper(m)
	}
	return rpc.Send(m)
}

// A network is where the broker listens, and can be cut.
type network struct {
	mu     sync.Mutex
	lis    *bufconn.Listener
	server *grpc.Server
}

func (n *network) start(b *broker) {
	lis := bufconn.Listen(1 << 20)
	server := grpc.NewServer()
	dayflyv1.RegisterFeedServiceServer(server, b)
	n.mu.Lock()
	n.lis, n.server = lis, server
	n.mu.Unlock()
	go func() { _ = server.Serve(lis) }()
}

func (n *network) cut() {
	n.mu.Lock()
	server := n.server
	n.lis, n.server = nil, nil
	n.mu.Unlock()
	if server != nil {
		server.Stop()
	}
}

func (n *network) dial(ctx context.Context, _ string) (net.Conn, error) {
	n.mu.Lock()
	lis := n.lis
	n.mu.Unlock()
	if lis == nil {
		return nil, errors.New("the network is cut")
	}
	return lis.DialContext(ctx)
}

// A world is a broker, a network and a verifier that follows it.
type world struct {
	*broker
	net      *network
	verifier *verify.Verifier
	conn     *grpc.ClientConn
	cancel   context.CancelFunc
	ended    chan struct{}
}

// newWorld starts one; change edits the verifier's configuration. All its goroutines end
// with the test, so it can live in a synctest bubble.
func newWorld(t testing.TB, change func(*verify.Config)) *world {
	t.Helper()
	w := &world{broker: newBroker(t), net: &network{}, ended: make(chan struct{})}
	w.net.start(w.broker)
	conn, err := grpc.NewClient("passthrough:///feed", grpc.WithContextDialer(w.net.dial), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	w.conn = conn
	began := time.Now()
	cfg := verify.Config{
		Conn:      conn,
		Audiences: []string{"orders", "spiffe://example.org/orders"},
		Boot:      func() feed.Instant { return feed.Instant(time.Hour + time.Since(began)) },
		Log:       slog.New(slog.NewTextHandler(testWriter{t}, nil)),
	}
	if change != nil {
		change(&cfg)
	}
	if w.verifier, err = verify.New(cfg); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	w.cancel = cancel
	go func() {
		defer close(w.ended)
		if err := w.verifier.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	}()
	t.Cleanup(w.close)
	return w
}

func (w *world) close() {
	w.cancel()
	<-w.ended
	_ = w.conn.Close()
	w.net.cut()
}

// testWriter logs only while the test runs.
type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Logf("%s", b)
	return len(b), nil
}

func (w *world) ready(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := w.verifier.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
}

// applied waits until the verifier has acknowledged a number.
func (w *world) applied(t testing.TB, seq uint64) {
	t.Helper()
	w.until(t, "an acknowledgement", func() bool {
		n := len(w.acks)
		return n > 0 && w.acks[n-1].Seq >= seq
	})
}

func (w *world) verify(raw string, id spiffeid.ID) (*verify.Verified, error) {
	return w.verifier.Verify(context.Background(), raw, verify.Peer{ID: id, Address: "192.0.2.1"})
}

// want checks that payments' token is refused for a reason, "" for accepted.
func (w *world) want(t testing.TB, raw string, reason verify.Reason) {
	t.Helper()
	_, err := w.verify(raw, payments)
	if got := verify.ReasonOf(err); got != reason || err != nil && got == "" {
		t.Errorf("got %v, want %q", err, reason)
	}
}
