package verify_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"reflect"
	"slices"
	"strings"
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
	"google.golang.org/protobuf/types/known/durationpb"
	"pgregory.net/rapid"
)

// TestSameAnswers: whatever has happened, a verifier that remembers signed tokens says of
// each token, its holder and the moment what one says that remembers none: with the same
// words, the same claims and the same use reports. What callers do with what they are
// given changes nothing, and what isn't accepted isn't remembered.
func TestSameAnswers(t *testing.T) {
	hits := map[verify.Reason]int{}
	signers := []signingKey{newSigningKey(t), newSigningKey(t)}
	signers = append(signers, collidingKeys(t)...)
	rapid.Check(t, func(rt *rapid.T) {
		w := newTwins(t, signers, hits)
		w.start()
		rt.Repeat(map[string]func(*rapid.T){
			"issue": w.issue, "issue again": w.issue, "exchange": w.exchange, "forge": w.forge,
			"publish": w.publish, "revoke": w.revoke, "era": w.newEra, "horizon": w.moveHorizon, "fork": w.fork,
			"deliver": w.deliver, "ping": w.ping, "welcome": w.welcome, "time": w.pass, "silence": w.silence, "sweep": w.sweep,
			"show": w.show, "show again": w.show, "": w.showAll,
		})
		if with, without := w.with.TakeUses(), w.without.TakeUses(); !maps.Equal(with, without) {
			rt.Errorf("uses: %v, want %v", with, without)
		}
	})
	t.Logf("remembered tokens and what was said of them: %v", hits)
	if hits[""] == 0 || len(hits) < 3 {
		t.Errorf("the histories show nothing: %v", hits)
	}
}

type signingKey struct {
	private *ecdsa.PrivateKey
	public  token.PublicKey
}

func newSigningKey(t testing.TB) signingKey {
	t.Helper()
	return signingKeyOf(t, stranger(t))
}

func signingKeyOf(t testing.TB, private *ecdsa.PrivateKey) signingKey {
	t.Helper()
	public, err := token.NewPublicKey(token.ES256, &private.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return signingKey{private, public}
}

// collidingKeys are two keys of one ID: an ID has 48 bits, and among the first 15 million
// keys made of numbers there is such a pair.
func collidingKeys(t testing.TB) []signingKey {
	t.Helper()
	var out []signingKey
	for _, n := range []uint32{13_058_782, 14_982_255} {
		seed := sha256.Sum256(binary.BigEndian.AppendUint32([]byte("dayfly test key "), n))
		private, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), seed[:])
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, signingKeyOf(t, private))
	}
	if out[0].public.ID != out[1].public.ID || out[0].public.Equal(out[1].public) {
		t.Fatal("these are not two keys of one ID")
	}
	return out
}

// twins are two verifiers that are told the same at the same moment.
type twins struct {
	t             testing.TB
	with, without *verify.Verifier
	hits          map[verify.Reason]int

	boot   feed.Instant
	now    time.Time
	log    feed.Log
	cursor *feed.Cursor
	pings  int
	keys   []signingKey
	issued []*issuedToken
	shown  []string // what was ever to be shown, forgeries too
}

type issuedToken struct {
	raw    string
	claims *token.Claims
}

type noConn struct{ grpc.ClientConnInterface }

var twinIDs = []spiffeid.ID{payments, orders, thief, spiffeid.RequireFromString("spiffe://example.org/payments/batch")}

func newTwins(t testing.TB, keys []signingKey, hits map[verify.Reason]int) *twins {
	w := &twins{t: t, hits: hits, boot: feed.Instant(time.Hour), now: time.Unix(1_800_000_000, 0), cursor: feed.NewCursor(feed.Position{}), keys: keys}
	cfg := verify.Config{
		Conn: noConn{}, Audiences: []string{"orders", "spiffe://example.org/orders"},
		Boot: func() feed.Instant { return w.boot }, Now: func() time.Time { return w.now },
	}
	w.with, w.without = must(verify.New(cfg)), must(verify.New(cfg))
	return w
}

// start is a verifier's usual beginning, with two of the keys.
func (w *twins) start() {
	w.append(feed.Event{Era: &feed.Era{Era: 0x1000}})
	w.appendKey(w.keys[0])
	w.appendKey(w.keys[2])
	w.welcomed(30*time.Second, 30*time.Minute, issuer)
	w.deliverAll()
	w.pinged(0)
}

func (w *twins) append(e feed.Event) {
	e.Seq = w.log.Head().Seq + 1
	e.Sum = e.Chain(w.log.Head().Sum)
	if err := w.log.Append(e); err != nil {
		w.t.Fatal(err)
	}
}

func (w *twins) appendKey(k signingKey) {
	der, err := x509.MarshalPKIXPublicKey(k.public.Key)
	if err != nil {
		w.t.Fatal(err)
	}
	w.append(feed.Event{Key: &feed.Key{Public: k.public, DER: der}})
}

