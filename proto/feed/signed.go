package feed

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"google.golang.org/protobuf/encoding/protowire"
)

const (
	// MaxPathHashes bounds the hashes of a NoncePath: its index has 64 bits.
	MaxPathHashes = 64
	// MaxStatementBytes bounds a serialised HeadStatement, far above what one takes.
	MaxStatementBytes = 512
)

// ErrUnproven is wrapped by every complaint about what a relay on another host passed on
// and no signed head covers. It is the fault of the relay, and no proof of a fork.
var ErrUnproven = errors.New("not what the broker signed")

// A HeadStatement is what a broker's SVID signs of its log, for those whom relays on
// other hosts stand before.
type HeadStatement struct {
	Head, Horizon Position
	// KeySet is the KeySetDigest of the log at Head.
	KeySet [sha256.Size]byte
	// NonceRoot is the root of a NonceTree over the pings that waited: the statement
	// was made after each of them.
	NonceRoot [sha256.Size]byte
	// Age is how old the knowledge was when it was signed.
	Age time.Duration
	// SignedAt is the signer's clock, for people and for the validity of its SVID then.
	SignedAt time.Time
}

// A SignedHead is a serialised HeadStatement and the signature of a broker's SVID over
// HeadText of it. It is not verified by being one.
type SignedHead struct {
	Statement    []byte
	Signature    []byte
	Certificates [][]byte // leaf first, DER
}

// HeadText is what is signed: the statement, under a name that no other signature of the
// same key is made under, and for one issuer.
func HeadText(issuer string, statement []byte) []byte {
	return append([]byte("dayfly signed head 1\n"+issuer+"\n"), statement...)
}

// Encode returns the canonical bytes: a serialised dayfly.v1.HeadStatement, its fields in
// ascending order and zero values left out.
func (s HeadStatement) Encode() []byte {
	b := appendMessage(nil, 1, encodePosition(s.Head))
	b = appendMessage(b, 2, encodePosition(s.Horizon))
	b = appendMessage(b, 3, s.KeySet[:])
	b = appendMessage(b, 4, s.NonceRoot[:])
	b = appendMessage(b, 5, encodeTime(int64(s.Age/time.Second), int32(s.Age%time.Second)))
	return appendMessage(b, 6, encodeTime(s.SignedAt.Unix(), int32(s.SignedAt.Nanosecond())))
}

func appendMessage(b []byte, n protowire.Number, m []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), m)
}

func appendNumber(b []byte, n protowire.Number, v uint64) []byte {
	if v == 0 {
		return b
	}
	return protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), v)
}

func encodePosition(p Position) []byte {
	b := appendMessage(nil, 1, []byte(p.Era.String()))
	return appendMessage(appendNumber(b, 2, p.Seq), 3, p.Sum[:])
}

func encodeTime(seconds int64, nanos int32) []byte {
	return appendNumber(appendNumber(nil, 1, uint64(seconds)), 2, uint64(nanos))
}

// ParseHeadStatement reads canonical bytes, and no others: what is signed can be said in
// one way. Errors wrap ErrMalformed.
func ParseHeadStatement(b []byte) (HeadStatement, error) {
	bad := func(what string) (HeadStatement, error) {
		return HeadStatement{}, fmt.Errorf("%w: head statement: %s", ErrMalformed, what)
	}
	if len(b) > MaxStatementBytes {
		return bad("too large")
	}
	f, err := fields(b)
	if err != nil {
		return bad(err.Error())
	}
	var s HeadStatement
	if s.Head, err = decodePosition(f[1].bytes); err != nil {
		return bad("head: " + err.Error())
	}
	if s.Horizon, err = decodePosition(f[2].bytes); err != nil {
		return bad("horizon: " + err.Error())
	}
	copy(s.KeySet[:], f[3].bytes)
	copy(s.NonceRoot[:], f[4].bytes)
	seconds, nanos, err := decodeTime(f[5].bytes)
	if err != nil || seconds < 0 || nanos < 0 || seconds > int64(maxAge/time.Second) {
		return bad("an impossible age")
	}
	s.Age = time.Duration(seconds)*time.Second + time.Duration(nanos)
	if seconds, nanos, err = decodeTime(f[6].bytes); err != nil {
		return bad("an impossible time")
	}
	s.SignedAt = time.Unix(seconds, nanos).UTC()
	switch {
	case !bytes.Equal(s.Encode(), b):
		return bad("not in its canonical form")
	case s.Head.Era == 0 || s.Head.Seq == 0:
		return bad("no head")
	case s.Horizon.Era != s.Head.Era || s.Horizon.Compare(s.Head) > 0 || s.Horizon.ForkOf(s.Head):
		return bad("a horizon that is not of the head's log")
	}
	return s, nil
}

type field struct {
	bytes  []byte
	number uint64
}

