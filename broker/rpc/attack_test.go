package rpc_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

var (
	orders = spiffeid.RequireFromString("spiffe://example.org/orders")
	ledger = spiffeid.RequireFromString("spiffe://example.org/ledger")
)

// A rogue is the authority of a trust domain that is served, and signs what it likes.
type rogue struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newRogue(t *testing.T, bundles *x509bundle.Set, domain string) *rogue {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	r := &rogue{t: t, key: key}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: domain}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
	}
	r.cert = r.sign(template, template, key)
	bundles.Add(x509bundle.FromX509Authorities(spiffeid.RequireTrustDomainFromString(domain), []*x509.Certificate{r.cert}))
	return r
}

func (r *rogue) sign(template, parent *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	r.t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, r.key)
	if err != nil {
		r.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		r.t.Fatal(err)
	}
	return cert
}

// leaf signs a certificate with these URIs, to the letter.
func (r *rogue) leaf(change func(*x509.Certificate), uris ...string) (*x509.Certificate, *ecdsa.PrivateKey) {
	r.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		r.t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: r.cert.NotBefore, NotAfter: r.cert.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
	}
	for _, u := range uris {
		template.URIs = append(template.URIs, &url.URL{Opaque: u}) // written as it is
	}
	if change != nil {
		change(template)
	}
	return r.sign(template, r.cert, key), key
}

// TestCraftedSVIDs: the authority of a trust domain that is served signs certificates that
// name somebody in a second spelling, somebody of another trust domain, or two; none of
// them is anybody, to the broker and to a verifier.
func TestCraftedSVIDs(t *testing.T) {
	w := newWorld(t)
	r := newRogue(t, w.bundles.Set, "partner.example")
	for _, tt := range []struct {
		name   string
		uris   []string
		change func(*x509.Certificate)
		want   string // "": nobody
	}{
		{name: "its own", uris: []string{"spiffe://partner.example/shop"}, want: "spiffe://partner.example/shop"},
		{name: "of our trust domain", uris: []string{payments.String()}},
		{name: "our broker", uris: []string{brokerID.String()}},
		{name: "of one below its name", uris: []string{"spiffe://a.partner.example/shop"}},
		{name: "two", uris: []string{"spiffe://partner.example/shop", payments.String()}},
		{name: "twice the same", uris: []string{"spiffe://partner.example/shop", "spiffe://partner.example/shop"}},
		{name: "none"},
		{name: "upper case trust domain", uris: []string{"spiffe://PARTNER.example/shop"}},
		{name: "upper case scheme", uris: []string{"SPIFFE://partner.example/shop"}, want: "spiffe://partner.example/shop"}, // no second identity: a scheme has no case
		{name: "another scheme", uris: []string{"https://partner.example/shop"}},
		{name: "climbing", uris: []string{"spiffe://partner.example/a/../shop"}},
		{name: "climbing by escape", uris: []string{"spiffe://partner.example/a/%2e%2e/shop"}},
		{name: "escaped slash", uris: []string{"spiffe://partner.example/a%2fshop"}},
		{name: "escaped letter", uris: []string{"spiffe://partner.example/%73hop"}},
		{name: "escaped NUL", uris: []string{"spiffe://partner.example/shop%00"}},
		{name: "empty segment", uris: []string{"spiffe://partner.example//shop"}},
		{name: "slash at the end", uris: []string{"spiffe://partner.example/shop/"}},
		{name: "user", uris: []string{"spiffe://example.org@partner.example/shop"}},
		{name: "port", uris: []string{"spiffe://partner.example:443/shop"}},
		{name: "query", uris: []string{"spiffe://partner.example/shop?x=1"}},
		{name: "fragment", uris: []string{"spiffe://partner.example/shop#x"}},
		{name: "an authority's", uris: []string{"spiffe://partner.example/shop"}, change: func(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, c.KeyUsage|x509.KeyUsageCertSign }},
		{name: "one that may sign certificates", uris: []string{"spiffe://partner.example/shop"}, change: func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }},
		{name: "a DNS name and a common name of ours", change: func(c *x509.Certificate) {
			c.DNSNames, c.Subject.CommonName = []string{"example.org"}, payments.String()
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cert, key := r.leaf(tt.change, tt.uris...)
			cfg := w.config(w.td.Source(payments))
			cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				return &tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}, nil
			}
			got, err := issue(t, w.dial(cfg))
			if tt.want == "" {
				if status.Code(err) != codes.Unavailable {
					t.Errorf("the broker: %v, want no connection", err)
				}
			} else if err != nil {
				t.Error(err)
			} else if tok, err := token.Inspect(got.GetCredential().GetToken()); err != nil || tok.Root().String() != tt.want {
				t.Errorf("the token: %v, %v", tok, err)
			}
			peer := verify.PeerOf(&tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert}}, w.bundles, "192.0.2.1:1", time.Now())
			if peer.ID.String() != tt.want || (peer.Certificate != nil) != (tt.want != "") {
				t.Errorf("a verifier takes it for %q", peer.ID)
			}
		})
	}
}