// same does something with both, which must say the same.
func (w *twins) same(f func(*verify.Verifier) error) {
	if a, b := f(w.with), f(w.without); fmt.Sprint(a) != fmt.Sprint(b) {
		w.t.Fatalf("the feed: %v, want %v", a, b)
	}
}

func (w *twins) deliverAll() {
	for {
		d, news := w.cursor.Next(&w.log, 2)
		if !news {
			return
		}
		w.same(func(v *verify.Verifier) error { return v.Deliver(wire.Delivery(d)) })
	}
}

func (w *twins) deliver(*rapid.T) { w.deliverAll() }

func (w *twins) pinged(age time.Duration) {
	w.pings++
	nonce := fmt.Sprintf("nonce-%015d", w.pings)
	answer := wire.PongMessage(wire.Pong{Nonce: nonce, Head: w.log.Head(), Age: age, Horizon: w.log.Horizon()}).GetPong()
	w.same(func(v *verify.Verifier) error { v.Ping(nonce); return v.Answer(answer) })
}

func (w *twins) ping(t *rapid.T) {
	w.deliverAll()
	w.pinged(time.Duration(rapid.IntRange(0, 10).Draw(t, "age")) * time.Second)
}

// fork answers with a head of another history.
func (w *twins) fork(t *rapid.T) {
	if !usually(t, "forks", false, true) {
		t.Skip("seldom")
	}
	head := w.log.Head()
	head.Sum[0] ^= 1
	w.pings++
	nonce := fmt.Sprintf("nonce-%015d", w.pings)
	w.same(func(v *verify.Verifier) error {
		v.Ping(nonce)
		return v.Answer(wire.PongMessage(wire.Pong{Nonce: nonce, Head: head}).GetPong())
	})
}

func (w *twins) welcomed(bound, maxTTL time.Duration, issuer string) {
	m := &dayflyv1.Welcome{MaxStaleness: durationpb.New(bound), MaxTokenTtl: durationpb.New(maxTTL), Issuer: issuer}
	w.same(func(v *verify.Verifier) error { return v.Welcome(m) })
}

func (w *twins) welcome(t *rapid.T) {
	w.welcomed(
		time.Duration(rapid.IntRange(5, 30).Draw(t, "bound"))*time.Second,
		usually(t, "largest life", 30*time.Minute, time.Minute, time.Hour),
		usually(t, "issuer", issuer, "https://other.example.org"))
	w.deliverAll()
	w.pinged(0)
}

func (w *twins) pass(t *rapid.T) {
	took := time.Duration(rapid.IntRange(0, 20).Draw(t, "seconds")) * time.Second
	w.boot = w.boot.Add(took)
	w.now = w.now.Add(took + time.Duration(usually(t, "clock is set", 0, 300, -60, -400))*time.Second)
	if usually(t, "answered", true, false) {
		w.ping(t)
	}
}

// silence is longer than any bound, and what begins when it ends is looked at too.
func (w *twins) silence(t *rapid.T) {
	w.boot = w.boot.Add(31 * time.Second)
	w.now = w.now.Add(31 * time.Second)
	w.showAll(t)
	w.ping(t)
}

func (w *twins) sweep(*rapid.T) { w.with.Sweep() }

func (w *twins) publish(t *rapid.T) {
	w.appendKey(rapid.SampledFrom(w.keys).Draw(t, "key"))
	w.deliverAll()
}

func (w *twins) newEra(t *rapid.T) {
	if !usually(t, "restored", false, true) {
		t.Skip("seldom")
	}
	w.append(feed.Event{Era: &feed.Era{Era: w.log.Head().Era + 1}})
	w.appendKey(w.keys[rapid.IntRange(0, len(w.keys)-1).Draw(t, "key")])
	w.deliverAll()
	w.pinged(0)
}

func (w *twins) moveHorizon(t *rapid.T) {
	h := w.log.Horizon()
	seq := rapid.Uint64Range(h.Seq, w.log.Head().Seq).Draw(t, "horizon")
	if p, ok := w.log.At(seq); ok && seq > h.Seq {
		w.log.SetHorizon(p)
		w.deliverAll()
	}
}

func (w *twins) revoke(t *rapid.T) {
	who := rapid.SampledFrom(twinIDs).Draw(t, "whom")
	var sel revocation.Selector
	switch kind := rapid.IntRange(0, 9).Draw(t, "kind"); {
	case kind == 0:
		sel = revocation.Key(rapid.SampledFrom(w.keys).Draw(t, "key").public.ID)
	case kind == 1:
		sel = must(revocation.Audience("orders"))
	case kind == 2:
		sel = must(revocation.Subtree(payments.String() + "/*"))
	case kind < 6 && len(w.issued) > 0:
		sel = revocation.Grant(rapid.SampledFrom(w.issued).Draw(t, "token").claims.Lineage[0].Grant)
	default:
		sel = revocation.Identity(who)
	}
	w.append(feed.Event{Revocation: &feed.Revocation{Selectors: []revocation.Selector{sel}}})
	if rapid.Bool().Draw(t, "delivered") {
		w.deliverAll()
	}
}

