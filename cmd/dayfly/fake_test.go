package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
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
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

var (
	testDomain = spiffeid.RequireTrustDomainFromString("example.org")
	operatorID = spiffeid.RequireFromString("spiffe://example.org/ops/ann")
	paymentsID = spiffeid.RequireFromString("spiffe://example.org/payments")
	ordersID   = spiffeid.RequireFromString("spiffe://example.org/orders")
	testBroker = spiffeid.RequireFromString("spiffe://example.org/dayfly/broker")
)

// fake is a broker with the manners of a real one and no rules: what it answers is
// chosen by the names in the request. It remembers every request that it got.
type fake struct {
	dayflyv1.UnimplementedTokenServiceServer
	dayflyv1.UnimplementedWatchServiceServer
	dayflyv1.UnimplementedGrantServiceServer
	dayflyv1.UnimplementedRevocationServiceServer

	td   *spiffetest.TrustDomain
	key  *ecdsa.PrivateKey
	kid  token.KeyID
	stop []func()

	mu       sync.Mutex
	changed  chan struct{} // closed and replaced at each request
	seen     []string      // "METHOD {json}"
	grants   []*dayflyv1.Grant
	records  []*dayflyv1.RevokeResponse
	keys     map[string]*dayflyv1.RevokeResponse
	failures map[string]int // how often a call has failed on purpose
}

const firstSequence = 1043

func newFake() (*fake, error) {
	td, err := spiffetest.New(spiffetest.Config{TrustDomain: testDomain})
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	kid, err := token.KeyIDOf(key.Public())
	if err != nil {
		return nil, err
	}
	f := &fake{
		td: td, key: key, kid: kid, changed: make(chan struct{}),
		keys: map[string]*dayflyv1.RevokeResponse{}, failures: map[string]int{},
	}
	f.stop = append(f.stop, func() { _ = td.Close() })
	return f, nil
}

func (f *fake) Close() {
	for i := len(f.stop) - 1; i >= 0; i-- {
		f.stop[i]()
	}
}

