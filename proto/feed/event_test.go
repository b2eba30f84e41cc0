package feed_test

import (
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"pgregory.net/rapid"
)

// A vector is one record of a log in the words of the wire.
type vector struct {
	Sequence     uint64   `json:"sequence"`
	Private      string   `json:"private_digest"`
	Era          string   `json:"era,omitempty"`
	Revocation   []string `json:"revocation,omitempty"`
	Lift         uint64   `json:"lift,omitempty"`
	Algorithm    string   `json:"key_algorithm,omitempty"`
	PublicKey    string   `json:"public_key,omitempty"`
	Signature    string   `json:"signature,omitempty"`
	Certificates []string `json:"certificates,omitempty"`
	Sum          string   `json:"sum"`
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (v vector) event(t testing.TB) feed.Event {
	t.Helper()
	e := feed.Event{Seq: v.Sequence, Private: [32]byte(unhex(t, v.Private)), Sum: feed.Sum(unhex(t, v.Sum))}
	switch {
	case v.Era != "":
		era, err := token.ParseEra(v.Era)
		if err != nil {
			t.Fatal(err)
		}
		e.Era = &feed.Era{Era: era}
	case v.Lift != 0:
		e.Lift = &feed.Lift{Lock: v.Lift}
	case v.PublicKey != "":
		var certs [][]byte
		for _, c := range v.Certificates {
			certs = append(certs, unhex(t, c))
		}
		parsed, err := x509.ParsePKIXPublicKey(unhex(t, v.PublicKey))
		if err != nil {
			t.Fatal(err)
		}
		public, err := token.NewPublicKey(token.Algorithm(v.Algorithm), parsed)
		if err != nil {
			t.Fatal(err)
		}
		e.Key = &feed.Key{Public: public, DER: unhex(t, v.PublicKey), Certificates: certs, Signature: unhex(t, v.Signature)}
	default:
		e.Revocation = &feed.Revocation{}
		for _, text := range v.Revocation {
			s, err := revocation.Parse(text)
			if err != nil {
				t.Fatal(err)
			}
			e.Revocation.Selectors = append(e.Revocation.Selectors, s)
		}
	}
	return e
}

// TestChainVectors holds the running hash still: brokers, relays and verifiers of all
// versions must agree on it.
func TestChainVectors(t *testing.T) {
	raw, err := os.ReadFile("testdata/chain.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors []vector
	if err := json.Unmarshal(raw, &vectors); err != nil {
		t.Fatal(err)
	}
	if len(vectors) < 5 {
		t.Fatalf("%d vectors", len(vectors))
	}
	var l feed.Log
	for _, v := range vectors {
		e := v.event(t)
		if got := e.Chain(l.Head().Sum); got != e.Sum {
			t.Fatalf("number %d: sum %s, want %s", v.Sequence, got, e.Sum)
		}
		if err := l.Append(e); err != nil {
			t.Fatal(err)
		}
	}
}

// Everything that an event says is under the hash.
func TestChainCoversEverything(t *testing.T) {
	base := func() feed.Event {
		return next(feed.Position{Seq: 4}, feed.Event{Key: fakeKey("k")})
	}
	e := base()
	want := e.Chain(feed.Sum{})
	for name, change := range map[string]func(*feed.Event){
		"number":       func(e *feed.Event) { e.Seq++ },
		"private":      func(e *feed.Event) { e.Private[31]++ },
		"algorithm":    func(e *feed.Event) { e.Key.Public.Algorithm = token.EdDSA },
		"key":          func(e *feed.Event) { e.Key.DER = []byte("l") },
		"signature":    func(e *feed.Event) { e.Key.Signature = []byte("other") },
		"certificates": func(e *feed.Event) { e.Key.Certificates = [][]byte{{1}} },
		"moved bytes":  func(e *feed.Event) { e.Key.DER, e.Key.Signature = []byte("ks"), []byte("ignature") },
		"body":         func(e *feed.Event) { e.Key, e.Lift = nil, &feed.Lift{Lock: 1} },
	} {
		e := base()
		change(&e)
		if e.Chain(feed.Sum{}) == want {
			t.Errorf("a changed %s has the same hash", name)
		}
	}
	if e.Chain(feed.Sum{1}) == want {
		t.Error("another history has the same hash")
	}
}

func TestValidate(t *testing.T) {
	key := fakeKey("a")
	stranger := *key
	stranger.DER = []byte("b")
	for name, e := range map[string]feed.Event{
		"no body":          {Seq: 1},
		"two bodies":       {Seq: 2, Lift: &feed.Lift{Lock: 1}, Key: key},
		"number 0":         {Era: &feed.Era{Era: 1}},
		"no selector":      {Seq: 2, Revocation: &feed.Revocation{}},
		"empty selector":   {Seq: 2, Revocation: &feed.Revocation{Selectors: make([]revocation.Selector, 1)}},
		"lift of a later":  {Seq: 2, Lift: &feed.Lift{Lock: 2}},
		"lift of nothing":  {Seq: 2, Lift: &feed.Lift{}},
		"era 0":            {Seq: 2, Era: &feed.Era{}},
		"key without ID":   {Seq: 2, Key: &feed.Key{DER: []byte("a")}},
		"key of other DER": {Seq: 2, Key: &stranger},
	} {
		if err := e.Validate(); !errors.Is(err, feed.ErrMalformed) {
			t.Errorf("%s: %v, want ErrMalformed", name, err)
		}
	}
}

// A position that was written is read, and nothing that would be written otherwise.
func TestPositionText(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := feed.Position{
			Era: token.Era(rapid.Uint32().Draw(t, "era")), Seq: rapid.Uint64().Draw(t, "seq"),
			Sum: feed.Sum(rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "sum")),
		}
		text, err := p.MarshalText()
		if err != nil {
			t.Fatal(err)
		}
		var q feed.Position
		if err := q.UnmarshalText(text); err != nil || q != p {
			t.Fatalf("%s was read as %+v, %v", text, q, err)
		}
	})
	whole, _ := feed.Position{Era: 10, Seq: 7}.MarshalText()
	for _, bad := range []string{"", "0000000a", "0000000a/7", "a/7/" + strings.Repeat("0", 64), "0000000A/7/" + strings.Repeat("0", 64),
		"0000000a/07/" + strings.Repeat("0", 64), "0000000a/7/00", string(whole) + "00", string(whole) + "/", "0000000a/-7/" + strings.Repeat("0", 64)} {
		var q feed.Position
		if err := q.UnmarshalText([]byte(bad)); err == nil || q != (feed.Position{}) {
			t.Errorf("%q was read as %+v", bad, q)
		}
	}
}
