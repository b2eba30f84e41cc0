package sdk

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dayflyhq/dayfly/proto/boottime"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
)

// Limits of a client's calls.
const (
	// DefaultTimeout is for a call whose context has no deadline.
	DefaultTimeout = 10 * time.Second
	// MaxReceiveBytes bounds one message from the broker; a snapshot of the feed
	// comes in several.
	MaxReceiveBytes = 4 << 20
	// MaxSendBytes bounds one message to the broker: the design's request size.
	MaxSendBytes = 64 << 10

	// receiveWindow is how much may be under way to us: a snapshot comes from far away at
	// 10 MiB a second.
	receiveWindow = 1 << 20

	keepaliveTime    = 30 * time.Second
	keepaliveTimeout = 10 * time.Second
	// dialPatience is for one connection: after a restart a whole fleet is in line, and who
	// gives up and comes again makes the line no shorter.
	dialPatience = 10 * time.Second
	// maxRedial keeps a client from sleeping on after its broker is back.
	maxRedial = 2 * time.Second
	// maxSleep is how long the machine may sleep under a connection: others have given it up
	// by then, perhaps, and it would take long to find that out.
	maxSleep = 5 * time.Second
)

// unixScheme begins the address of an agent's socket.
const unixScheme = "unix://"

// A Source gives this workload's current SVID and the bundles that verify its peers:
// a *workloadapi.X509Source.
type Source interface {
	x509svid.Source
	x509bundle.Source
}

// Config says where credentials come from.
type Config struct {
	// Address is "host:port" of a broker, or "unix:///path" of an agent's socket.
	// Required.
	Address string

	// Source is this workload's identity. Required for a broker. Over a unix socket the
	// kernel says who calls, and Source only tells when certificate-bound credentials are
	// of no more use; without it a TokenSource asks the agent for each one.
	Source Source

	// BrokerID is the SPIFFE ID that the broker must prove. Required for a broker:
	// any other identity of the trust domain could collect tokens in its place.
	BrokerID spiffeid.ID

	// JWTSVID, if set, is asked in every call for a JWT-SVID for the broker's issuer and
	// nobody else, which proves who calls where mTLS ends before the broker: Address is
	// then what leads to its listener for them, and BrokerID who ends mTLS. Not for a
	// unix socket.
	JWTSVID func(context.Context) (string, error)

	// Timeout is for a call whose context has no deadline. Zero means
	// DefaultTimeout.
	Timeout time.Duration

	// Now and Boot are the clocks that credentials are aged with: the usual one, and one
	// that runs while the machine sleeps. Nil means time.Now and CLOCK_BOOTTIME.
	Now  func() time.Time
	Boot func() feed.Instant
}

func (c *Config) unix() bool { return strings.HasPrefix(c.Address, unixScheme) }

func (c *Config) validate() error {
	var errs []error
	if c.unix() {
		if !strings.HasPrefix(c.Address, unixScheme+"/") {
			errs = append(errs, fmt.Errorf("address %q: a socket is unix:// and an absolute path", c.Address))
		}
		if c.JWTSVID != nil {
			errs = append(errs, errors.New("JWT-SVID: the kernel says who calls a unix socket"))
		}
		return errors.Join(errs...)
	}
	if _, _, err := net.SplitHostPort(c.Address); err != nil {
		errs = append(errs, fmt.Errorf("address %q: want host:port, or unix:///path", c.Address))
	}
	if c.Source == nil {
		errs = append(errs, errors.New("source: a broker is called with an SVID"))
	}
	if c.BrokerID.IsZero() {
		errs = append(errs, errors.New("broker ID: the SPIFFE ID of the broker must be pinned"))
	}
	if c.Timeout < 0 {
		errs = append(errs, errors.New("timeout: is negative"))
	}
	return errors.Join(errs...)
}

// A Client calls a broker or an agent. Its methods may be called from any goroutine.
type Client struct {
	cfg    Config
	tokens dayflyv1.TokenServiceClient

	mu      sync.Mutex
	current *connection
	retired map[*connection]bool // those whose last call has not ended
	closed  bool
}

// New returns a client. It connects at the first call, so the broker need not be there
// yet.
func New(cfg Config) (*Client, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("configuring client: %w", err)
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = DefaultTimeout
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Boot == nil {
		cfg.Boot = boottime.Now
	}
	c := &Client{cfg: cfg, retired: map[*connection]bool{}}
	conn, err := c.dial()
	if err != nil {
		return nil, fmt.Errorf("configuring client: %w", err)
	}
	c.current = conn
	c.tokens = dayflyv1.NewTokenServiceClient(c.Conn())
	return c, nil
}

