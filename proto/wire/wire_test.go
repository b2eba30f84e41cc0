package wire_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"pgregory.net/rapid"
)

var payments = spiffeid.RequireFromString("spiffe://example.org/ns/prod/payments")

func signingKey(t testing.TB, alg token.Algorithm) feed.Key {
	t.Helper()
	var pub any
	if alg == token.ES256 {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		pub = &k.PublicKey
	} else {
		k, _, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		pub = k
	}
	public, err := token.NewPublicKey(alg, pub)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	return feed.Key{Public: public, DER: der, Certificates: [][]byte{{1}, {2}}, Signature: []byte{3}}
}

func member(t testing.TB) token.Member {
	t.Helper()
	grant, err := token.NewGrantID(payments, time.Unix(1, 0), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return token.Member{Identity: payments, Grant: grant, Key: signingKey(t, token.ES256).Public.ID, SVID: token.Thumbprint{9}}
}

// everySelector has one of each kind.
func everySelector(t testing.TB) []revocation.Selector {
	t.Helper()
	subtree, err := revocation.Subtree("spiffe://example.org/ns/prod/*")
	if err != nil {
		t.Fatal(err)
	}
	audience, err := revocation.Audience("orders")
	if err != nil {
		t.Fatal(err)
	}
	m := member(t)
	return []revocation.Selector{
		revocation.Grant(m.Grant), revocation.Identity(payments), subtree, revocation.TrustDomain(payments.TrustDomain()),
		audience, revocation.SVID(m.SVID), revocation.Key(m.Key), revocation.Everything(),
	}
}

// throughWire sends a message there and back.
func throughWire[M proto.Message](t testing.TB, in, out M) M {
	t.Helper()
	b, err := proto.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	if err := proto.Unmarshal(b, out); err != nil {
		t.Fatal(err)
	}
	return out
}

// history returns a log with every kind of event.
func history(t testing.TB) *feed.Log {
	t.Helper()
	es, ed := signingKey(t, token.ES256), signingKey(t, token.EdDSA)
	l := new(feed.Log)
	for _, e := range []feed.Event{
		{Era: &feed.Era{Era: 7}},
		{Key: &es},
		{Key: &ed},
		{Revocation: &feed.Revocation{Selectors: everySelector(t)}},
		{Lift: &feed.Lift{Lock: 4}},
	} {
		e.Seq = l.Head().Seq + 1
		e.Private = sha256.Sum256([]byte{byte(e.Seq)})
		e.Sum = e.Chain(l.Head().Sum)
		if err := l.Append(e); err != nil {
			t.Fatal(err)
		}
	}
	return l
}

// What a cursor gives arrives as it was, so that a view at the other end has the same
// log: for a newcomer and for one who knows a part.
func TestDeliveryRoundTrip(t *testing.T) {
	l := history(t)
	for _, known := range []uint64{0, 1, 3, 5} {
		for limit := 1; limit < 7; limit++ {
			var view feed.View
			at, _ := l.At(known)
			cursor := feed.NewCursor(at)
			if known > 0 {
				full := feed.NewCursor(feed.Position{})
				d, _ := full.Next(l, 100)
				if err := view.Apply(d, 0); err != nil {
					t.Fatal(err)
				}
			}
			for {
				d, more := cursor.Next(l, limit)
				if !more {
					break
				}
				got, err := wire.ToDelivery(throughWire(t, wire.Delivery(d), &dayflyv1.FollowResponse{}))
				if err != nil {
					t.Fatal(err)
				}
				if !d.Snapshot {
					d.Position = feed.Position{} // the events say it
				}
				if len(d.Events) == 0 {
					d.Events, got.Events = nil, nil
				}
				if !reflect.DeepEqual(got, d) {
					t.Errorf("got %+v, want %+v", got, d)
				}
				if err := view.Apply(got, 0); err != nil {
					t.Fatal(err)
				}
			}
			if view.Position() != l.Head() {
				t.Errorf("known %d, limit %d: at %s, want %s", known, limit, view.Position(), l.Head())
			}
		}
	}
}

func TestSelectorsRoundTrip(t *testing.T) {
	want := everySelector(t)
	got, err := wire.ToSelectors(wire.Selectors(want))
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
}

func TestLineageRoundTrip(t *testing.T) {
	want := []token.Member{member(t), member(t)}
	want[1].SVID = token.Thumbprint{}
	got, err := wire.ToLineage(wire.Lineage(want))
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
}

func TestValuesRoundTrip(t *testing.T) {
	for _, b := range []token.Binding{"", token.BindingNone, token.BindingSPIFFE, token.BindingX5T} {
		if got, err := wire.ToBinding(wire.Binding(b)); err != nil || got != b {
			t.Errorf("binding %q: got %q, %v", b, got, err)
		}
	}
	for _, accepts := range []bool{false, true} {
		if got, err := wire.ToOnStale(wire.OnStale(accepts)); err != nil || got != accepts {
			t.Errorf("on stale %v: got %v, %v", accepts, got, err)
		}
	}
	head := signedHead(t)
	rapid.Check(t, func(t *rapid.T) {
		p := feed.Position{
			Era: token.Era(rapid.Uint32Range(1, 1<<32-1).Draw(t, "era")),
			Seq: rapid.Uint64().Draw(t, "seq"),
			Sum: feed.Sum(rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "sum")),
		}
		if got, err := wire.ToPosition(wire.Position(p)); err != nil || got != p {
			t.Fatalf("position %v: got %v, %v", p, got, err)
		}
		pong := wire.Pong{
			Nonce: string(rapid.SliceOfN(rapid.Byte(), wire.MinNonceBytes, wire.MaxNonceBytes).Draw(t, "nonce")),
			Head:  p, Horizon: p, Age: time.Duration(rapid.Int64Min(0).Draw(t, "age")),
		}
		if rapid.Bool().Draw(t, "proven") {
			pong.Signed = head
			pong.Path = feed.NoncePath{Index: rapid.Uint64().Draw(t, "index"), Hashes: [][]byte{make([]byte, 32), {}}}
		}
		if got, err := wire.ToPong(wire.PongMessage(pong).GetPong()); err != nil || !reflect.DeepEqual(got, pong) {
			t.Fatalf("pong %v: got %v, %v", pong, got, err)
		}
		sub := wire.Subscription{
			Instance:  rapid.StringMatching(`[A-Za-z0-9_-]{8,64}`).Draw(t, "instance"),
			Audiences: rapid.SliceOfN(rapid.StringMatching(`[!#-\[\]-~]{1,64}`), 1, wire.MaxAudiences).Draw(t, "audiences"),
			Bound:     time.Duration(rapid.Int64Range(int64(wire.MinBound), int64(wire.MaxBound)).Draw(t, "bound")),
			Position:  p, AcceptsStale: rapid.Bool().Draw(t, "accepts"), Relay: rapid.Bool().Draw(t, "relay"), SignedHeads: rapid.Bool().Draw(t, "signed"),
		}
		if rapid.Bool().Draw(t, "kept") {
			sub.NewestHead = head
		}
		if got, err := wire.ToSubscription(wire.Subscribe(sub)); err != nil || !reflect.DeepEqual(got, sub) {
			t.Fatalf("subscription %+v: got %+v, %v", sub, got, err)
		}
	})
	if got, err := wire.ToPosition(wire.Position(feed.Position{})); err != nil || got != (feed.Position{}) {
		t.Errorf("zero position: got %v, %v", got, err)
	}
}

