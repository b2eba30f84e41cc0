package feed_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"pgregory.net/rapid"
)

// A signedVector is a statement over the head of the log of chain.json, made for the root
// of a tree over nonces, with the proof of each.
type signedVector struct {
	Issuer    string   `json:"issuer"`
	Nonces    []string `json:"nonces"`
	Root      string   `json:"nonce_root"`
	Paths     []string `json:"nonce_paths"` // hashes joined
	KeySet    string   `json:"key_set_digest"`
	Statement string   `json:"statement"`
	Text      string   `json:"signed_text"`
}

func chainLog(t testing.TB) *feed.Log {
	t.Helper()
	raw, err := os.ReadFile("testdata/chain.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors []vector
	if err := json.Unmarshal(raw, &vectors); err != nil {
		t.Fatal(err)
	}
	l := new(feed.Log)
	for _, v := range vectors {
		if err := l.Append(v.event(t)); err != nil {
			t.Fatal(err)
		}
	}
	return l
}

// TestSignedVectors holds the bytes still that brokers sign and everyone else checks.
func TestSignedVectors(t *testing.T) {
	raw, err := os.ReadFile("testdata/signed.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors []signedVector
	if err := json.Unmarshal(raw, &vectors); err != nil {
		t.Fatal(err)
	}
	if len(vectors) < 3 {
		t.Fatalf("%d vectors", len(vectors))
	}
	l := chainLog(t)
	for _, v := range vectors {
		tree := feed.NewNonceTree(v.Nonces)
		root := tree.Root()
		if got := hex.EncodeToString(root[:]); got != v.Root {
			t.Errorf("root %s, want %s", got, v.Root)
		}
		for i := range v.Nonces {
			if got := hex.EncodeToString(bytes.Join(tree.Path(i).Hashes, nil)); got != v.Paths[i] {
				t.Errorf("path %d: %s, want %s", i, got, v.Paths[i])
			}
		}
		digest := feed.KeySetDigest(l.Events())
		if got := hex.EncodeToString(digest[:]); got != v.KeySet {
			t.Errorf("key set %s, want %s", got, v.KeySet)
		}
		s := feed.HeadStatement{Head: l.Head(), Horizon: l.Horizon(), KeySet: digest, NonceRoot: root, Age: 1500 * time.Millisecond, SignedAt: time.Unix(1_700_000_000, 5).UTC()}
		if got := hex.EncodeToString(s.Encode()); got != v.Statement {
			t.Errorf("statement %s, want %s", got, v.Statement)
		}
		if got := hex.EncodeToString(feed.HeadText(v.Issuer, s.Encode())); got != v.Text {
			t.Errorf("text %s, want %s", got, v.Text)
		}
		if got, err := feed.ParseHeadStatement(unhex(t, v.Statement)); err != nil || got != s {
			t.Errorf("read %+v, %v, want %+v", got, err, s)
		}
	}
}

func drawStatement(t *rapid.T) feed.HeadStatement {
	sum := func(name string) [32]byte {
		return [32]byte(rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, name))
	}
	era := token.Era(rapid.Uint32Range(1, 1<<32-1).Draw(t, "era"))
	seq := rapid.Uint64Range(2, 1<<63).Draw(t, "seq")
	return feed.HeadStatement{
		Head:    feed.Position{Era: era, Seq: seq, Sum: sum("sum")},
		Horizon: feed.Position{Era: era, Seq: rapid.Uint64Range(0, seq-1).Draw(t, "horizon"), Sum: sum("horizon sum")},
		KeySet:  sum("keys"), NonceRoot: sum("root"),
		Age:      time.Duration(rapid.Int64Range(0, int64(time.Hour)).Draw(t, "age")),
		SignedAt: time.Unix(rapid.Int64Range(-1<<40, 1<<40).Draw(t, "at"), rapid.Int64Range(0, 999_999_999).Draw(t, "ns")).UTC(),
	}
}

func TestHeadStatementRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawStatement(t)
		b := s.Encode()
		if got, err := feed.ParseHeadStatement(b); err != nil || got != s {
			t.Fatalf("got %+v, %v, want %+v", got, err, s)
		}
		if _, err := feed.ParseHeadStatement(append(b, 0x3a, 0)); !errors.Is(err, feed.ErrMalformed) {
			t.Fatalf("an unknown field: %v", err)
		}
	})
}