// fields reads the last of each field, as protobuf does; what isn't canonical is noticed
// by encoding again.
func fields(b []byte) (map[protowire.Number]field, error) {
	out := map[protowire.Number]field{}
	for len(b) > 0 {
		n, kind, size := protowire.ConsumeTag(b)
		if size < 0 {
			return nil, protowire.ParseError(size)
		}
		b = b[size:]
		var f field
		switch kind {
		case protowire.BytesType:
			f.bytes, size = protowire.ConsumeBytes(b)
		case protowire.VarintType:
			f.number, size = protowire.ConsumeVarint(b)
		default:
			return nil, fmt.Errorf("field %d of an unknown kind", n)
		}
		if size < 0 {
			return nil, protowire.ParseError(size)
		}
		out[n], b = f, b[size:]
	}
	return out, nil
}

func decodePosition(b []byte) (Position, error) {
	f, err := fields(b)
	if err != nil {
		return Position{}, err
	}
	era, err := token.ParseEra(string(f[1].bytes))
	if err != nil {
		return Position{}, err
	}
	if len(f[3].bytes) != sha256.Size {
		return Position{}, errors.New("a sum of another size")
	}
	return Position{Era: era, Seq: f[2].number, Sum: Sum(f[3].bytes)}, nil
}

func decodeTime(b []byte) (seconds, nanos int64, err error) {
	f, err := fields(b)
	if err != nil {
		return 0, 0, err
	}
	if f[2].number >= uint64(time.Second) {
		return 0, 0, errors.New("too many nanoseconds")
	}
	return int64(f[1].number), int64(f[2].number), nil
}

// KeySetDigest returns the digest of the keys that the events of a log publish and don't
// revoke, and of the revocations of keys: SHA-256 over "dayfly key set 2" and of each event,
// the keys' first and both in the order of the log, its number (8 bytes, big-endian), its
// running hash, and what its running hash would be if it were the first of all. So nobody
// can give one of them another place than it has.
func KeySetDigest(events []Event) [sha256.Size]byte {
	keys, revocations := keySet(events)
	return digestKeySet(keys, revocations)
}

