package agent_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// patience is how long a test waits for what must happen.
const patience = time.Minute

var (
	domain   = spiffeid.RequireTrustDomainFromString("td")
	brokerID = spiffeid.RequireFromString("spiffe://td/dayfly/broker")
	payments = spiffeid.RequireFromString("spiffe://td/payments")
)

// broker is a scripted broker: real tokens, a real log, real mTLS, and whatever fault a
// test wants.
type broker struct {
	t    *testing.T
	td   *spiffetest.TrustDomain
	addr string
	port *port
	key  *ecdsa.PrivateKey
	pub  token.PublicKey
	der  []byte

	mu      sync.Mutex
	log     feed.Log
	changed chan struct{}
	ttl     time.Duration
	binding token.Binding
	refuse  error // of Issue
	follow  error // of a Follow
	norelay bool
	welcome func()              // is called as a stream begins, if not nil; set before there are any
	minted  func(secret string) // hears of each, if not nil
	twist   func(*dayflyv1.Credential) *dayflyv1.Credential
	silent  bool   // no pongs
	below   string // the instance that it refuses behind a relay
	age     time.Duration
	gate    chan struct{} // Issue waits for it, if not nil
	server  *grpc.Server
	subs    []wire.Subscription

	issued  atomic.Int64
	up      chan *dayflyv1.FollowRequest // all that subscribers sent
	streams atomic.Int64
}

func newBroker(t *testing.T, td *spiffetest.TrustDomain) *broker {
	t.Helper()
	b := unservedBroker(t, td)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b.addr, b.port = l.Addr().String(), &port{Listener: l}
	b.serve()
	var held sync.WaitGroup
	held.Go(b.port.hold)
	t.Cleanup(func() {
		b.stop()
		_ = l.Close()
		held.Wait()
	})
	return b
}

// A port is a broker's address. The test keeps it to its end, or somebody else might get it
// while the broker is away: then connections end as they begin.
type port struct {
	net.Listener
	server atomic.Pointer[behind]
}

func (p *port) hold() {
	for {
		conn, err := p.Accept()
		if err != nil {
			return
		}
		b := p.server.Load()
		select {
		case b.conns <- conn:
		case <-b.closed:
			_ = conn.Close()
		}
	}
}

// behind is the listener of a server behind a port.
type behind struct {
	addr   net.Addr
	conns  chan net.Conn
	closed chan struct{}
	close  func()
}

func (p *port) listen() net.Listener {
	b := &behind{addr: p.Addr(), conns: make(chan net.Conn), closed: make(chan struct{})}
	b.close = sync.OnceFunc(func() { close(b.closed) })
	p.server.Store(b)
	return b
}

func (b *behind) Accept() (net.Conn, error) {
	select {
	case conn := <-b.conns:
		return conn, nil
	case <-b.closed:
		return nil, net.ErrClosed
	}
}

func (b *behind) Close() error   { b.close(); return nil }
func (b *behind) Addr() net.Addr { return b.addr }

// unservedBroker has no socket: for a synctest bubble.
func unservedBroker(t *testing.T, td *spiffetest.TrustDomain) *broker {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := token.NewPublicKey(token.ES256, key.Public())
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	b := &broker{
		t: t, td: td, key: key, pub: pub, der: der, changed: make(chan struct{}),
		ttl: 5 * time.Minute, binding: token.BindingSPIFFE, up: make(chan *dayflyv1.FollowRequest, 1<<14),
	}
	b.append(feed.Event{Era: &feed.Era{Era: 7}})
	b.append(feed.Event{Key: &feed.Key{Public: pub, DER: der, Signature: []byte("x")}})
	return b
}

func (b *broker) serve() {
	l := b.port.listen()
	source := b.td.Source(brokerID)
	cfg := tlsconfig.MTLSServerConfig(source, b.td, tlsconfig.AuthorizeAny())
	cfg.SessionTicketsDisabled = true
	cfg.MinVersion = tls.VersionTLS13
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(cfg)), grpc.MaxRecvMsgSize(64<<10), grpc.WaitForHandlers(true))
	dayflyv1.RegisterTokenServiceServer(s, tokenServer{b: b})
	dayflyv1.RegisterFeedServiceServer(s, feedServer{b: b})
	b.mu.Lock()
	b.server = s
	b.mu.Unlock()
	go func() { _ = s.Serve(l) }()
}