func TestHeadStatementRefuses(t *testing.T) {
	l := newLog(t, 3)
	good := feed.HeadStatement{Head: l.Head(), Horizon: l.Horizon(), SignedAt: time.Unix(9, 0).UTC()}
	other := l.Head()
	other.Sum[0]++
	for name, change := range map[string]func(*feed.HeadStatement){
		"no head":                 func(s *feed.HeadStatement) { s.Head = feed.Position{} },
		"no number":               func(s *feed.HeadStatement) { s.Head.Seq = 0; s.Horizon.Seq = 0 },
		"horizon above the head":  func(s *feed.HeadStatement) { s.Horizon.Seq = s.Head.Seq + 1 },
		"horizon of another era":  func(s *feed.HeadStatement) { s.Horizon.Era++ },
		"horizon forks from head": func(s *feed.HeadStatement) { s.Horizon = other },
		"negative age":            func(s *feed.HeadStatement) { s.Age = -time.Second },
		"absurd age":              func(s *feed.HeadStatement) { s.Age = 1<<63 - 1 },
	} {
		s := good
		change(&s)
		if _, err := feed.ParseHeadStatement(s.Encode()); !errors.Is(err, feed.ErrMalformed) {
			t.Errorf("%s: %v, want ErrMalformed", name, err)
		}
	}
	if _, err := feed.ParseHeadStatement(make([]byte, feed.MaxStatementBytes+1)); !errors.Is(err, feed.ErrMalformed) {
		t.Errorf("a large one: %v", err)
	}
}

// FuzzHeadStatement: what is read has one spelling.
func FuzzHeadStatement(f *testing.F) {
	l := chainLog(f)
	f.Add(feed.HeadStatement{Head: l.Head(), Horizon: l.Horizon(), Age: time.Second, SignedAt: time.Unix(9, 9)}.Encode())
	f.Add([]byte{10, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := feed.ParseHeadStatement(b)
		switch {
		case err != nil && !errors.Is(err, feed.ErrMalformed):
			t.Errorf("an error of no kind: %v", err)
		case err == nil && !bytes.Equal(s.Encode(), b):
			t.Errorf("%x is read as %x", b, s.Encode())
		}
	})
}

// FuzzNoncePath: no path panics, and none leads from one nonce to the root of others.
func FuzzNoncePath(f *testing.F) {
	root := feed.NewNonceTree([]string{"nonce-of-1", "nonce-of-2", "nonce-of-3"}).Root()
	f.Add("nonce-of-4", []byte{}, uint64(0))
	f.Add("nonce-of-4", make([]byte, 64), uint64(1))
	f.Fuzz(func(t *testing.T, nonce string, hashes []byte, index uint64) {
		if slices.Contains([]string{"nonce-of-1", "nonce-of-2", "nonce-of-3", ""}, nonce) {
			return
		}
		p := feed.NoncePath{Index: index}
		for c := range slices.Chunk(hashes, 32) {
			p.Hashes = append(p.Hashes, c)
		}
		if got, err := p.Root(nonce); err == nil && got == root {
			t.Errorf("%q is below a root that it never was below", nonce)
		}
	})
}

// TestNonceTree: every nonce of any tree is proven through any number of relays, and
// no changed nonce, hash or index is.
func TestNonceTree(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		nonce, path := "", feed.NoncePath{}
		var root [32]byte
		for level := range rapid.IntRange(1, 4).Draw(t, "relays") {
			var nonces []string
			for i := range rapid.IntRange(1, 40).Draw(t, "nonces") {
				nonces = append(nonces, fmt.Sprintf("nonce-%d-%d", level, i))
			}
			i := rapid.IntRange(0, len(nonces)-1).Draw(t, "mine")
			if level > 0 {
				nonces[i] = string(root[:])
			}
			tree := feed.NewNonceTree(nonces)
			root = tree.Root()
			if level == 0 {
				nonce, path = nonces[i], tree.Path(i)
				continue
			}
			var err error
			if path, err = path.Under(tree.Path(i)); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := path.Root(nonce); err != nil || got != root {
			t.Fatalf("root %x, %v, want %x", got, err, root)
		}
		if got, _ := path.Root(nonce + "x"); got == root {
			t.Fatal("another nonce has the proof")
		}
		if len(path.Hashes) == 0 {
			return
		}
		bad := feed.NoncePath{Hashes: slices.Clone(path.Hashes), Index: path.Index}
		i := rapid.IntRange(0, len(bad.Hashes)-1).Draw(t, "broken")
		if len(bad.Hashes[i]) == 0 {
			bad.Hashes = slices.Delete(bad.Hashes, i, i+1)
		} else {
			bad.Hashes[i] = append([]byte{bad.Hashes[i][0] ^ 1}, bad.Hashes[i][1:]...)
		}
		if got, err := bad.Root(nonce); err == nil && got == root {
			t.Fatal("a broken path is a proof")
		}
	})
}