func (w *twins) member(t *rapid.T, key signingKey) token.Member {
	who := rapid.SampledFrom(twinIDs).Draw(t, "identity")
	return token.Member{Identity: who, Grant: must(token.NewGrantID(who, w.now, rand.Reader)), Key: key.public.ID, SVID: token.Thumbprint{7}}
}

func (w *twins) issue(t *rapid.T) { w.derive(t, nil) }

func (w *twins) exchange(t *rapid.T) {
	if len(w.issued) == 0 {
		t.Skip("nothing to exchange")
	}
	w.derive(t, rapid.SampledFrom(w.issued).Draw(t, "parent").claims.Lineage)
}

// derive makes any token that a broker, or who has its key, could make.
func (w *twins) derive(t *rapid.T, lineage []token.Member) {
	if len(lineage) == token.MaxDepth || len(w.issued) == 6 {
		t.Skip("enough")
	}
	key := w.keys[rapid.SampledFrom([]int{0, 0, 0, 0, 2, 2, 2, 1, 3}).Draw(t, "key")]
	from := w.now.Truncate(time.Second).Add(time.Duration(rapid.SampledFrom([]int{0, 0, 0, 0, 0, 0, 0, 20, 60}).Draw(t, "from")) * time.Second)
	c := &token.Claims{
		Issuer:   usually(t, "issuer", issuer, "https://other.example.org"),
		Audience: usually(t, "audience", "orders", "spiffe://example.org/orders", "ledger"),
		Lineage:  append(slices.Clone(lineage), w.member(t, key)),
		Scopes:   []string{"orders:read", "orders:write"},
		IssuedAt: from, NotBefore: from,
		Expires:     from.Add(time.Duration(usually(t, "life", 300, 1, 30, 2700)) * time.Second),
		Binding:     usually(t, "binding", token.BindingSPIFFE, token.BindingNone, token.BindingX5T),
		Transaction: "txn",
		Position:    w.log.Head().Token(),
	}
	if c.Binding == token.BindingX5T {
		c.Certificate = sha256.Sum256(twinCertificate.Raw)
	}
	switch usually(t, "position", "head", "ahead", "off the log", "horizon") {
	case "ahead":
		c.Position.Rev++
	case "off the log":
		c.Position.Sum[0] ^= 1
	case "horizon":
		if p, ok := w.log.At(w.log.Horizon().Seq); ok {
			c.Position = p.Token()
		}
	}
	raw := signWith(w.t, c, key.private)
	w.issued = append(w.issued, &issuedToken{raw, c})
	w.shown = append(w.shown, raw)
}

// usually draws the first, and now and then one of the others.
func usually[A any](t *rapid.T, what string, first A, others ...A) A {
	return rapid.SampledFrom(append(slices.Repeat([]A{first}, 5*len(others)), others...)).Draw(t, what)
}

var twinCertificate = &x509.Certificate{Raw: []byte("a certificate")}

// forge makes another token out of what was issued.
func (w *twins) forge(t *rapid.T) {
	if len(w.issued) == 0 || len(w.shown) > 30 {
		t.Skip("nothing to forge")
	}
	raw := rapid.SampledFrom(w.issued).Draw(t, "token").raw
	other := rapid.SampledFrom(w.issued).Draw(t, "other").raw
	dot := strings.LastIndexByte(raw, '.')
	switch rapid.IntRange(0, 4).Draw(t, "forgery") {
	case 0:
		raw = raw[:dot] + other[strings.LastIndexByte(other, '.'):]
	case 1:
		raw = malleated(w.t, raw)
	case 2:
		i := rapid.IntRange(0, len(raw)-1).Draw(t, "where")
		raw = raw[:i] + string(rapid.SampledFrom([]byte("Aa0-_.=")).Draw(t, "what")) + raw[i+1:]
	case 3:
		raw = raw[:rapid.IntRange(0, len(raw)).Draw(t, "cut")]
	case 4:
		raw += raw[dot:]
	}
	w.shown = append(w.shown, raw)
}

// malleated spells the signature (r, n-s): it holds too.
func malleated(t testing.TB, raw string) string {
	t.Helper()
	dot := strings.LastIndexByte(raw, '.')
	sig, err := base64.RawURLEncoding.DecodeString(raw[dot+1:])
	if err != nil {
		t.Fatal(err)
	}
	s := new(big.Int).SetBytes(sig[32:])
	s.Sub(elliptic.P256().Params().N, s).FillBytes(sig[32:])
	return raw[:dot+1] + base64.RawURLEncoding.EncodeToString(sig)
}