func digestKeySet(keys, revocations []Event) [sha256.Size]byte {
	h := sha256.New()
	h.Write([]byte("dayfly key set 2"))
	for _, e := range slices.Concat(keys, revocations) {
		content := e.Chain(Sum{})
		h.Write(binary.BigEndian.AppendUint64(nil, e.Seq))
		h.Write(e.Sum[:])
		h.Write(content[:])
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// keySet returns the events of keys that no event revokes, and those that revoke keys.
func keySet(events []Event) (keys, revocations []Event) {
	revoked := map[string]bool{}
	for _, e := range events {
		if !revokesKey(e) {
			continue
		}
		revocations = append(revocations, e)
		for _, s := range e.Revocation.Selectors {
			if s.Kind() == revocation.KindKey {
				revoked[s.Value()] = true
			}
		}
	}
	for _, e := range events {
		if e.Key != nil && !revoked[e.Key.Public.ID.String()] {
			keys = append(keys, e)
		}
	}
	return keys, revocations
}

func revokesKey(e Event) bool {
	return e.Revocation != nil && slices.ContainsFunc(e.Revocation.Selectors, func(s revocation.Selector) bool {
		return s.Kind() == revocation.KindKey
	})
}

// matchKeySet finds the key set among events that has a digest. The broker forgets retired
// keys, the oldest ones, which a relay may still pass on: they aren't in it.
func matchKeySet(events []Event, digest [sha256.Size]byte) (set []Event, ok bool) {
	keys, revocations := keySet(events)
	for i := range len(keys) + 1 {
		if digestKeySet(keys[i:], revocations) == digest {
			return slices.Concat(keys[i:], revocations), true
		}
	}
	return nil, false
}

func leafHash(b []byte) [sha256.Size]byte { return sha256.Sum256(append([]byte{0}, b...)) }

func nodeHash(left, right []byte) [sha256.Size]byte {
	return sha256.Sum256(slices.Concat([]byte{1}, left, right))
}

// A NonceTree is a Merkle tree (RFC 6962 hashing) over nonces, filled up with empty
// leaves to a power of two, so that the bits of a leaf's index say which side each
// sibling is on. An empty leaf is no nonce's: nonces have at least 8 bytes.
type NonceTree struct {
	levels [][][sha256.Size]byte // leaves first
}

// NewNonceTree makes the tree over at least one nonce.
func NewNonceTree(nonces []string) *NonceTree {
	size := 1
	for size < len(nonces) {
		size *= 2
	}
	level := make([][sha256.Size]byte, size)
	for i := range level {
		if i < len(nonces) {
			level[i] = leafHash([]byte(nonces[i]))
		} else {
			level[i] = leafHash(nil)
		}
	}
	t := &NonceTree{levels: [][][sha256.Size]byte{level}}
	for len(level) > 1 {
		above := make([][sha256.Size]byte, len(level)/2)
		for i := range above {
			above[i] = nodeHash(level[2*i][:], level[2*i+1][:])
		}
		t.levels = append(t.levels, above)
		level = above
	}
	return t
}

// Root returns the root: to a relay, the nonce of its own ping.
func (t *NonceTree) Root() [sha256.Size]byte { return t.levels[len(t.levels)-1][0] }

// Path returns the proof that nonce i is below the root.
func (t *NonceTree) Path(i int) NoncePath {
	p := NoncePath{Index: uint64(i)}
	for _, level := range t.levels[:len(t.levels)-1] {
		p.Hashes = append(p.Hashes, level[i^1][:])
		i /= 2
	}
	return p
}

// A NoncePath proves that a nonce is below a root: sibling hashes, leaf to root. An empty
// one is the top of a relay's tree: what was hashed so far was the nonce of that relay's
// own ping, and is a leaf of the next tree.
type NoncePath struct {
	Hashes [][]byte
	// Index of the leaf; the indexes of the trees above follow in its higher bits.
	Index uint64
}

// Under composes the path of a nonce in a relay's tree with the path of that tree's root.
// Errors wrap ErrMalformed: together they may be too long.
func (p NoncePath) Under(above NoncePath) (NoncePath, error) {
	low, high := p.bits(), above.bits()
	if low+high > MaxPathHashes || len(p.Hashes)+len(above.Hashes) >= 2*MaxPathHashes {
		return NoncePath{}, fmt.Errorf("%w: a nonce path of %d hashes", ErrMalformed, low+high)
	}
	hashes := append(slices.Clone(p.Hashes), []byte{})
	return NoncePath{Hashes: append(hashes, above.Hashes...), Index: p.Index | above.Index<<low}, nil
}

func (p NoncePath) bits() int {
	n := 0
	for _, h := range p.Hashes {
		if len(h) > 0 {
			n++
		}
	}
	return n
}

// Root returns the root that the path leads to from a nonce. Errors wrap ErrMalformed.
func (p NoncePath) Root(nonce string) ([sha256.Size]byte, error) {
	at := leafHash([]byte(nonce))
	bits := p.bits()
	if bits > MaxPathHashes || len(p.Hashes) > 2*MaxPathHashes || bits < 64 && p.Index>>bits != 0 {
		return at, fmt.Errorf("%w: an impossible nonce path", ErrMalformed)
	}
	index := p.Index
	for _, h := range p.Hashes {
		switch {
		case len(h) == 0:
			at = leafHash(at[:])
			continue
		case len(h) != sha256.Size:
			return at, fmt.Errorf("%w: a nonce path with a hash of %d bytes", ErrMalformed, len(h))
		case index&1 == 0:
			at = nodeHash(at[:], h)
		default:
			at = nodeHash(h, at[:])
		}
		index >>= 1
	}
	return at, nil
}

// VerifyAnswer checks a signed head as the answer to a ping: verify, which says whether a
// broker of this issuer signed it and returns the statement, and then that the nonce was
// there when it did. Errors wrap ErrUnproven. What it returns proves: everything committed
// before the ping was sent, less the statement's age, is at or below its head.
func VerifyAnswer(nonce string, h SignedHead, path NoncePath, verify func(SignedHead) (HeadStatement, error)) (HeadStatement, error) {
	if len(h.Statement) == 0 {
		return HeadStatement{}, fmt.Errorf("%w: an answer without a signed head", ErrUnproven)
	}
	s, err := verify(h)
	if err != nil {
		return HeadStatement{}, fmt.Errorf("%w: %w", ErrUnproven, err)
	}
	root, err := path.Root(nonce)
	if err != nil {
		return HeadStatement{}, fmt.Errorf("%w: %w", ErrUnproven, err)
	}
	if root != s.NonceRoot {
		return HeadStatement{}, fmt.Errorf("%w: the signed head answers another ping", ErrUnproven)
	}
	return s, nil
}

// Newest keeps the newest signed head of those it is given, to be shown to a broker that
// may have lost records since. The zero value holds none.
type Newest struct {
	Head   Position
	Signed SignedHead
	at     time.Time
}

// Note takes a signed head; who gave it, or a check before, must be trusted. One that
// can't be read is left alone.
func (n *Newest) Note(h SignedHead) {
	s, err := ParseHeadStatement(h.Statement)
	if err != nil {
		return
	}
	// Of one head the statement that was signed last is provable for longest.
	if c := s.Head.Compare(n.Head); c > 0 || c == 0 && s.SignedAt.After(n.at) {
		n.Head, n.Signed, n.at = s.Head, h, s.SignedAt
	}
}