// serve runs one server; with creds it is a broker, without a socket's.
func (f *fake) serve(l net.Listener, creds credentials.TransportCredentials, withGrants bool) {
	opts := []grpc.ServerOption{grpc.UnaryInterceptor(f.unary), grpc.StreamInterceptor(f.stream)}
	if creds != nil {
		opts = append(opts, grpc.Creds(creds))
	}
	s := grpc.NewServer(opts...)
	dayflyv1.RegisterTokenServiceServer(s, f)
	dayflyv1.RegisterRevocationServiceServer(s, f)
	if withGrants {
		dayflyv1.RegisterGrantServiceServer(s, f)
	} else {
		dayflyv1.RegisterWatchServiceServer(s, f)
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	f.stop = append(f.stop, func() { s.Stop(); <-done })
}

// start listens as a broker over mTLS, as an agent and as a break-glass socket, and
// returns the environment of a command beside them.
func (f *fake) start(work string) (map[string]string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	cfg := tlsconfig.MTLSServerConfig(f.td.Source(testBroker), f.td.Source(testBroker), tlsconfig.AuthorizeAny())
	cfg.SessionTicketsDisabled = true
	cfg.MinVersion = tls.VersionTLS13
	f.serve(l, credentials.NewTLS(cfg), true)

	dir, err := os.MkdirTemp("", "df")
	if err != nil {
		return nil, err
	}
	f.stop = append(f.stop, func() { _ = os.RemoveAll(dir) })
	env := map[string]string{
		"DAYFLY_BROKER":    l.Addr().String(),
		"DAYFLY_BROKER_ID": testBroker.String(),
		"AGENT":            "unix://" + dir + "/agent.sock",
		"BREAK_GLASS":      "unix://" + dir + "/bg.sock",
	}
	sts := httptest.NewServer(http.HandlerFunc(assumeRole))
	f.stop = append(f.stop, sts.Close)
	env["STS"] = sts.URL
	for _, name := range []string{"agent.sock", "bg.sock"} {
		sock, err := net.Listen("unix", filepath.Join(dir, name))
		if err != nil {
			return nil, err
		}
		f.serve(sock, nil, false)
	}
	for name, id := range map[string]spiffeid.ID{"SPIFFE_ENDPOINT_SOCKET": operatorID, "PAYMENTS": paymentsID} {
		if env[name], err = f.td.Workload(id); err != nil {
			return nil, err
		}
	}
	denied := spiffeid.RequireFromString("spiffe://example.org/nobody")
	if env["NOBODY"], err = f.td.Workload(denied); err != nil {
		return nil, err
	}
	if err := f.td.SetDenied(denied, true); err != nil {
		return nil, err
	}
	if err := f.td.WritePEM(filepath.Join(work, "svid"), operatorID); err != nil {
		return nil, err
	}
	return env, f.writeTokens(work)
}

// assumeRole is a token service of AWS's that takes every token, for one role.
func assumeRole(w http.ResponseWriter, r *http.Request) {
	switch r.PostFormValue("RoleArn") {
	case "arn:aws:iam::1:role/orders":
		fmt.Fprintf(w, "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>ASIA-%s</AccessKeyId><SecretAccessKey>secret</SecretAccessKey>"+
			"<SessionToken>session</SessionToken><Expiration>%s</Expiration></Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>",
			r.PostFormValue("RoleSessionName"), time.Now().Add(time.Hour).UTC().Format(time.RFC3339))
	case "arn:aws:iam::1:role/busy":
		w.WriteHeader(http.StatusServiceUnavailable)
	default:
		w.WriteHeader(http.StatusForbidden)
		fmt.Fprintf(w, "<ErrorResponse><Error><Code>AccessDenied</Code><Message>Not authorized, %s</Message></Error></ErrorResponse>", r.PostFormValue("WebIdentityToken"))
	}
}

// writeTokens makes the leaked tokens that scripts find.
func (f *fake) writeTokens(work string) error {
	now := time.Now()
	leaked, g, err := f.mint("orders", now, time.Hour, paymentsID)
	if err != nil {
		return err
	}
	expired, _, err := f.mint("orders", now.Add(-2*time.Hour), time.Minute, paymentsID)
	if err != nil {
		return err
	}
	derived, _, err := f.mint("ledger", now, time.Hour, paymentsID, ordersID)
	if err != nil {
		return err
	}
	unrecorded, gone, err := f.mint("orders", now, time.Hour, paymentsID)
	if err != nil {
		return err
	}
	f.mu.Lock()
	f.grants = f.grants[:len(f.grants)-1]
	f.mu.Unlock()
	// The forgery bears the grant ID of the leaked one, and says another audience.
	claims, err := f.claims("ledger", now, time.Hour, paymentsID)
	if err != nil {
		return err
	}
	if claims.Lineage[0].Grant, err = token.ParseGrantID(g.GetGrant()); err != nil {
		return err
	}
	forged, _, err := f.sign(claims)
	if err != nil {
		return err
	}
	for name, text := range map[string]string{
		"leaked.jwt": leaked.Reveal(), "expired.jwt": expired.Reveal(), "derived.jwt": derived.Reveal(), "forged.jwt": forged.Reveal(),
		"unrecorded.jwt": "Authorization: Bearer " + unrecorded.Reveal() + "\n", "grant.txt": g.GetGrant() + "\n", "gone.txt": gone.GetGrant(),
	} {
		if err := os.WriteFile(filepath.Join(work, name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

func (f *fake) claims(audience string, issued time.Time, life time.Duration, chain ...spiffeid.ID) (*token.Claims, error) {
	c := &token.Claims{
		Issuer: "https://dayfly.example.org", Audience: audience, Scopes: []string{"read"}, Binding: token.BindingSPIFFE,
		IssuedAt: issued.Truncate(time.Second), NotBefore: issued.Truncate(time.Second), Expires: issued.Add(life).Truncate(time.Second),
		Transaction: "txn-1", Position: token.Position{Era: 0x3f9c1a7e, Rev: firstSequence - 1},
	}
	for _, id := range chain {
		grant, err := token.NewGrantID(id, issued, rand.Reader)
		if err != nil {
			return nil, err
		}
		c.Lineage = append(c.Lineage, token.Member{Identity: id, Grant: grant, Key: f.kid, SVID: token.Thumbprint{1, 2, 3}})
	}
	return c, nil
}

func (f *fake) sign(c *token.Claims) (token.Secret, token.Fingerprint, error) {
	unsigned, err := token.Encode(c, token.ES256)
	if err != nil {
		return token.Secret{}, token.Fingerprint{}, err
	}
	secret, err := unsigned.Sign(crypto.Signer(f.key))
	return secret, unsigned.Fingerprint(), err
}

// mint makes a token and records its grant.
func (f *fake) mint(audience string, issued time.Time, life time.Duration, chain ...spiffeid.ID) (token.Secret, *dayflyv1.Grant, error) {
	c, err := f.claims(audience, issued, life, chain...)
	if err != nil {
		return token.Secret{}, nil, err
	}
	secret, fingerprint, err := f.sign(c)
	if err != nil {
		return token.Secret{}, nil, err
	}
	g := &dayflyv1.Grant{
		Grant: c.Grant().String(), Lineage: wire.Lineage(c.Lineage), Audience: audience, Scopes: c.Scopes, Binding: wire.Binding(c.Binding),
		IssuedAt: timestamppb.New(c.IssuedAt), ExpiresAt: timestamppb.New(c.Expires), Fingerprint: fingerprint[:],
		Position: &dayflyv1.Position{Era: c.Position.Era.String(), Sequence: c.Position.Rev}, PeerAddress: "127.0.0.1", State: dayflyv1.GrantState_GRANT_STATE_LIVE,
	}
	f.mu.Lock()
	f.grants = append(f.grants, g)
	f.mu.Unlock()
	return secret, g, nil
}

// see remembers a request, for a script to look at.
func (f *fake) see(method string, m any) {
	raw, err := protojson.Marshal(m.(proto.Message))
	if err != nil {
		panic(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.seen = append(f.seen, filepath.Base(method)+" "+string(raw))
	close(f.changed)
	f.changed = make(chan struct{})
}

// await returns once a request matches, or false when ctx ends.
func (f *fake) await(ctx context.Context, re *regexp.Regexp) bool {
	for {
		f.mu.Lock()
		all, changed := strings.Join(f.seen, "\n"), f.changed
		f.mu.Unlock()
		if re.MatchString(all) {
			return true
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}

// failFirst fails a call a number of times, and then no more.
func (f *fake) failFirst(what string, times int) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failures[what]++
	return f.failures[what] <= times
}

func (f *fake) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	f.see(info.FullMethod, req)
	if err := allow(ctx, info.FullMethod); err != nil {
		return nil, err
	}
	return handler(ctx, req)
}

func (f *fake) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if err := allow(ss.Context(), info.FullMethod); err != nil {
		return err
	}
	return handler(srv, ss)
}

// allow knows one operator; on a socket there is nobody to know.
func allow(ctx context.Context, method string) error {
	p, _ := peer.FromContext(ctx)
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || strings.Contains(method, "TokenService") {
		return nil
	}
	if info.State.PeerCertificates[0].URIs[0].String() != operatorID.String() {
		return refuse(codes.PermissionDenied, "POLICY_DENIED", "policy does not allow this", "dayfly policy explain shows which rule decided")
	}
	return nil
}

func refuse(code codes.Code, reason, message, hint string) error {
	st, err := status.New(code, message).WithDetails(&errdetails.ErrorInfo{Domain: "dayfly", Reason: reason, Metadata: map[string]string{"hint": hint, "generation": "3"}})
	if err != nil {
		panic(err)
	}
	return st.Err()
}

// Issue is for whom the connection is: by the agent's socket, payments.
func (f *fake) Issue(ctx context.Context, r *dayflyv1.IssueRequest) (*dayflyv1.IssueResponse, error) {
	id := paymentsID
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(credentials.TLSInfo); ok {
			id = spiffeid.RequireFromURI(info.State.PeerCertificates[0].URIs[0])
		}
	}
	c, err := f.give(r.GetAudience(), r.GetBinding(), id)
	return &dayflyv1.IssueResponse{Credential: c}, err
}

// Watch gives one of each and no news.
func (f *fake) Watch(r *dayflyv1.WatchRequest, stream grpc.ServerStreamingServer[dayflyv1.WatchResponse]) error {
	f.see("Watch", r)
	m := &dayflyv1.WatchResponse{}
	for _, one := range r.GetWanted() {
		if one.GetAudience() == "old" {
			return status.Error(codes.Unimplemented, "unknown service")
		}
		c, err := f.give(one.GetAudience(), one.GetBinding(), paymentsID)
		w := &dayflyv1.Watched{Credential: c}
		var e *sdk.Error
		if errors.As(sdk.FromRPC(err), &e) {
			w.Refusal = &dayflyv1.Refusal{Code: int32(e.Code), Reason: e.Reason, Message: e.Message, Hint: e.Hint}
		}
		m.Watched = append(m.Watched, w)
	}
	if err := stream.Send(m); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

func (f *fake) Exchange(_ context.Context, r *dayflyv1.ExchangeRequest) (*dayflyv1.ExchangeResponse, error) {
	if _, err := token.Inspect(r.GetSubjectToken()); err != nil {
		return nil, refuse(codes.InvalidArgument, "SUBJECT_TOKEN_MALFORMED", "the subject token is not a token of dayfly", "present it as it was received")
	}
	c, err := f.give(r.GetAudience(), r.GetBinding(), paymentsID, ordersID)
	return &dayflyv1.ExchangeResponse{Credential: c}, err
}

func (f *fake) give(audience string, asked dayflyv1.Binding, chain ...spiffeid.ID) (*dayflyv1.Credential, error) {
	switch audience {
	case "forbidden":
		return nil, refuse(codes.PermissionDenied, "POLICY_DENIED", "policy does not allow this", "ask the owner of forbidden")
	case "locked":
		return nil, refuse(codes.PermissionDenied, "IDENTITY_LOCKED", "a standing lock refuses this identity", "the security team lifts it")
	case "away":
		return nil, refuse(codes.Unavailable, "STORE_FULL", "the store's disk is full", "free space")
	}
	secret, g, err := f.mint(audience, time.Now(), 5*time.Minute, chain...)
	if err != nil {
		return nil, err
	}
	binding := g.GetBinding()
	if asked == dayflyv1.Binding_BINDING_NONE && audience != "bound" {
		binding = asked
	}
	return &dayflyv1.Credential{
		Token: secret.Reveal(), Grant: g.GetGrant(), Audience: audience, Scopes: g.GetScopes(), Binding: binding,
		IssuedAt: g.GetIssuedAt(), ExpiresAt: g.GetExpiresAt(),
	}, nil
}

func (f *fake) GetGrant(_ context.Context, r *dayflyv1.GetGrantRequest) (*dayflyv1.GetGrantResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, g := range f.grants {
		if g.GetGrant() == r.GetGrant() {
			return &dayflyv1.GetGrantResponse{Grant: g}, nil
		}
	}
	return nil, refuse(codes.NotFound, "GRANT_NOT_FOUND", "there is no such grant", "dayfly grants list shows those on record")
}

func (f *fake) ListGrants(_ context.Context, r *dayflyv1.ListGrantsRequest) (*dayflyv1.ListGrantsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var found []*dayflyv1.Grant
	for _, g := range f.grants {
		if (r.GetPresenter() == "" || presenterOf(g) == r.GetPresenter()) && (r.GetAudience() == "" || g.GetAudience() == r.GetAudience()) {
			found = append(found, g)
		}
	}
	page, next := cut(found, int(r.GetPageSize()), r.GetPageToken())
	return &dayflyv1.ListGrantsResponse{Grants: page, NextPageToken: next}, nil
}

// cut is paging with numbers as tokens, two at a time at most.
func cut[T any](all []T, size int, pageToken string) ([]T, string) {
	start, _ := strconv.Atoi(pageToken)
	end := min(start+min(size, 2), len(all))
	next := ""
	if end < len(all) {
		next = strconv.Itoa(end)
	}
	return all[start:end], next
}

func (f *fake) Plan(_ context.Context, r *dayflyv1.PlanRequest) (*dayflyv1.PlanResponse, error) {
	if name(r.GetSelectors()) == "spiffe://example.org/noplan" {
		return nil, refuse(codes.Unavailable, "BUSY", "too busy to plan", "try again")
	}
	out := &dayflyv1.PlanResponse{
		Position: &dayflyv1.Position{Sequence: firstSequence - 1}, LiveGrants: 17, DerivedGrants: 5,
		Audiences: []*dayflyv1.AffectedAudience{{Audience: "orders", Owner: "team orders", VerifiedBy: "feed", LiveGrants: 12, LastExpiry: timestamppb.Now(), Fallback: &dayflyv1.Fallback{Text: "orders queue up", Link: "https://wiki.example.org/orders"}}},
		Workflows: []*dayflyv1.AffectedWorkflow{{Caller: paymentsID.String(), Callee: "orders", Count: 4012, LastSeen: timestamppb.Now(), Verifier: ordersID.String(), Fallback: &dayflyv1.Fallback{Owner: "team pay", Text: "cash only"}}},
		Narrower:  []*dayflyv1.NarrowerProposal{{Selectors: r.GetSelectors(), Why: "all of them come from one SVID"}},
		StandingLocks: []*dayflyv1.Lock{{Number: 3, Mode: dayflyv1.LockMode_LOCK_MODE_REISSUE, Selectors: r.GetSelectors(), Actor: operatorID.String(),
			Reason: "an older\x1b[2J story", Time: timestamppb.Now()}},
	}
	for i := range planRows + 3 {
		out.Identities = append(out.Identities, &dayflyv1.AffectedIdentity{Identity: fmt.Sprintf("spiffe://example.org/w%02d", i), Presents: 1, Derives: uint64(i)})
	}
	return out, nil
}

func name(selectors []*dayflyv1.Selector) string {
	if len(selectors) == 0 {
		return ""
	}
	s, err := wire.ToSelector(selectors[0])
	if err != nil {
		return ""
	}
	if s.Kind() == revocation.KindEverything {
		return "everything"
	}
	return s.Value()
}

func (f *fake) Revoke(ctx context.Context, r *dayflyv1.RevokeRequest) (*dayflyv1.RevokeResponse, error) {
	what := name(r.GetSelectors())
	switch {
	case what == "everything" && !r.GetAllowEverything():
		return nil, refuse(codes.InvalidArgument, "EVERYTHING_NOT_ALLOWED", "everything needs its flag", "")
	case r.GetAllowEverything() && overTLS(ctx) && !strings.Contains(r.GetReason(), "second"):
		return &dayflyv1.RevokeResponse{Proposal: proposalOf(r.GetReason(), operatorID.String(), "spiffe://example.org/ops/bob", "spiffe://example.org/sec/*")}, nil
	case what == "spiffe://example.org/flaky" && f.failFirst("revoke", 2), what == "spiffe://example.org/gone":
		return nil, status.Error(codes.Unavailable, "connection refused")
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if old, ok := f.keys[r.GetIdempotencyKey()]; ok {
		return old, nil
	}
	sequence := firstSequence + uint64(len(f.records))
	mode := r.GetLockMode()
	if mode == dayflyv1.LockMode_LOCK_MODE_UNSPECIFIED {
		mode = dayflyv1.LockMode_LOCK_MODE_QUARANTINE
	}
	resp := &dayflyv1.RevokeResponse{
		Revocation: &dayflyv1.Revocation{
			Position: &dayflyv1.Position{Era: "3f9c1a7e", Sequence: sequence}, Selectors: r.GetSelectors(), LockMode: mode, LockEndsAt: r.GetLockEndsAt(),
			Reason: r.GetReason(), Actor: operatorID.String(), Time: timestamppb.Now(), GivenBack: r.GetReason() == "given back",
		},
		Containment: pendingOf(sequence),
	}
	if what == "spiffe://example.org/cloud" {
		resp.Containment = &dayflyv1.Containment{Sequence: sequence, Contained: true} // nobody follows the feed
	}
	if what == "spiffe://example.org/used" {
		resp.Containment.UsesAfter = []*dayflyv1.UseAfter{
			{Verifier: ordersID.String(), Refused: 12, AcceptedUnaware: 3, LastSeen: timestamppb.Now(), Peers: []string{paymentsID.String()}, Addresses: []string{"203.0.113.9", "\x1b[2J"}, More: true},
			{Verifier: "spiffe://example.org/ledger", ClaimedIdentity: "spiffe://example.org/books", AcceptedKnowing: 1, LastSeen: timestamppb.Now()},
		}
	}
	if r.GetAllowEverything() && overTLS(ctx) {
		resp.Revocation.Proposal = proposalOf("r", "spiffe://example.org/ops/bob")
	}
	f.records = append(f.records, resp)
	f.keys[r.GetIdempotencyKey()] = resp
	return resp, nil
}

func overTLS(ctx context.Context) bool {
	p, _ := peer.FromContext(ctx)
	_, ok := p.AuthInfo.(credentials.TLSInfo)
	return ok
}

var proposedAt = time.Date(2026, 11, 23, 3, 0, 0, 0, time.UTC)

func proposalOf(reason, actor string, confirmers ...string) *dayflyv1.Proposal {
	return &dayflyv1.Proposal{
		Actor: actor, Reason: reason, Time: timestamppb.New(proposedAt), ExpiresAt: timestamppb.New(proposedAt.Add(15 * time.Minute)), Confirmers: confirmers,
	}
}

func pendingOf(sequence uint64) *dayflyv1.Containment {
	return &dayflyv1.Containment{
		Sequence: sequence, Confirmed: 1, Pending: 1, ContainedBy: timestamppb.New(time.Now().Add(30 * time.Second)),
		Receipts: []*dayflyv1.Receipt{
			{Identity: ordersID.String(), Instance: "orders-1", Audiences: []string{"orders"}, State: dayflyv1.ReceiptState_RECEIPT_STATE_CONFIRMED, Since: timestamppb.Now(), MaxStaleness: durationpb.New(30 * time.Second)},
			{Identity: "spiffe://example.org/ledger", Instance: "ledger-1", Audiences: []string{"ledger"}, State: dayflyv1.ReceiptState_RECEIPT_STATE_PENDING, ClosesAt: timestamppb.Now(), Via: []string{"relay-1"}, ClaimedIdentity: "spiffe://example.org/books"},
		},
	}
}

func containedOf(sequence uint64) *dayflyv1.Containment {
	c := pendingOf(sequence)
	c.Confirmed, c.Pending, c.Closed, c.Contained, c.ContainedAt = 1, 0, 1, true, timestamppb.Now()
	c.Receipts[1].State, c.Receipts[1].Since = dayflyv1.ReceiptState_RECEIPT_STATE_CLOSED, c.ContainedAt
	return c
}

func (f *fake) WatchContainment(r *dayflyv1.WatchContainmentRequest, s grpc.ServerStreamingServer[dayflyv1.WatchContainmentResponse]) error {
	f.mu.Lock()
	i := int(r.GetSequence()) - firstSequence
	known := i >= 0 && i < len(f.records)
	var what string
	if known {
		what = name(f.records[i].GetRevocation().GetSelectors())
	}
	f.mu.Unlock()
	f.see("WatchContainment", r)
	if !known {
		return refuse(codes.NotFound, "REVOCATION_NOT_FOUND", "there is no such revocation", "dayfly revocations list shows those on record")
	}
	if err := s.Send(&dayflyv1.WatchContainmentResponse{Containment: pendingOf(r.GetSequence())}); err != nil {
		return err
	}
	done := containedOf(r.GetSequence())
	switch what {
	case "spiffe://example.org/slow":
		<-s.Context().Done()
		return s.Context().Err()
	case "spiffe://example.org/secret":
		return refuse(codes.PermissionDenied, "POLICY_DENIED", "policy does not allow this", "")
	case "spiffe://example.org/restart":
		if f.failFirst("watch", 2) {
			return status.Error(codes.Unavailable, "the broker stops")
		}
	case "spiffe://example.org/cloud":
		done.External = []*dayflyv1.AffectedAudience{{Audience: "aws", Owner: "team cloud", VerifiedBy: "external", LiveGrants: 2, LastExpiry: timestamppb.New(time.Now().Add(time.Hour))}}
	case "spiffe://example.org/ahead": // as an operator sees it whose clock is
		done.External = []*dayflyv1.AffectedAudience{{Audience: "aws", VerifiedBy: "external", LastExpiry: timestamppb.New(time.Now().Add(-time.Minute))}}
	}
	return s.Send(&dayflyv1.WatchContainmentResponse{Containment: done})
}

func (f *fake) Lift(_ context.Context, r *dayflyv1.LiftRequest) (*dayflyv1.LiftResponse, error) {
	lift := &dayflyv1.Lift{Lock: r.GetLock(), Reason: r.GetReason(), Actor: operatorID.String(), Time: timestamppb.Now()}
	switch r.GetLock() {
	case firstSequence:
		lift.Sequence = firstSequence + 1
		return &dayflyv1.LiftResponse{Lift: lift, Lifted: true}, nil
	case 7:
		lift.Proposal = proposalOf(r.GetReason(), operatorID.String())
		return &dayflyv1.LiftResponse{Lift: lift}, nil
	case 9:
		lift.Sequence, lift.Proposal = 10, proposalOf("r", "spiffe://example.org/ops/bob")
		return &dayflyv1.LiftResponse{Lift: lift, Lifted: true}, nil
	case 11:
		return nil, refuse(codes.FailedPrecondition, "SECOND_PERSON_REQUIRED", "you proposed this yourself at 2026-11-23T03:00:00Z", "one of spiffe://example.org/ops/bob runs the same command in time")
	}
	return nil, refuse(codes.NotFound, "LOCK_NOT_FOUND", "there is no standing lock with this number", "dayfly locks lists those that stand")
}

func (f *fake) ListLocks(_ context.Context, r *dayflyv1.ListLocksRequest) (*dayflyv1.ListLocksResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []*dayflyv1.Lock
	for _, rec := range f.records {
		v := rec.GetRevocation()
		all = append(all, &dayflyv1.Lock{Number: v.GetPosition().GetSequence(), Selectors: v.GetSelectors(), Mode: v.GetLockMode(), EndsAt: v.GetLockEndsAt(), Reason: v.GetReason(), Actor: v.GetActor(), Time: v.GetTime()})
	}
	for _, l := range all {
		if l.GetReason() == "INC-9" {
			l.ProposedLift = &dayflyv1.Lift{Lock: l.GetNumber(), Proposal: proposalOf("r", "spiffe://example.org/ops/bob")}
		}
	}
	page, next := cut(all, int(r.GetPageSize()), r.GetPageToken())
	return &dayflyv1.ListLocksResponse{Locks: page, NextPageToken: next}, nil
}

func (f *fake) ListRevocations(_ context.Context, r *dayflyv1.ListRevocationsRequest) (*dayflyv1.ListRevocationsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []*dayflyv1.Revocation
	for _, rec := range f.records {
		if r.GetGivenBack() || !rec.GetRevocation().GetGivenBack() {
			all = append(all, rec.GetRevocation())
		}
	}
	page, next := cut(all, int(r.GetPageSize()), r.GetPageToken())
	return &dayflyv1.ListRevocationsResponse{Revocations: page, NextPageToken: next}, nil
}

func (f *fake) GetRevocation(_ context.Context, r *dayflyv1.GetRevocationRequest) (*dayflyv1.GetRevocationResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, rec := range f.records {
		if rec.GetRevocation().GetPosition().GetSequence() == r.GetSequence() {
			return &dayflyv1.GetRevocationResponse{Revocation: rec.GetRevocation(), Containment: rec.GetContainment()}, nil
		}
	}
	return nil, refuse(codes.NotFound, "REVOCATION_NOT_FOUND", "there is no such revocation", "dayfly revocations list shows those on record")
}