func (b *broker) stop() {
	b.mu.Lock()
	s := b.server
	b.mu.Unlock()
	s.Stop()
}

// restart serves again at the same address.
func (b *broker) restart() { b.serve() }

func (b *broker) append(e feed.Event) feed.Position {
	b.mu.Lock()
	defer b.mu.Unlock()
	head := b.log.Head()
	e.Seq = head.Seq + 1
	e.Sum = e.Chain(head.Sum)
	if err := b.log.Append(e); err != nil {
		b.t.Fatal(err)
	}
	close(b.changed)
	b.changed = make(chan struct{})
	return b.log.Head()
}

func (b *broker) revoke(s revocation.Selector) feed.Position {
	return b.append(feed.Event{Revocation: &feed.Revocation{Selectors: []revocation.Selector{s}}})
}

// set changes how the broker behaves.
func (b *broker) set(f func(*broker)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f(b)
}

type tokenServer struct {
	dayflyv1.UnimplementedTokenServiceServer
	b *broker
}

func (s tokenServer) Issue(ctx context.Context, m *dayflyv1.IssueRequest) (*dayflyv1.IssueResponse, error) {
	minted := s.b.mint(m.GetAudience(), m.GetScopes()) // before it waits: at the head of that moment
	s.b.issued.Add(1)
	s.b.mu.Lock()
	gate, refused := s.b.gate, s.b.refuse
	s.b.mu.Unlock()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if refused != nil {
		return nil, refused
	}
	s.b.mu.Lock()
	twist := s.b.twist
	s.b.mu.Unlock()
	if twist != nil {
		minted = twist(minted)
	}
	return &dayflyv1.IssueResponse{Credential: minted}, nil
}

func (s tokenServer) Exchange(_ context.Context, m *dayflyv1.ExchangeRequest) (*dayflyv1.ExchangeResponse, error) {
	if m.GetSubjectToken() != "subject" {
		return nil, refusal(codes.InvalidArgument, "SUBJECT_TOKEN_MALFORMED", "not a token")
	}
	return &dayflyv1.ExchangeResponse{Credential: s.b.mint(m.GetAudience(), m.GetScopes())}, nil
}

func refusal(code codes.Code, reason, message string) error {
	return refusalWith(code, reason, message, map[string]string{"hint": "a hint"})
}

func refusalWith(code codes.Code, reason, message string, metadata map[string]string) error {
	s, err := status.New(code, message).WithDetails(&errdetails.ErrorInfo{Domain: sdk.ErrorDomain, Reason: reason, Metadata: metadata})
	if err != nil {
		panic(err)
	}
	return s.Err()
}

func (b *broker) mint(audience string, scopes []string) *dayflyv1.Credential {
	b.mu.Lock()
	ttl, binding, head := b.ttl, b.binding, b.log.Head()
	b.mu.Unlock()
	now := time.Now().Truncate(time.Second)
	grant, err := token.NewGrantID(payments, now, rand.Reader)
	if err != nil {
		b.t.Error(err)
		return nil
	}
	svid, err := b.td.Source(payments).GetX509SVID()
	if err != nil {
		b.t.Error(err)
		return nil
	}
	claims := &token.Claims{
		Issuer: "https://broker.test", Audience: audience, Scopes: scopes,
		Lineage:  []token.Member{{Identity: payments, Grant: grant, Key: b.pub.ID, SVID: token.ThumbprintOf(svid.Certificates[0])}},
		IssuedAt: now, NotBefore: now, Expires: now.Add(ttl), Binding: binding, Transaction: "txn", Position: head.Token(),
	}
	if binding == token.BindingX5T {
		claims.Certificate = thumb(svid.Certificates[0])
	}
	unsigned, err := token.Encode(claims, token.ES256)
	if err != nil {
		b.t.Error(err)
		return nil
	}
	secret, err := unsigned.Sign(b.key)
	if err != nil {
		b.t.Error(err)
		return nil
	}
	b.mu.Lock()
	minted := b.minted
	b.mu.Unlock()
	if minted != nil {
		minted(secret.Reveal())
	}
	return &dayflyv1.Credential{
		Token: secret.Reveal(), Grant: grant.String(), Audience: audience, Scopes: scopes, Binding: wire.Binding(binding),
		IssuedAt: timestamppb.New(now), ExpiresAt: timestamppb.New(now.Add(ttl)),
	}
}