// Close ends the client's connections and every stream on them. A second call does
// nothing.
func (c *Client) Close() error {
	c.mu.Lock()
	open := []*connection{c.current}
	for conn := range c.retired {
		open = append(open, conn)
	}
	closed := c.closed
	c.closed = true
	c.mu.Unlock()
	if closed {
		return nil
	}
	var errs []error
	for _, conn := range open {
		errs = append(errs, conn.cc.Close())
	}
	return errors.Join(errs...)
}

// A Request is what a caller asks for. Only Audience must be set.
type Request struct {
	// Audience is whom the token is for: a SPIFFE ID or a name of policy data.
	Audience string
	// Scopes are at most 32; none means what policy gives by default.
	Scopes []string
	// TTL is the wanted life, zero for the policy's choice.
	TTL time.Duration
	// Binding is who may present the token, "" for the policy's choice. The broker
	// takes the stricter of this and of what policy says.
	Binding token.Binding
	// IdempotencyKey makes a retried call return the credential of the first. Empty
	// means a random one: no call is the retry of another.
	IdempotencyKey string
}

func (r *Request) ttl() *durationpb.Duration {
	if r.TTL == 0 {
		return nil
	}
	return durationpb.New(r.TTL)
}

func (r *Request) key() string {
	if r.IdempotencyKey == "" {
		return rand.Text()
	}
	return r.IdempotencyKey
}

// A Credential is what a caller got. All of it but the token may be logged, and the
// token redacts itself.
type Credential struct {
	Token    token.Secret
	Grant    string
	Audience string
	Scopes   []string
	Binding  token.Binding
	IssuedAt time.Time // by the broker's clock
	Expires  time.Time // by the broker's clock

	// certificate is the SHA-256 of the certificate that it is bound to, zero for none.
	certificate [sha256.Size]byte

	// By the local clock: when the call that fetched it began, and what was left of
	// its life then at the least.
	asked moment
	left  time.Duration
}

// Issue gets a credential for one audience. Errors are *Error.
func (c *Client) Issue(ctx context.Context, r Request) (*Credential, error) {
	ctx, cancel := c.deadline(ctx)
	defer cancel()
	asked := c.now()
	resp, err := c.tokens.Issue(ctx, &dayflyv1.IssueRequest{
		Audience: r.Audience, Scopes: r.Scopes, Ttl: r.ttl(), Binding: wire.Binding(r.Binding), IdempotencyKey: r.key(),
	})
	if err != nil {
		return nil, err
	}
	return c.credential(resp.GetCredential(), asked)
}

// Exchange makes a derived credential out of a presented one, which must be addressed
// to this workload (RFC 8693, delegation). Errors are *Error.
func (c *Client) Exchange(ctx context.Context, subject token.Secret, r Request) (*Credential, error) {
	ctx, cancel := c.deadline(ctx)
	defer cancel()
	asked := c.now()
	resp, err := c.tokens.Exchange(ctx, &dayflyv1.ExchangeRequest{
		SubjectToken: subject.Reveal(), Audience: r.Audience, Scopes: r.Scopes, Ttl: r.ttl(), Binding: wire.Binding(r.Binding), IdempotencyKey: r.key(),
	})
	if err != nil {
		return nil, err
	}
	return c.credential(resp.GetCredential(), asked)
}

func (c *Client) deadline(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, c.cfg.Timeout)
}

func (c *Client) credential(m *dayflyv1.Credential, asked moment) (*Credential, error) {
	binding, err := wire.ToBinding(m.GetBinding())
	if err != nil {
		return nil, fmt.Errorf("reading credential: %w", err)
	}
	out := &Credential{
		Token:    token.NewSecret(m.GetToken()),
		Grant:    m.GetGrant(),
		Audience: m.GetAudience(),
		Scopes:   m.GetScopes(),
		Binding:  binding,
		IssuedAt: m.GetIssuedAt().AsTime(),
		Expires:  m.GetExpiresAt().AsTime(),
		asked:    asked,
	}
	if out.Token.IsZero() || !m.GetIssuedAt().IsValid() || !m.GetExpiresAt().IsValid() {
		return nil, errors.New("reading credential: it is incomplete")
	}
	if binding == token.BindingX5T {
		t, err := token.Inspect(m.GetToken())
		if err != nil {
			return nil, fmt.Errorf("reading credential: %w", err)
		}
		out.certificate = t.Certificate
	}
	// A broker's answer is new, so its life begins no earlier than the call: our own
	// clock may be off by any amount. An agent's answer may come from its memory, but
	// its clock is ours.
	out.left = wire.Life(m)
	if c.cfg.unix() {
		out.left = min(out.Expires.Sub(out.IssuedAt), out.Expires.Sub(asked.time))
	}
	return out, nil
}