// exchange presents a token over a connection.
func exchange(t *testing.T, conn grpc.ClientConnInterface, subject, audience string) (*dayflyv1.Credential, error) {
	t.Helper()
	got, err := dayflyv1.NewTokenServiceClient(conn).Exchange(soon(t), &dayflyv1.ExchangeRequest{SubjectToken: subject, Audience: audience})
	return got.GetCredential(), err
}

func issueFor(t *testing.T, conn grpc.ClientConnInterface, audience string) *dayflyv1.Credential {
	t.Helper()
	got, err := dayflyv1.NewTokenServiceClient(conn).Issue(soon(t), &dayflyv1.IssueRequest{Audience: audience, Scopes: []string{"read", "write"}})
	if err != nil {
		t.Fatal(err)
	}
	return got.GetCredential()
}

// TestConfusedDeputy: only whom a token is addressed to may exchange it, to the letter;
// not who fetched it, not who passed it on, not the one after.
func TestConfusedDeputy(t *testing.T) {
	w := newWorld(t)
	w.policy.nameless = true
	conns := map[spiffeid.ID]*grpc.ClientConn{payments: w.as(payments), orders: w.as(orders), ledger: w.as(ledger)}
	toOrders := issueFor(t, conns[payments], orders.String()).GetToken()
	derived, err := exchange(t, conns[orders], toOrders, ledger.String())
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name    string
		by      spiffeid.ID
		subject string
		mayNot  bool
	}{
		{"whom it is for", orders, toOrders, false},
		{"who fetched it", payments, toOrders, true},
		{"a third one", ledger, toOrders, true},
		{"derived: whom it is for", ledger, derived.GetToken(), false},
		{"derived: who made it", orders, derived.GetToken(), true},
		{"derived: its root", payments, derived.GetToken(), true},
		{"a name with a slash more", orders, issueFor(t, conns[payments], orders.String()+"/").GetToken(), true},
		{"a longer name", orders, issueFor(t, conns[payments], orders.String()+"2").GetToken(), true},
		{"a name below", orders, issueFor(t, conns[payments], orders.String()+"/x").GetToken(), true},
		{"a name above", orders, issueFor(t, conns[payments], "spiffe://example.org").GetToken(), true},
		{"upper case", orders, issueFor(t, conns[payments], "spiffe://example.org/Orders").GetToken(), true},
		{"upper case trust domain", orders, issueFor(t, conns[payments], "spiffe://EXAMPLE.org/orders").GetToken(), true},
		{"escaped", orders, issueFor(t, conns[payments], "spiffe://example.org/%6frders").GetToken(), true},
		{"climbing", orders, issueFor(t, conns[payments], "spiffe://example.org/x/../orders").GetToken(), true},
		{"a list", orders, issueFor(t, conns[payments], orders.String()+","+ledger.String()).GetToken(), true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := exchange(t, conns[tt.by], tt.subject, "far")
			if tt.mayNot {
				refused(t, err, codes.PermissionDenied, "SUBJECT_TOKEN_NOT_ADDRESSED")
			} else if err != nil {
				t.Error(err)
			}
		})
	}
}