func signedHead(t testing.TB) feed.SignedHead {
	l := history(t)
	s := feed.HeadStatement{Head: l.Head(), Horizon: l.Horizon(), KeySet: feed.KeySetDigest(l.Events()), Age: 3 * time.Second, SignedAt: time.Unix(1_700_000_000, 7).UTC()}
	return feed.SignedHead{Statement: s.Encode(), Signature: []byte("signature"), Certificates: [][]byte{{1}, {2}}}
}

// TestHeadStatement: what feed signs is the message of the wire, by protobuf's own word.
func TestHeadStatement(t *testing.T) {
	h := signedHead(t)
	want, err := feed.ParseHeadStatement(h.Statement)
	if err != nil {
		t.Fatal(err)
	}
	m := &dayflyv1.HeadStatement{}
	if err := proto.Unmarshal(h.Statement, m); err != nil {
		t.Fatal(err)
	}
	if len(m.ProtoReflect().GetUnknown()) > 0 {
		t.Error("fields that the message doesn't have")
	}
	head, err := wire.ToPosition(m.GetHead())
	horizon, horizonErr := wire.ToPosition(m.GetHorizon())
	got := feed.HeadStatement{
		Head: head, Horizon: horizon, KeySet: [32]byte(m.GetKeySetDigest()), NonceRoot: [32]byte(m.GetNonceRoot()),
		Age: m.GetAge().AsDuration(), SignedAt: m.GetSignedAt().AsTime(),
	}
	if err != nil || horizonErr != nil || got != want {
		t.Errorf("got %+v, %v, %v, want %+v", got, err, horizonErr, want)
	}
	again, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil || !bytes.Equal(again, h.Statement) {
		t.Errorf("marshalled %x, %v, want %x", again, err, h.Statement)
	}
}