func TestNoncePathLimits(t *testing.T) {
	long := feed.NoncePath{}
	for range 40 {
		long.Hashes = append(long.Hashes, make([]byte, 32))
	}
	if _, err := long.Under(long); !errors.Is(err, feed.ErrMalformed) {
		t.Errorf("composed beyond 64 hashes: %v", err)
	}
	for name, p := range map[string]feed.NoncePath{
		"index beyond the path": {Index: 1},
		"short hash":            {Hashes: [][]byte{make([]byte, 31)}},
		"too many":              {Hashes: make([][]byte, 200)},
	} {
		if _, err := p.Root("nonce"); !errors.Is(err, feed.ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// trusting is a check of signatures that finds all of them good.
func trusting(h feed.SignedHead) (feed.HeadStatement, error) {
	return feed.ParseHeadStatement(h.Statement)
}

func TestVerifyAnswer(t *testing.T) {
	l := newLog(t, 2)
	tree := feed.NewNonceTree([]string{"nonce-of-mine", "nonce-of-another"})
	h := feed.SignedHead{Statement: statement(l, tree.Root()).Encode()}
	if s, err := feed.VerifyAnswer("nonce-of-mine", h, tree.Path(0), trusting); err != nil || s.Head != l.Head() {
		t.Fatalf("got %+v, %v", s, err)
	}
	refuse := func(feed.SignedHead) (feed.HeadStatement, error) {
		return feed.HeadStatement{}, errors.New("bad signature")
	}
	for name, err := range map[string]error{
		"nonce of another":   second(feed.VerifyAnswer("nonce-of-mine", h, tree.Path(1), trusting)),
		"no signed head":     second(feed.VerifyAnswer("nonce-of-mine", feed.SignedHead{}, tree.Path(0), trusting)),
		"bad signature":      second(feed.VerifyAnswer("nonce-of-mine", h, tree.Path(0), refuse)),
		"impossible path":    second(feed.VerifyAnswer("nonce-of-mine", h, feed.NoncePath{Index: 9}, trusting)),
		"proof of an other":  second(feed.VerifyAnswer("nonce-of-third", h, tree.Path(0), trusting)),
		"the root as nonce?": second(feed.VerifyAnswer("nonce-of-mine", h, feed.NoncePath{}, trusting)),
	} {
		if !errors.Is(err, feed.ErrUnproven) {
			t.Errorf("%s: %v, want ErrUnproven", name, err)
		}
	}
}

func second[A any](_ A, err error) error { return err }

// statement is what a broker with this log would sign.
func statement(l *feed.Log, root [32]byte) feed.HeadStatement {
	return feed.HeadStatement{Head: l.Head(), Horizon: l.Horizon(), KeySet: feed.KeySetDigest(l.Events()), NonceRoot: root, SignedAt: time.Unix(9, 0).UTC()}
}

func TestNewest(t *testing.T) {
	l := newLog(t, 1)
	at := func(seconds int64) feed.SignedHead {
		s := statement(l, [32]byte{})
		s.SignedAt = time.Unix(seconds, 0)
		return feed.SignedHead{Statement: s.Encode(), Signature: []byte(fmt.Sprint(seconds))}
	}
	var n feed.Newest
	old := at(1)
	n.Note(at(3))
	n.Note(at(2))
	if string(n.Signed.Signature) != "3" {
		t.Errorf("kept %s of the same head, want what was signed last", n.Signed.Signature)
	}
	add(t, l, revokes(identity(9)))
	n.Note(at(1))
	n.Note(old)
	n.Note(feed.SignedHead{Statement: []byte("nonsense")})
	if n.Head != l.Head() || string(n.Signed.Signature) != "1" {
		t.Errorf("kept %s, want %s", n.Head, l.Head())
	}
}

// A behind is one behind a relay: what it holds back, and what it knows.
type behind struct {
	screen feed.Screen
	view   feed.View
}

func (b *behind) apply(out []feed.Delivery, err error) error {
	if err != nil {
		return err
	}
	for _, d := range out {
		if err := b.view.Apply(d, 0); err != nil {
			return err
		}
	}
	return nil
}

func (b *behind) deliver(d feed.Delivery) error { return b.apply(b.screen.Deliver(&b.view, d)) }
func (b *behind) signed(s feed.HeadStatement) error {
	return b.apply(b.screen.Signed(&b.view, s))
}

// all delivers everything that a log has for one who knows up to a position.
func (b *behind) all(l *feed.Log, from feed.Position, limit int) error {
	c := feed.NewCursor(from)
	for d, ok := c.Next(l, limit); ok; d, ok = c.Next(l, limit) {
		if err := b.deliver(d); err != nil {
			return err
		}
	}
	return nil
}

// lived returns a log with a horizon, keys above and below it, one of them revoked.
func lived(t testing.TB) *feed.Log {
	t.Helper()
	l := newLog(t, 2)
	add(t, l, feed.Event{Key: fakeKey("retired")})
	add(t, l, feed.Event{Key: fakeKey("good")})
	add(t, l, feed.Event{Key: fakeKey("stolen")})
	add(t, l, revokes(revocation.Key(fakeKey("stolen").Public.ID)))
	for i := range 3 {
		add(t, l, revokes(identity(20+i)))
	}
	at, _ := l.At(9)
	l.SetHorizon(at)
	l.Drop(func(e feed.Event) bool {
		return e.Seq <= 9 && e.Key == nil && e.Seq != 7
	})
	add(t, l, revokes(identity(30)))
	return l
}

func TestScreenHoldsBack(t *testing.T) {
	l := lived(t)
	var b behind
	if err := b.all(l, feed.Position{}, 2); err != nil {
		t.Fatal(err)
	}
	if p := b.view.Position(); p != (feed.Position{}) || !b.screen.Waits() {
		t.Fatalf("at %s without a signed head", p)
	}
	if err := b.signed(statement(l, [32]byte{})); err != nil {
		t.Fatal(err)
	}
	if b.view.Position() != l.Head() || b.screen.Waits() {
		t.Fatalf("at %s, want %s", b.view.Position(), l.Head())
	}
	add(t, l, revokes(identity(31)))
	signed := statement(l, [32]byte{})
	add(t, l, revokes(identity(32)))
	from := b.view.Position()
	if err := b.signed(signed); err != nil { // before its records: they wait for each other
		t.Fatal(err)
	}
	if err := b.all(l, from, 1); err != nil {
		t.Fatal(err)
	}
	if b.view.Position() != signed.Head || !b.screen.Waits() {
		t.Fatalf("at %s, want %s, which is signed, and no more", b.view.Position(), signed.Head)
	}
}

// The relay knows keys that the broker has forgotten since, and no others are let in.
func TestScreenKeys(t *testing.T) {
	l := lived(t)
	relay := *l
	l.Drop(func(e feed.Event) bool { return e.Seq == 4 })
	var b behind
	if err := b.all(&relay, feed.Position{}, 100); err != nil {
		t.Fatal(err)
	}
	if err := b.signed(statement(l, [32]byte{})); err != nil {
		t.Fatal(err)
	}
	if _, ok := b.view.Key(fakeKey("retired").Public.ID); ok {
		t.Error("a key that the broker has retired is known")
	}
	if _, ok := b.view.Key(fakeKey("good").Public.ID); !ok {
		t.Error("a good key is not known")
	}
}

// Whatever a relay does to a snapshot or to records, nothing but the truth is applied.
func TestScreenLies(t *testing.T) {
	forged := fakeKey("forged")
	edit := func(f func(*[]feed.Event, *feed.Delivery)) func(*feed.Delivery) {
		return func(d *feed.Delivery) {
			events := slices.Clone(d.Events)
			f(&events, d)
			d.Events = events
		}
	}
	drop := func(seq uint64) func(*feed.Delivery) {
		return edit(func(e *[]feed.Event, _ *feed.Delivery) {
			*e = slices.DeleteFunc(*e, func(e feed.Event) bool { return e.Seq == seq })
		})
	}
	for name, lie := range map[string]func(*feed.Delivery){
		"drops a revocation":            drop(10),
		"drops the newest":              drop(11),
		"drops a key's revocation":      drop(7),
		"drops a key":                   drop(5),
		"replaces a revocation":         edit(func(e *[]feed.Event, _ *feed.Delivery) { (*e)[len(*e)-2].Revocation = revokes(identity(99)).Revocation }),
		"moves a key below the horizon": edit(func(e *[]feed.Event, _ *feed.Delivery) { (*e)[3].Seq, (*e)[3].Sum = 3, feed.Sum{9} }),
		"another place of a revocation": edit(func(e *[]feed.Event, _ *feed.Delivery) {
			i := slices.IndexFunc(*e, func(e feed.Event) bool { return e.Seq == 7 })
			(*e)[i].Sum[0]++
		}),
		"adds a key below the horizon": edit(func(e *[]feed.Event, _ *feed.Delivery) { *e = slices.Insert(*e, 4, feed.Event{Seq: 8, Key: forged}) }),
		"adds a key above the head": edit(func(e *[]feed.Event, d *feed.Delivery) {
			x := next(d.Position, feed.Event{Key: forged})
			*e = append(*e, x)
			d.Position = feed.Position{Era: 1, Seq: x.Seq, Sum: x.Sum}
		}),
		"raises the horizon over a hole": edit(func(e *[]feed.Event, d *feed.Delivery) { drop(10)(d); *e = d.Events; d.Horizon = d.Position }),
		"another era":                    func(d *feed.Delivery) { d.Position.Era, d.Horizon.Era = 2, 2 },
		"another head":                   func(d *feed.Delivery) { d.Position.Sum[0]++ },
	} {
		t.Run(name, func(t *testing.T) {
			l := lived(t)
			d, _ := feed.NewCursor(feed.Position{}).Next(l, 100)
			lie(&d)
			var b behind
			err := b.deliver(d)
			if err == nil {
				err = b.signed(statement(l, [32]byte{}))
			}
			if b.view.Position() != (feed.Position{}) {
				t.Errorf("applied up to %s, %v", b.view.Position(), err)
			}
			if _, known := b.view.Key(forged.Public.ID); known {
				t.Error("a forged key is known")
			}
			if b.view.Err() != nil {
				t.Errorf("a lie of the relay is taken for a fork: %v", b.view.Err())
			}
			// On the next stream the truth is accepted.
			b.screen.Reconnected()
			if err := b.all(l, b.view.Position(), 100); err != nil {
				t.Fatal(err)
			}
			if err := b.signed(statement(l, [32]byte{})); err != nil || b.view.Position() != l.Head() {
				t.Errorf("then at %s, %v", b.view.Position(), err)
			}
		})
	}
}

// TestScreenPlaces: a record below the horizon that nothing signed covers, here of a key
// that is revoked, is let through to nobody: in another's place it would be a fork.
func TestScreenPlaces(t *testing.T) {
	l := lived(t)
	var b behind
	if err := errors.Join(b.all(l, feed.Position{}, 100), b.signed(statement(l, [32]byte{}))); err != nil {
		t.Fatal(err)
	}
	d, _ := feed.NewCursor(feed.Position{}).Next(l, 100)
	i := slices.IndexFunc(d.Events, func(e feed.Event) bool { return e.Seq == 6 })
	d.Events = slices.Clone(d.Events)
	d.Events[i].Sum[0]++ // of the stolen key
	if err := errors.Join(b.deliver(d), b.signed(statement(l, [32]byte{}))); err != nil || b.view.Err() != nil {
		t.Errorf("%v, fork %v", err, b.view.Err())
	}
}

// A key that a relay puts before all others looks like one that was retired: it is let
// go like one.
func TestScreenForgedRetired(t *testing.T) {
	l := lived(t)
	d, _ := feed.NewCursor(feed.Position{}).Next(l, 100)
	forged := fakeKey("forged")
	d.Events = slices.Insert(slices.Clone(d.Events), 0, feed.Event{Seq: 2, Key: forged})
	var b behind
	_ = b.deliver(d)
	_ = b.signed(statement(l, [32]byte{}))
	if _, known := b.view.Key(forged.Public.ID); known {
		t.Error("a forged key is known")
	}
}

func TestScreenTail(t *testing.T) {
	l := newLog(t, 3)
	fresh := func() *behind {
		var b behind
		if err := errors.Join(b.all(l, feed.Position{}, 100), b.signed(statement(l, [32]byte{}))); err != nil {
			t.Fatal(err)
		}
		return &b
	}
	e := next(l.Head(), revokes(identity(50)))
	later := next(feed.Position{Era: 1, Seq: e.Seq, Sum: e.Sum}, revokes(identity(51)))
	forged := next(l.Head(), feed.Event{Key: fakeKey("forged")})
	for name, c := range map[string]struct {
		events []feed.Event
		era    token.Era
		want   error
	}{
		"a hole":         {[]feed.Event{later}, 1, feed.ErrGap},
		"a broken chain": {[]feed.Event{{Seq: e.Seq, Sum: e.Sum, Revocation: later.Revocation}}, 1, feed.ErrUnproven},
		"another era":    {[]feed.Event{e}, 2, feed.ErrGap},
	} {
		b := fresh()
		if err := b.deliver(feed.Delivery{Events: c.events, Horizon: feed.Position{Era: c.era}}); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	b := fresh()
	if err := b.deliver(feed.Delivery{Events: []feed.Event{forged}, Horizon: l.Horizon()}); err != nil {
		t.Fatal(err)
	}
	add(t, l, revokes(identity(50)))
	if err := b.signed(statement(l, [32]byte{})); !errors.Is(err, feed.ErrUnproven) {
		t.Errorf("a forged record beside a signed one: %v", err)
	}
	if _, known := b.view.Key(fakeKey("forged").Public.ID); known || b.view.Err() != nil {
		t.Errorf("known %v, %v", known, b.view.Err())
	}
}

// TestRelayGathers: pings of those on other hosts go up as one, and come back to each with
// a proof of its own; through two relays too.
func TestRelayGathers(t *testing.T) {
	l := newLog(t, 2)
	var far, near feed.Relay // near is what the broker answers
	for _, r := range []*feed.Relay{&far, &near} {
		r.Connected(true)
		d, _ := feed.NewCursor(feed.Position{}).Next(l, 100)
		if err := r.Deliver(d, 0); err != nil {
			t.Fatal(err)
		}
	}
	follow := func(r *feed.Relay, name string, relays bool) *feed.Downstream {
		d, _, err := r.Follow(feed.Relayed{Path: []string{name}, Bound: time.Second, Audiences: []string{"a"}}, relays, 0)
		if err != nil {
			t.Fatal(err)
		}
		d.Distrust()
		return d
	}
	one, two := follow(&far, "verifier-1", false), follow(&far, "verifier-2", false)
	up := follow(&near, "relay-of-far", true)
	one.Ping("nonce-of-1")
	two.Ping("nonce-of-2")
	two.Ping("nonce-of-2-again")
	if far.Due(time.Minute, 1) != 0 {
		t.Error("they wait, and nothing is due")
	}
	farNonce := far.Gather("own-nonce-of-far")
	far.Ping(farNonce, 0)
	if len(farNonce) != 32 || farNonce == "own-nonce-of-far" {
		t.Fatalf("went up as %q", farNonce)
	}
	up.Ping(farNonce)
	nearNonce := near.Gather("own-nonce-of-near")
	near.Ping(nearNonce, 0)
	tree := feed.NewNonceTree([]string{"somebody's", nearNonce, "somebody else's"})
	s := statement(l, tree.Root())
	signed := feed.SignedHead{Statement: s.Encode()}

	answer := func(r *feed.Relay, nonce string, path feed.NoncePath) {
		r.Proved(nonce, signed, path)
		if err := r.Answered(nonce, s.Head, s.Age); err != nil {
			t.Fatal(err)
		}
	}
	answers := func(d *feed.Downstream) (out []*feed.Answer) {
		for m, ok := d.Next(0, 100); ok; m, ok = d.Next(0, 100) {
			if m.Answer != nil {
				out = append(out, m.Answer)
			}
		}
		return out
	}
	if got := answers(up); len(got) != 0 {
		t.Fatalf("answered before the broker was: %v", got)
	}
	answer(&near, nearNonce, tree.Path(1))
	got := answers(up)
	if len(got) != 1 || got[0].Nonce != farNonce {
		t.Fatalf("got %v", got)
	}
	answer(&far, farNonce, got[0].Path)
	for d, want := range map[*feed.Downstream][]string{one: {"nonce-of-1"}, two: {"nonce-of-2", "nonce-of-2-again"}} {
		var nonces []string
		for _, a := range answers(d) {
			nonces = append(nonces, a.Nonce)
			if proven, err := feed.VerifyAnswer(a.Nonce, a.Signed, a.Path, trusting); err != nil || proven != s {
				t.Errorf("%s: %+v, %v", a.Nonce, proven, err)
			}
		}
		if !reflect.DeepEqual(nonces, want) {
			t.Errorf("answered %q, want %q", nonces, want)
		}
	}
}

// What was under way when the stream above broke is asked again, and what nobody waits
// for any more isn't.
func TestRelayGathersAgain(t *testing.T) {
	var r feed.Relay
	r.Connected(true)
	var below []*feed.Downstream
	for _, name := range []string{"verifier-1", "verifier-2"} {
		d, _, err := r.Follow(feed.Relayed{Path: []string{name}, Bound: time.Second}, false, 0)
		if err != nil {
			t.Fatal(err)
		}
		d.Distrust()
		d.Ping("nonce-of-" + name)
		below = append(below, d)
	}
	first := r.Gather("own-nonce-1")
	below[1].Leave()
	r.Connected(true)
	want := feed.NewNonceTree([]string{"own-nonce-2", "nonce-of-verifier-1"}).Root()
	if got := r.Gather("own-nonce-2"); got != string(want[:]) || got == first {
		t.Errorf("went up as %x, want %x", got, want)
	}
	if got := r.Gather("own-nonce-3"); got != "own-nonce-3" {
		t.Errorf("nobody waits, and %x went up", got)
	}
	for i := range 200 {
		below[0].Ping(fmt.Sprint("nonce-", i))
	}
	n := 0
	for range 200 {
		if root := r.Gather("own"); root == "own" {
			break
		}
		n++
	}
	if n != 1 {
		t.Errorf("%d gatherings of one stream's pings", n)
	}
}

// A relay that pruned by a later horizon than the broker signed for isn't lying: its
// snapshot waits for the next signed head.
func TestScreenWaitsForHorizon(t *testing.T) {
	l := lived(t)
	old := statement(l, [32]byte{})
	l.SetHorizon(l.Head())
	l.Drop(func(e feed.Event) bool { return e.Seq == 10 })
	var b behind
	if err := errors.Join(b.all(l, feed.Position{}, 100), b.signed(old)); err != nil || b.view.Position() != (feed.Position{}) {
		t.Fatalf("at %s, %v", b.view.Position(), err)
	}
	if err := b.signed(statement(l, [32]byte{})); err != nil || b.view.Position() != l.Head() {
		t.Fatalf("at %s, %v", b.view.Position(), err)
	}
}

// A snapshot that claims the signed head and ends in another history.
func TestScreenOtherHistory(t *testing.T) {
	l := lived(t)
	d, _ := feed.NewCursor(feed.Position{}).Next(l, 100)
	d.Events = slices.Clone(d.Events)
	last := &d.Events[len(d.Events)-1]
	last.Revocation = revokes(identity(99)).Revocation
	last.Sum = last.Chain(d.Events[len(d.Events)-2].Sum)
	var b behind
	if err := b.deliver(d); err != nil {
		t.Fatal(err)
	}
	if err := b.signed(statement(l, [32]byte{})); !errors.Is(err, feed.ErrUnproven) || b.view.Position() != (feed.Position{}) {
		t.Errorf("at %s, %v", b.view.Position(), err)
	}
}