// TestLoops: a chain may come back to one that it has passed, by policy, and to oneself;
// it gains nothing by it, ends at the full depth, and dies with any of its members.
func TestLoops(t *testing.T) {
	for name, hops := range map[string][]spiffeid.ID{
		"to oneself":     {payments, payments},
		"there and back": {payments, orders},
		"in a circle":    {payments, orders, ledger},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.policy.nameless = true
			conns := map[spiffeid.ID]*grpc.ClientConn{}
			for _, id := range hops {
				conns[id] = w.as(id)
			}
			hop := func(i int) spiffeid.ID { return hops[i%len(hops)] }
			chain := []*dayflyv1.Credential{issueFor(t, conns[hop(0)], hop(1).String())}
			for i := 1; i < token.MaxDepth; i++ {
				w.clock.advance(time.Second)
				next, err := exchange(t, conns[hop(i)], chain[i-1].GetToken(), hop(i+1).String())
				if err != nil {
					t.Fatal(err)
				}
				chain = append(chain, next)
			}
			last := chain[len(chain)-1]
			tok, err := token.Inspect(last.GetToken())
			if err != nil {
				t.Fatal(err)
			}
			if !tok.Expires.Equal(chain[0].GetExpiresAt().AsTime()) || !slices.Equal(tok.Scopes, []string{"read"}) || len(tok.Lineage) != token.MaxDepth {
				t.Errorf("expires %s, root %s; scopes %q; %d members", tok.Expires, chain[0].GetExpiresAt().AsTime(), tok.Scopes, len(tok.Lineage))
			}
			_, err = exchange(t, conns[hop(token.MaxDepth)], last.GetToken(), "far")
			refused(t, err, codes.PermissionDenied, "CHAIN_TOO_DEEP")

			// The second grant, of a member that is in the chain again further on.
			if _, err := dayflyv1.NewRevocationServiceClient(conns[hop(0)]).Revoke(soon(t), &dayflyv1.RevokeRequest{
				Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Grant{Grant: chain[1].GetGrant()}}}, Reason: "test",
			}); err != nil {
				t.Fatal(err)
			}
			for i, c := range chain[:token.MaxDepth-1] {
				_, err := exchange(t, conns[hop(i+1)], c.GetToken(), "far")
				if i == 0 {
					if err != nil {
						t.Errorf("what was before it: %v", err)
					}
					continue
				}
				refused(t, err, codes.PermissionDenied, "SUBJECT_TOKEN_REVOKED")
			}
		})
	}
}