func TestMalformed(t *testing.T) {
	sum := make([]byte, 32)
	position := &dayflyv1.Position{Era: "00000001", Sequence: 1, Sum: sum}
	key := signingKey(t, token.ES256)
	event := func(change func(*dayflyv1.Event)) error {
		m := wire.Event(feed.Event{Seq: 1, Key: &key})
		change(m)
		_, err := wire.ToEvent(m)
		return err
	}
	subscribe := func(change func(*dayflyv1.Subscribe)) error {
		m := wire.Subscribe(wire.Subscription{Instance: "instance1", Audiences: []string{"a"}, Bound: time.Second})
		change(m)
		_, err := wire.ToSubscription(m)
		return err
	}
	pong := func(change func(*dayflyv1.Pong)) error {
		m := &dayflyv1.Pong{Nonce: sum[:8], Head: position, Age: durationpb.New(0)}
		change(m)
		_, err := wire.ToPong(m)
		return err
	}
	errOf := func(_ any, err error) error { return err }
	many := func(n int) []*dayflyv1.Selector {
		out := make([]*dayflyv1.Selector, n)
		for i := range out {
			out[i] = wire.Selector(revocation.Everything())
		}
		return out
	}
	tests := map[string]error{
		"position: no era":                      errOf(wire.ToPosition(&dayflyv1.Position{Sum: sum})),
		"position: era in upper case":           errOf(wire.ToPosition(&dayflyv1.Position{Era: "0000000A", Sum: sum})),
		"position: short sum":                   errOf(wire.ToPosition(&dayflyv1.Position{Era: "00000001", Sum: sum[:31]})),
		"binding":                               errOf(wire.ToBinding(9)),
		"on stale":                              errOf(wire.ToOnStale(9)),
		"no duration":                           errOf(wire.ToDuration(nil)),
		"negative duration":                     errOf(wire.ToDuration(durationpb.New(-1))),
		"huge duration":                         errOf(wire.ToDuration(&durationpb.Duration{Seconds: 1 << 62})),
		"no selector":                           errOf(wire.ToSelector(nil)),
		"empty selector":                        errOf(wire.ToSelector(&dayflyv1.Selector{})),
		"half a subtree":                        errOf(wire.ToSelector(&dayflyv1.Selector{Selector: &dayflyv1.Selector_Subtree{Subtree: "spiffe://example.org/ns/prod*"}})),
		"no selectors":                          errOf(wire.ToSelectors(nil)),
		"too many selectors":                    errOf(wire.ToSelectors(many(wire.MaxSelectors + 1))),
		"no lineage":                            errOf(wire.ToLineage(nil)),
		"too long a lineage":                    errOf(wire.ToLineage(make([]*dayflyv1.Member, token.MaxDepth+1))),
		"member":                                errOf(wire.ToMember(&dayflyv1.Member{Identity: "x"})),
		"nothing":                               errOf(wire.ToDelivery(nil)),
		"snapshot without position":             errOf(wire.ToDelivery(&dayflyv1.FollowResponse{Message: &dayflyv1.FollowResponse_Snapshot{Snapshot: &dayflyv1.Snapshot{}}})),
		"event: no body":                        event(func(m *dayflyv1.Event) { m.Body = nil }),
		"event: short hash":                     event(func(m *dayflyv1.Event) { m.Sum = nil }),
		"event: short digest":                   event(func(m *dayflyv1.Event) { m.PrivateDigest = sum[:1] }),
		"event: number 0":                       event(func(m *dayflyv1.Event) { m.Sequence = 0 }),
		"key: another's ID":                     event(func(m *dayflyv1.Event) { m.GetKey().KeyId = "AAAAAAAA" }),
		"key: another algorithm":                event(func(m *dayflyv1.Event) { m.GetKey().Algorithm = "EdDSA" }),
		"key: trailing bytes":                   event(func(m *dayflyv1.Event) { m.GetKey().PublicKey = append(m.GetKey().PublicKey, 0) }),
		"key: no bytes":                         event(func(m *dayflyv1.Event) { m.GetKey().PublicKey = nil }),
		"key: many certificates":                event(func(m *dayflyv1.Event) { m.GetKey().Certificates = make([][]byte, wire.MaxCertificates+1) }),
		"key: huge certificate":                 event(func(m *dayflyv1.Event) { m.GetKey().Certificates[0] = make([]byte, wire.MaxCertificateBytes+1) }),
		"subscribe: no instance":                subscribe(func(m *dayflyv1.Subscribe) { m.Instance = "" }),
		"subscribe: path as instance":           subscribe(func(m *dayflyv1.Subscribe) { m.Instance = "instance/another" }),
		"subscribe: no bound":                   subscribe(func(m *dayflyv1.Subscribe) { m.MaxStaleness = nil }),
		"subscribe: small bound":                subscribe(func(m *dayflyv1.Subscribe) { m.MaxStaleness = durationpb.New(wire.MinBound - 1) }),
		"subscribe: large bound":                subscribe(func(m *dayflyv1.Subscribe) { m.MaxStaleness = durationpb.New(wire.MaxBound + 1) }),
		"subscribe: no audience":                subscribe(func(m *dayflyv1.Subscribe) { m.Audiences = nil }),
		"subscribe: many audiences":             subscribe(func(m *dayflyv1.Subscribe) { m.Audiences = make([]string, wire.MaxAudiences+1) }),
		"subscribe: empty audience":             subscribe(func(m *dayflyv1.Subscribe) { m.Audiences = []string{""} }),
		"pong: no head":                         pong(func(m *dayflyv1.Pong) { m.Head = nil }),
		"pong: no age":                          pong(func(m *dayflyv1.Pong) { m.Age = nil }),
		"pong: negative age":                    pong(func(m *dayflyv1.Pong) { m.Age = durationpb.New(-1) }),
		"pong: signed head without a statement": pong(func(m *dayflyv1.Pong) { m.SignedHead = &dayflyv1.SignedHead{} }),
		"pong: signed head without a signature": pong(func(m *dayflyv1.Pong) { m.SignedHead = wire.SignedHead(signedHead(t)); m.SignedHead.Signature = nil }),
		"pong: signed head without a chain":     pong(func(m *dayflyv1.Pong) { m.SignedHead = wire.SignedHead(signedHead(t)); m.SignedHead.Certificates = nil }),
		"pong: signed head with a large certificate": pong(func(m *dayflyv1.Pong) {
			m.SignedHead = wire.SignedHead(signedHead(t))
			m.SignedHead.Certificates[1] = make([]byte, wire.MaxCertificateBytes+1)
		}),
		"subscribe: signed head of nonsense": subscribe(func(m *dayflyv1.Subscribe) {
			m.NewestSignedHead = &dayflyv1.SignedHead{Statement: []byte("hello"), Signature: []byte{1}, Certificates: [][]byte{{1}}}
		}),
		"pong: short nonce": pong(func(m *dayflyv1.Pong) { m.Nonce = sum[:7] }),
		"nonce: long":       errOf(wire.ToNonce(make([]byte, wire.MaxNonceBytes+1))),
	}
	for name, err := range tests {
		if !errors.Is(err, feed.ErrMalformed) {
			t.Errorf("%s: got %v, want it to wrap ErrMalformed", name, err)
		}
	}
	// A relay may name no audience, and a stranger's text is not quoted.
	if err := subscribe(func(m *dayflyv1.Subscribe) { m.Audiences, m.Relay = nil, true }); err != nil {
		t.Errorf("relay: %v", err)
	}
	const text = "hello\nworld"
	if err := subscribe(func(m *dayflyv1.Subscribe) { m.Instance = text }); err == nil || strings.Contains(err.Error(), "hello") {
		t.Errorf("got %v", err)
	}
}