// Conn returns the client's connection for any other service of the broker. It follows
// the rotation of the SVID: a call that begins after it goes over a new connection, and
// the old one is closed when its last call has ended. Errors are *Error.
func (c *Client) Conn() grpc.ClientConnInterface { return (*rotating)(c) }

// A connection counts the calls on it, so that it can be closed after the last.
type connection struct {
	cc *grpc.ClientConn
	// presented is the leaf of the last handshake, nil before the first.
	presented atomic.Pointer[[]byte]
	calls     int // guarded by Client.mu
	made      moment
	reads     atomic.Uint64 // how often anything came
	silent    atomic.Bool   // a call ran out of time, and nothing came meanwhile
}

func (c *Client) dial() (*connection, error) {
	conn := &connection{made: c.now()}
	target, creds := c.cfg.Address, insecure.NewCredentials()
	if !c.cfg.unix() {
		target, creds = "dns:///"+c.cfg.Address, listening{credentials.NewTLS(c.tls(conn)), conn}
	}
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(creds),
		grpc.WithDisableServiceConfig(), // from DNS, which proves nothing
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxReceiveBytes), grpc.MaxCallSendMsgSize(MaxSendBytes)),
		// Fixed windows: to find out how far they could grow gRPC answers each message that
		// comes by itself with a ping. A fleet would answer each event of the feed so.
		grpc.WithStaticStreamWindowSize(receiveWindow), grpc.WithStaticConnWindowSize(receiveWindow),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveTime, Timeout: keepaliveTimeout}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.3, MaxDelay: maxRedial},
			MinConnectTimeout: dialPatience,
		}),
	}
	if c.cfg.JWTSVID != nil {
		options = append(options, grpc.WithPerRPCCredentials(jwtSVID(c.cfg.JWTSVID)))
	}
	cc, err := grpc.NewClient(target, options...)
	if err != nil {
		return nil, err
	}
	conn.cc = cc
	return conn, nil
}

// listening counts what is read from below TLS.
type listening struct {
	credentials.TransportCredentials
	conn *connection
}

func (l listening) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return l.TransportCredentials.ClientHandshake(ctx, authority, &counted{raw, l.conn})
}

func (l listening) Clone() credentials.TransportCredentials {
	return listening{l.TransportCredentials.Clone(), l.conn}
}

type counted struct {
	net.Conn
	conn *connection
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 {
		c.conn.reads.Add(1)
	}
	return n, err
}

// jwtSVID shows a JWT-SVID in each call.
type jwtSVID func(context.Context) (string, error)

func (fetch jwtSVID) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	s, err := fetch(ctx)
	if err != nil {
		return nil, status.Errorf(codes.Unavailable, "fetching a JWT-SVID: %v", err)
	}
	return map[string]string{"authorization": "Bearer " + s}, nil
}

// RequireTransportSecurity: it is a bearer document.
func (jwtSVID) RequireTransportSecurity() bool { return true }

// tls authorises the broker in VerifyConnection and not, as go-spiffe does, in
// VerifyPeerCertificate, which crypto/tls skips on a resumed session; there is no session
// cache either.
func (c *Client) tls(conn *connection) *tls.Config {
	authorize := tlsconfig.AuthorizeID(c.cfg.BrokerID)
	cfg := tlsconfig.MTLSClientConfig(c.cfg.Source, c.cfg.Source, authorize)
	cfg.MinVersion = tls.VersionTLS13
	cfg.ClientSessionCache = nil
	cfg.VerifyPeerCertificate = nil
	cfg.VerifyConnection = func(state tls.ConnectionState) error {
		id, chains, err := x509svid.Verify(state.PeerCertificates, c.cfg.Source)
		if err != nil {
			return err
		}
		return authorize(id, chains)
	}
	present := cfg.GetClientCertificate
	cfg.GetClientCertificate = func(info *tls.CertificateRequestInfo) (*tls.Certificate, error) {
		cert, err := present(info)
		if err == nil && len(cert.Certificate) > 0 {
			conn.presented.Store(&cert.Certificate[0])
		}
		return cert, err
	}
	return cfg
}