// TestLaundering presents what a thief of the signing key makes of a token on record, to
// get an honest one for it. Nothing but the token on record comes through, and each try
// is an alarm.
func TestLaundering(t *testing.T) {
	w := newWorld(t)
	w.policy.nameless = true
	conns := map[spiffeid.ID]*grpc.ClientConn{payments: w.as(payments), orders: w.as(orders), ledger: w.as(ledger)}
	root := issueFor(t, conns[payments], orders.String())
	derived, err := exchange(t, conns[orders], root.GetToken(), ledger.String())
	if err != nil {
		t.Fatal(err)
	}
	other := issueFor(t, conns[payments], ledger.String()) // on record, of another chain
	member := func(c *dayflyv1.Credential, i int) token.Member {
		tok, err := token.Inspect(c.GetToken())
		if err != nil {
			t.Fatal(err)
		}
		return tok.Lineage[i]
	}
	forge := func(change func(*token.Claims)) string {
		tok, err := token.Inspect(derived.GetToken())
		if err != nil {
			t.Fatal(err)
		}
		change(&tok.Claims)
		u, err := token.Encode(&tok.Claims, token.ES256)
		if err != nil {
			t.Fatal(err)
		}
		s, err := u.Sign(w.key)
		if err != nil {
			t.Fatal(err)
		}
		return s.Reveal()
	}
	forgeries := map[string]func(*token.Claims){
		"shortened to its root":        func(c *token.Claims) { c.Lineage = c.Lineage[:1] },
		"its root hidden":              func(c *token.Claims) { c.Lineage = c.Lineage[1:] },
		"reordered":                    func(c *token.Claims) { c.Lineage[0], c.Lineage[1] = c.Lineage[1], c.Lineage[0] },
		"identities swapped":           func(c *token.Claims) { c.Lineage[0].Identity, c.Lineage[1].Identity = orders, payments },
		"extended":                     func(c *token.Claims) { c.Lineage = append(c.Lineage, member(other, 0)) },
		"extended by itself":           func(c *token.Claims) { c.Lineage = append(c.Lineage, c.Lineage[1]) },
		"another root":                 func(c *token.Claims) { c.Lineage[0].Identity = ledger },
		"another's root grant":         func(c *token.Claims) { c.Lineage[0] = member(other, 0) },
		"another's grant":              func(c *token.Claims) { c.Lineage[1] = member(other, 0) },
		"another SVID":                 func(c *token.Claims) { c.Lineage[0].SVID[0] ^= 1 },
		"no SVID":                      func(c *token.Claims) { c.Lineage[0].SVID = token.Thumbprint{} },
		"a scope more":                 func(c *token.Claims) { c.Scopes = []string{"read", "write"} },
		"a longer life":                func(c *token.Claims) { c.Expires = c.IssuedAt.Add(token.MaxTTL) },
		"later":                        func(c *token.Claims) { c.Expires = c.Expires.Add(time.Second) },
		"a weaker binding":             func(c *token.Claims) { c.Binding = token.BindingNone },
		"another transaction":          func(c *token.Claims) { c.Transaction = "x" },
		"rev below":                    func(c *token.Claims) { c.Position.Rev-- },
		"rev above the head":           func(c *token.Claims) { c.Position.Rev++ },
		"rev at its end":               func(c *token.Claims) { c.Position.Rev = math.MaxUint64 },
		"another hash at its position": func(c *token.Claims) { c.Position.Sum[0] ^= 1 },
		"of an era to come":            func(c *token.Claims) { c.Position.Era++ },
	}
	check := func(t *testing.T, change func(*token.Claims), reason string) {
		t.Helper()
		before := w.alerts.Load()
		_, err := exchange(t, conns[ledger], forge(change), "far")
		refused(t, err, codes.PermissionDenied, reason)
		if alarmed := w.alerts.Load() > before; alarmed != (reason == "SUBJECT_TOKEN_UNKNOWN") {
			t.Errorf("alarm: %t", alarmed)
		}
	}
	for name, change := range forgeries {
		t.Run(name, func(t *testing.T) { check(t, change, "SUBJECT_TOKEN_UNKNOWN") })
	}
	// Of another era it is dead before anybody looks for it.
	t.Run("of an era gone by", func(t *testing.T) {
		check(t, func(c *token.Claims) { c.Position.Era-- }, "SUBJECT_TOKEN_REVOKED")
	})
	// Signed anew it is still the token on record: a signature has many spellings.
	if _, err := exchange(t, conns[ledger], forge(func(*token.Claims) {}), "far"); err != nil {
		t.Errorf("signed anew: %v", err)
	}

	operator := dayflyv1.NewRevocationServiceClient(conns[payments])
	revoke := func(s *dayflyv1.Selector) {
		t.Helper()
		if _, err := operator.Revoke(soon(t), &dayflyv1.RevokeRequest{Selectors: []*dayflyv1.Selector{s}, Reason: "test", LockMode: dayflyv1.LockMode_LOCK_MODE_NONE}); err != nil {
			t.Fatal(err)
		}
	}
	// The root is revoked: an honest copy is dead, and one at the new head was never issued.
	revoke(identity(payments.String()))
	atHead := func(c *token.Claims) { c.Position = w.b.Head().Token() }
	check(t, func(*token.Claims) {}, "SUBJECT_TOKEN_REVOKED")
	check(t, atHead, "SUBJECT_TOKEN_UNKNOWN")
	// The key is revoked: so is all that it ever signed, at any position.
	revoke(&dayflyv1.Selector{Selector: &dayflyv1.Selector_Key{Key: member(derived, 1).Key.String()}})
	check(t, atHead, "SUBJECT_TOKEN_REVOKED")
	for name, change := range forgeries {
		t.Run("key revoked: "+name, func(t *testing.T) { check(t, change, "SUBJECT_TOKEN_REVOKED") })
	}
}