// FuzzFollowResponse: whatever a feed sends is read without a panic, and what is read is
// written the same.
func FuzzFollowResponse(f *testing.F) {
	l := history(f)
	for _, known := range []uint64{0, 2} {
		at, _ := l.At(known)
		d, _ := feed.NewCursor(at).Next(l, 100)
		b, err := proto.Marshal(wire.Delivery(d))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	b, err := proto.Marshal(wire.PongMessage(wire.Pong{Nonce: "12345678", Head: l.Head(), Signed: signedHead(f)}))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		var m dayflyv1.FollowResponse
		if proto.Unmarshal(b, &m) != nil {
			return
		}
		if p, err := wire.ToPong(m.GetPong()); err == nil {
			if again, err := wire.ToPong(wire.PongMessage(p).GetPong()); err != nil || !reflect.DeepEqual(again, p) {
				t.Errorf("got %v, %v, want %v", again, err, p)
			}
		}
		d, err := wire.ToDelivery(&m)
		if err != nil {
			if !errors.Is(err, feed.ErrMalformed) {
				t.Errorf("an error of no kind: %v", err)
			}
			return
		}
		if again, err := wire.ToDelivery(wire.Delivery(d)); err != nil || !reflect.DeepEqual(again, d) {
			t.Errorf("got %+v, %v, want %+v", again, err, d)
		}
		_ = new(feed.View).Apply(d, 0)
	})
}