// fits reports whether a credential goes with this workload's current SVID: one that is
// bound to a certificate dies with it. Where there is no telling, it does.
func (c *Client) fits(cred *Credential) bool {
	if cred.Binding != token.BindingX5T || c.cfg.Source == nil {
		return true
	}
	svid, err := c.cfg.Source.GetX509SVID()
	if err != nil || len(svid.Certificates) == 0 {
		return true
	}
	return sha256.Sum256(svid.Certificates[0].Raw) == cred.certificate
}

// keeps reports whether it is known when a credential fits no more.
func (c *Client) keeps(cred *Credential) bool {
	return cred.Binding != token.BindingX5T || c.cfg.Source != nil
}

func (c *Client) now() moment { return readClocks(c.cfg.Now, c.cfg.Boot) }

// outdated reports whether the connection was made with an SVID that is no longer the
// current one, or slept, or is silent: whatever stands between has forgotten it, perhaps,
// and gRPC's own keepalive takes long to notice. Where there is no telling, it is not.
func (c *Client) outdated(conn *connection) bool {
	if c.cfg.unix() {
		return false
	}
	now := c.now()
	if now.boot.Sub(conn.made.boot)-now.time.Sub(conn.made.time) > maxSleep || conn.silent.Load() {
		return true
	}
	leaf := conn.presented.Load()
	if leaf == nil {
		return false
	}
	svid, err := c.cfg.Source.GetX509SVID()
	if err != nil || len(svid.Certificates) == 0 {
		return false
	}
	return !bytes.Equal(*leaf, svid.Certificates[0].Raw)
}

// acquire returns the connection for a new call.
func (c *Client) acquire() (*connection, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, errClosed
	}
	if c.outdated(c.current) {
		next, err := c.dial()
		if err != nil {
			return nil, err
		}
		old := c.current
		c.current = next
		c.retired[old] = true
		c.drained(old)
	}
	c.current.calls++
	return c.current, nil
}

func (c *Client) release(conn *connection) {
	c.mu.Lock()
	defer c.mu.Unlock()
	conn.calls--
	c.drained(conn)
}

// drained closes a retired connection after its last call. Not here and now: gRPC
// reports the end of a stream while it holds locks of its own.
func (c *Client) drained(conn *connection) {
	if conn.calls > 0 || !c.retired[conn] || c.closed {
		return
	}
	delete(c.retired, conn)
	go func() { _ = conn.cc.Close() }()
}

var errClosed = errors.New("the client is closed")

// rotating is the Client as a grpc.ClientConnInterface.
type rotating Client

var _ grpc.ClientConnInterface = (*rotating)(nil)

// Invoke makes one call.
func (r *rotating) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	if err := fits(args); err != nil {
		return err
	}
	conn, err := (*Client)(r).acquire()
	if err != nil {
		return wrapf(err, "calling %s", method)
	}
	defer (*Client)(r).release(conn)
	before := conn.reads.Load()
	err = conn.cc.Invoke(ctx, method, args, reply, opts...)
	if status.Code(err) == codes.DeadlineExceeded && before > 0 && conn.reads.Load() == before {
		conn.silent.Store(true)
	}
	return FromRPC(err)
}

// fits refuses here what would be refused there: far beyond its limit a server can't say
// why.
func fits(m any) error {
	if p, ok := m.(proto.Message); !ok || proto.Size(p) <= MaxSendBytes {
		return nil
	}
	s := status.New(codes.InvalidArgument, "the request is larger than 64 KiB")
	s, err := s.WithDetails(&errdetails.ErrorInfo{
		Domain: ErrorDomain, Reason: ErrRequestTooLarge.Reason,
		Metadata: map[string]string{hintKey: "ask for less: a token has at most 32 scopes, a revocation 64 selectors"},
	})
	if err != nil {
		return err
	}
	return FromRPC(s.Err())
}

// NewStream begins a stream; the connection is held until it ends. As gRPC demands, the
// caller cancels ctx or reads until an error.
func (r *rotating) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	conn, err := (*Client)(r).acquire()
	if err != nil {
		return nil, wrapf(err, "calling %s", method)
	}
	release := sync.OnceFunc(func() { (*Client)(r).release(conn) })
	stream, err := conn.cc.NewStream(ctx, desc, method, append(opts, grpc.OnFinish(func(error) { release() }))...)
	if err != nil {
		release()
		return nil, FromRPC(err)
	}
	return &translated{stream}, nil
}

// translated translates the errors of a stream.
type translated struct{ grpc.ClientStream }

func (s *translated) RecvMsg(m any) error { return FromRPC(s.ClientStream.RecvMsg(m)) }
func (s *translated) SendMsg(m any) error { return FromRPC(s.ClientStream.SendMsg(m)) }