// TestDurations: a TTL is 1 s to the cap, and no second reading of it is longer.
func TestDurations(t *testing.T) {
	w := newWorld(t)
	conn := w.as(payments)
	tokens, revocations := dayflyv1.NewTokenServiceClient(conn), dayflyv1.NewRevocationServiceClient(conn)
	subject := issueFor(t, conn, payments.String()).GetToken()
	for _, d := range []*durationpb.Duration{
		{}, {Seconds: -1}, {Nanos: -1}, {Nanos: 1}, {Nanos: 999_999_999},
		{Seconds: 1, Nanos: -1}, {Seconds: -1, Nanos: 1}, {Seconds: 1, Nanos: 1_000_000_000}, {Seconds: 1, Nanos: math.MaxInt32}, {Seconds: 1, Nanos: math.MinInt32},
		{Seconds: 3600, Nanos: 1}, {Seconds: 3601}, {Seconds: 3_600_000},
		{Seconds: 9_223_372_036}, {Seconds: 9_223_372_037}, // the ends of time.Duration
		{Seconds: 1<<55 + 300}, {Seconds: 315_576_000_000}, {Seconds: 315_576_000_001}, // those of protobuf
		{Seconds: math.MaxInt64, Nanos: 999_999_999}, {Seconds: math.MinInt64}, {Seconds: -math.MaxInt64},
	} {
		_, err := tokens.Issue(soon(t), &dayflyv1.IssueRequest{Audience: "orders", Ttl: d})
		if e := refused(t, err, codes.InvalidArgument, "INVALID_REQUEST"); e.Metadata["field"] != "ttl" {
			t.Errorf("%v: field %q", d, e.Metadata["field"])
		}
		_, err = tokens.Exchange(soon(t), &dayflyv1.ExchangeRequest{SubjectToken: subject, Audience: "orders", Ttl: d})
		refused(t, err, codes.InvalidArgument, "INVALID_REQUEST")
	}
	for want, d := range map[time.Duration]*durationpb.Duration{
		time.Second:      {Seconds: 1, Nanos: 999_999_999}, // whole seconds, rounded down
		59 * time.Second: {Seconds: 59},
	} {
		got, err := tokens.Issue(soon(t), &dayflyv1.IssueRequest{Audience: "orders", Ttl: d})
		if err != nil {
			t.Fatal(err)
		}
		c := got.GetCredential()
		if life := c.GetExpiresAt().AsTime().Sub(c.GetIssuedAt().AsTime()); life != want {
			t.Errorf("%v: %s", d, life)
		}
	}
	for _, at := range []*timestamppb.Timestamp{
		{}, {Seconds: -1}, {Seconds: math.MaxInt64}, {Seconds: math.MinInt64}, {Seconds: 253_402_300_800}, {Seconds: -62_135_596_801},
		{Seconds: 4_102_444_800, Nanos: -1}, {Seconds: 4_102_444_800, Nanos: 1_000_000_000},
	} {
		_, err := revocations.Revoke(soon(t), &dayflyv1.RevokeRequest{Selectors: []*dayflyv1.Selector{identity(payments.String())}, Reason: "r", LockEndsAt: at})
		if e := refused(t, err, codes.InvalidArgument, "INVALID_REQUEST"); e.Metadata["field"] != "lock_ends_at" {
			t.Errorf("%v: field %q", at, e.Metadata["field"])
		}
	}
}

// TestClaimedIdentity: metadata names nobody. The caller is who the connection proves.
func TestClaimedIdentity(t *testing.T) {
	w := newWorld(t)
	got, err := dayflyv1.NewTokenServiceClient(w.as(orders)).Issue(metadata.AppendToOutgoingContext(soon(t),
		"x-forwarded-client-cert", "URI="+payments.String(), "x-spiffe-id", payments.String(), "authorization", "Bearer "+issueFor(t, w.as(payments), "orders").GetToken(),
		"forwarded", "for=192.0.2.7", "x-forwarded-for", "192.0.2.7", "caller", payments.String(), ":authority", payments.String(),
	), &dayflyv1.IssueRequest{Audience: "orders"})
	if err != nil {
		t.Fatal(err)
	}
	g, err := dayflyv1.NewGrantServiceClient(w.as(payments)).GetGrant(soon(t), &dayflyv1.GetGrantRequest{Grant: got.GetCredential().GetGrant()})
	if err != nil {
		t.Fatal(err)
	}
	if l := g.GetGrant().GetLineage(); len(l) != 1 || l[0].GetIdentity() != orders.String() || g.GetGrant().GetPeerAddress() != "127.0.0.1" || strings.Contains(g.String(), "192.0.2.7") {
		t.Errorf("recorded: %v", g)
	}
}