type feedServer struct {
	dayflyv1.UnimplementedFeedServiceServer
	b *broker
}

// Follow answers like a broker and keeps what came up.
func (s feedServer) Follow(stream grpc.BidiStreamingServer[dayflyv1.FollowRequest, dayflyv1.FollowResponse]) error {
	b := s.b
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	sub, err := wire.ToSubscription(first.GetSubscribe())
	if err != nil {
		return err
	}
	b.mu.Lock()
	refused := b.follow
	if refused == nil && b.norelay && sub.Relay {
		refused = refusal(codes.PermissionDenied, "RELAY_NOT_ALLOWED", "may not relay")
	}
	if refused == nil {
		b.subs = append(b.subs, sub)
	}
	b.mu.Unlock()
	if refused != nil {
		return refused
	}
	b.streams.Add(1)
	if b.welcome != nil {
		b.welcome()
	}
	if err := stream.Send(&dayflyv1.FollowResponse{Message: &dayflyv1.FollowResponse_Welcome{Welcome: &dayflyv1.Welcome{
		MaxStaleness: durationpb.New(sub.Bound), MaxTokenTtl: durationpb.New(time.Hour), Issuer: "https://broker.test",
	}}}); err != nil {
		return err
	}
	asked := make(chan *dayflyv1.FollowRequest, 1024)
	ended := make(chan error, 1)
	go func() {
		for {
			m, err := stream.Recv()
			if err != nil {
				ended <- err
				return
			}
			b.up <- m
			if m.GetPing() != nil || m.GetRelayReport() != nil {
				asked <- m
			}
		}
	}()
	return b.feed(stream, feed.NewCursor(sub.Position), asked, ended)
}

func (b *broker) feed(stream grpc.BidiStreamingServer[dayflyv1.FollowRequest, dayflyv1.FollowResponse], cursor *feed.Cursor, asked <-chan *dayflyv1.FollowRequest, ended <-chan error) error {
	for {
		b.mu.Lock()
		d, ok := cursor.Next(&b.log, 100)
		changed := b.changed
		b.mu.Unlock()
		if ok {
			if err := stream.Send(wire.Delivery(d)); err != nil {
				return err
			}
			continue
		}
		select {
		case <-changed:
		case m := <-asked:
			if err := b.answer(stream, m); err != nil {
				return err
			}
		case err := <-ended:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
	}
}

func (b *broker) answer(stream grpc.BidiStreamingServer[dayflyv1.FollowRequest, dayflyv1.FollowResponse], m *dayflyv1.FollowRequest) error {
	b.mu.Lock()
	silent, head, age, below := b.silent, b.log.Head(), b.age, b.below
	b.mu.Unlock()
	if p := m.GetPing(); p != nil && !silent {
		return stream.Send(wire.PongMessage(wire.Pong{Nonce: string(p.GetNonce()), Head: head, Age: age}))
	}
	for _, v := range m.GetRelayReport().GetVerifiers() {
		if v.GetPath()[len(v.GetPath())-1] != below || v.GetGone() {
			continue
		}
		err := stream.Send(&dayflyv1.FollowResponse{Message: &dayflyv1.FollowResponse_RelayRefusal{RelayRefusal: &dayflyv1.RelayRefusal{
			Path: v.GetPath(), Code: int32(codes.PermissionDenied), Reason: "POLICY_DENIED", Message: "not for you", Metadata: map[string]string{"hint": "ask"},
		}}})
		if err != nil {
			return err
		}
	}
	return nil
}

// sent waits for a message up that fits.
func (b *broker) sent(what string, fits func(*dayflyv1.FollowRequest) bool) *dayflyv1.FollowRequest {
	b.t.Helper()
	deadline := time.After(patience)
	for {
		select {
		case m := <-b.up:
			if fits(m) {
				return m
			}
		case <-deadline:
			b.t.Fatalf("the broker was never sent %s", what)
		}
	}
}

// fixture is one running agent.
type fixture struct {
	*testing.T
	td         *spiffetest.TrustDomain
	broker     *broker
	agent      *agent.Agent
	dir        string
	grpc, http string
	cancel     context.CancelFunc
	done       chan error
}

func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "df")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func newDomain(t *testing.T) *spiffetest.TrustDomain {
	return spiffetest.ForTest(t, spiffetest.Config{TrustDomain: domain})
}