// FuzzSubscribe: whatever a subscriber says of itself is read without a panic.
func FuzzSubscribe(f *testing.F) {
	b, err := proto.Marshal(wire.Subscribe(wire.Subscription{Instance: "instance1", Audiences: []string{"a"}, Bound: time.Second, Position: feed.Position{Era: 1}}))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		var m dayflyv1.Subscribe
		if proto.Unmarshal(b, &m) != nil {
			return
		}
		s, err := wire.ToSubscription(&m)
		if err != nil {
			return
		}
		if again, err := wire.ToSubscription(wire.Subscribe(s)); err != nil || !reflect.DeepEqual(again, s) {
			t.Errorf("got %+v, %v, want %+v", again, err, s)
		}
	})
}

// FuzzRelayReport: whatever a relay says of those below it is read without a panic, and
// read again the same.
func FuzzRelayReport(f *testing.F) {
	b, err := proto.Marshal(wire.Relayed(feed.Relayed{
		Path: []string{"relay-01", "verifier1"}, Audiences: []string{"a"}, Bound: time.Second, Acked: feed.Position{Era: 1}, LastAnswerAge: time.Second, Gone: true,
	}))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		var m dayflyv1.RelayedVerifier
		if proto.Unmarshal(b, &m) != nil {
			return
		}
		rs, err := wire.ToRelayed([]*dayflyv1.RelayedVerifier{&m})
		if err != nil {
			return
		}
		if again, err := wire.ToRelayed([]*dayflyv1.RelayedVerifier{wire.Relayed(rs[0])}); err != nil || !reflect.DeepEqual(again, rs) {
			t.Errorf("got %+v, %v, want %+v", again, err, rs)
		}
	})
}