// showAll shows what was issued as its presenter: some stand for long, and all that
// happens happens to them.
func (w *twins) showAll(t *rapid.T) {
	for _, i := range w.issued {
		w.showAs(t, i.raw, verify.Peer{ID: i.claims.Presenter(), Certificate: twinCertificate, Address: "192.0.2.1"})
	}
}

// show shows any token, as anybody.
func (w *twins) show(t *rapid.T) {
	if len(w.shown) == 0 {
		t.Skip("nothing to show")
	}
	raw := rapid.SampledFrom(w.shown).Draw(t, "token")
	peer := verify.Peer{Address: "192.0.2.1"}
	if usually(t, "with an identity", true, false) {
		peer.ID = rapid.SampledFrom(twinIDs).Draw(t, "peer")
	}
	if usually(t, "with the certificate", true, false) {
		peer.Certificate = twinCertificate
	}
	w.showAs(t, raw, peer)
}

// showAs shows a token to both.
func (w *twins) showAs(t *rapid.T, raw string, peer verify.Peer) {
	gone, cancel := context.WithCancel(context.Background())
	cancel() // nobody waits for a ping
	remembered := w.with.Remembers(raw)
	got, err := w.with.Verify(gone, raw, peer)
	w.without.Forget()
	want, wantErr := w.without.Verify(gone, raw, peer)
	var r, wantR *verify.Refusal
	if errors.As(err, &r) != errors.As(wantErr, &wantR) || r != nil && *r != *wantR {
		t.Fatalf("remembered %t: got %v, want %v", remembered, err, wantErr)
	}
	if remembered {
		w.hits[verify.ReasonOf(err)]++
	} else if err != nil && w.with.Remembers(raw) {
		t.Fatalf("what was refused is remembered: %v", err)
	}
	if got == nil {
		return
	}
	if !reflect.DeepEqual(got.Claims, want.Claims) || got.Token.Reveal() != raw || got.Peer != peer {
		t.Fatalf("remembered %t: got %+v, want %+v", remembered, got, want)
	}
	for i := range got.Lineage { // it is the caller's
		got.Lineage[i].Identity = thief
	}
	for i := range got.Scopes {
		got.Scopes[i] = "admin"
	}
}

// FuzzRemembered shows anything to a verifier that remembers two good tokens: only what
// one that remembers nothing accepts is accepted.
func FuzzRemembered(f *testing.F) {
	w := newTwins(f, append([]signingKey{newSigningKey(f), newSigningKey(f)}, collidingKeys(f)...), map[verify.Reason]int{})
	w.start()
	peer := verify.Peer{ID: payments}
	var good []string
	for _, scope := range []string{"orders:read", "orders:write"} {
		raw := signWith(f, &token.Claims{
			Issuer: issuer, Audience: "orders", Scopes: []string{scope},
			Lineage:  []token.Member{{Identity: payments, Grant: must(token.NewGrantID(payments, w.now, rand.Reader)), Key: w.keys[0].public.ID}},
			IssuedAt: w.now, NotBefore: w.now, Expires: w.now.Add(time.Minute),
			Binding: token.BindingSPIFFE, Transaction: "txn", Position: w.log.Head().Token(),
		}, w.keys[0].private)
		if _, err := w.with.Verify(f.Context(), raw, peer); err != nil || !w.with.Remembers(raw) {
			f.Fatalf("%v, remembered %t", err, w.with.Remembers(raw))
		}
		good = append(good, raw)
	}
	f.Add(0, 0, "")
	f.Add(0, len(good[0]), "A")
	f.Add(len(good[0])-1, 1, "A")
	f.Add(strings.LastIndexByte(good[0], '.'), 100, good[1][strings.LastIndexByte(good[1], '.'):])
	f.Add(0, strings.LastIndexByte(good[0], '.'), good[1][:strings.LastIndexByte(good[1], '.')])
	gone, cancel := context.WithCancel(context.Background())
	cancel()
	f.Fuzz(func(t *testing.T, at, cut int, put string) {
		raw := good[0]
		at = min(max(at, 0), len(raw))
		raw = raw[:at] + put + raw[min(at+min(max(cut, 0), len(raw)), len(raw)):]
		_, got := w.with.Verify(gone, raw, peer)
		_, want := w.without.Verify(gone, raw, peer)
		w.without.Forget()
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("got %v, want %v", got, want)
		}
		if got == nil && raw != good[0] && raw != good[1] && raw[:strings.LastIndexByte(raw, '.')] != good[0][:strings.LastIndexByte(good[0], '.')] {
			t.Errorf("accepted: %q", put)
		}
	})
}