// start runs an agent for payments. With no broker, nobody is at its broker's address.
func start(t *testing.T, td *spiffetest.TrustDomain, b *broker, change func(*agent.Config), made ...func(*agent.Agent)) *fixture {
	t.Helper()
	addr, err := td.Workload(payments)
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{T: t, td: td, broker: b, dir: tempDir(t), done: make(chan error, 1)}
	f.grpc, f.http = filepath.Join(f.dir, "g.sock"), filepath.Join(f.dir, "h.sock")
	identity := agent.NewIdentities(addr, nil).Identity(payments)
	client, err := sdk.New(sdk.Config{Address: b.addr, Source: identity, BrokerID: brokerID})
	if err != nil {
		t.Fatal(err)
	}
	cfg := agent.Config{
		Upstream: client.Conn(), Source: identity, Changed: identity.Changed,
		GRPC: f.listen(f.grpc), HTTP: f.listen(f.http), MaxStaleness: 3 * time.Second,
	}
	if change != nil {
		change(&cfg)
	}
	a, err := agent.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	f.agent = a
	for _, hear := range made {
		hear(a)
	}
	ctx, cancel := context.WithCancel(context.Background())
	f.cancel = cancel
	var wg sync.WaitGroup
	wg.Go(func() { _ = identity.Run(ctx) })
	go func() {
		err := a.Run(ctx)
		wg.Wait()
		_ = client.Close()
		f.done <- err
	}()
	t.Cleanup(f.stop)
	return f
}

func (f *fixture) listen(path string) net.Listener {
	f.Helper()
	l, err := agent.Listen(agent.SocketConfig{Path: path})
	if err != nil {
		f.Fatal(err)
	}
	return l
}

// stop ends the agent and waits for it; a second call does nothing.
func (f *fixture) stop() {
	f.cancel()
	select {
	case err, ok := <-f.done:
		if ok && err != nil {
			f.Errorf("agent: %v", err)
		}
		if ok {
			close(f.done)
		}
	case <-time.After(patience):
		f.Errorf("the agent did not stop\n%s", stacks())
	}
}

// client is an sdk client of the agent's socket.
func (f *fixture) client() *sdk.Client {
	f.Helper()
	c, err := sdk.New(sdk.Config{Address: "unix://" + f.grpc, Timeout: patience})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = c.Close() })
	return c
}

func (f *fixture) conn() *grpc.ClientConn {
	f.Helper()
	cc, err := grpc.NewClient("unix://"+f.grpc, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = cc.Close() })
	return cc
}

// issue asks until there is a credential.
func (f *fixture) issue(c *sdk.Client, r sdk.Request) *sdk.Credential {
	f.Helper()
	var cred *sdk.Credential
	eventually(f.T, "a credential", func() error {
		var err error
		cred, err = c.Issue(f.Context(), r)
		return err
	})
	return cred
}

// eventually tries until there is no error.
func eventually(t *testing.T, what string, try func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waiting for %s: %v", what, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func stacks() string {
	buf := make([]byte, 1<<20)
	return string(buf[:runtime.Stack(buf, true)])
}

// noLeaks fails the test if goroutines of this module are left at its end. It must be
// called before anything else registers a cleanup.
func noLeaks(t *testing.T) {
	t.Helper()
	t.Cleanup(func() {
		eventually(t, "all goroutines to end", func() error {
			for g := range strings.SplitSeq(stacks(), "\n\n") {
				if strings.Contains(g, "dayflyhq/dayfly/agent.") || strings.Contains(g, "dayflyhq/dayfly/agent/incoming.") || strings.Contains(g, "dayflyhq/dayfly/sdk.") {
					return errors.New(g)
				}
			}
			return nil
		})
	})
}

func sdkRequest(audience string) sdk.Request { return sdk.Request{Audience: audience} }
