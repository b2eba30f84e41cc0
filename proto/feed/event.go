package feed

import (
	"cmp"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
)

// An Instant is time elapsed on a local clock that runs through suspend
// (CLOCK_BOOTTIME). Instants of different machines or boots don't compare.
type Instant time.Duration

// Add returns the instant d later.
func (i Instant) Add(d time.Duration) Instant { return i + Instant(d) }

// Sub returns the time from j to i.
func (i Instant) Sub(j Instant) time.Duration { return time.Duration(i - j) }

// A Sum is the log's running hash after a record.
type Sum [sha256.Size]byte

// Short returns the 8 bytes that tokens carry.
func (s Sum) Short() [8]byte { return [8]byte(s[:8]) }

func (s Sum) String() string { return hex.EncodeToString(s[:]) }

// A Position is a place in the log. The zero value is before any era.
type Position struct {
	Era token.Era
	Seq uint64
	Sum Sum
}

// Compare orders positions by era, then by number; sums don't order.
func (p Position) Compare(q Position) int {
	return cmp.Or(cmp.Compare(p.Era, q.Era), cmp.Compare(p.Seq, q.Seq))
}

// ForkOf reports whether p and q are the same number of the same era with different
// histories.
func (p Position) ForkOf(q Position) bool {
	return p.Compare(q) == 0 && p.Sum != q.Sum
}

// Token returns the position in the form that a token carries.
func (p Position) Token() token.Position {
	return token.Position{Era: p.Era, Rev: p.Seq, Sum: p.Sum.Short()}
}

func (p Position) String() string {
	return fmt.Sprintf("%s/%d/%x", p.Era, p.Seq, p.Sum[:4])
}

// MarshalText writes a position whole, for JSON: era, number, sum.
func (p Position) MarshalText() ([]byte, error) {
	return fmt.Appendf(nil, "%s/%d/%s", p.Era, p.Seq, p.Sum), nil
}

// UnmarshalText reads what MarshalText writes, and nothing else.
func (p *Position) UnmarshalText(text []byte) error {
	parts := strings.Split(string(text), "/")
	if len(parts) != 3 {
		return errors.New("a position is ERA/NUMBER/SUM")
	}
	era, errEra := strconv.ParseUint(parts[0], 16, 32)
	seq, errSeq := strconv.ParseUint(parts[1], 10, 64)
	sum, errSum := hex.DecodeString(parts[2])
	if err := errors.Join(errEra, errSeq, errSum); err != nil {
		return fmt.Errorf("reading a position: %w", err)
	}
	read := Position{Era: token.Era(era), Seq: seq}
	copy(read.Sum[:], sum)
	if again, _ := read.MarshalText(); string(again) != string(text) {
		return errors.New("the position has another spelling")
	}
	*p = read
	return nil
}

// An Event is the public part of one record of the log: exactly one of the four
// bodies is set.
type Event struct {
	Seq uint64
	// Private is the SHA-256 of what verifiers don't get to see: who, why, when.
	Private [sha256.Size]byte
	// Sum is the running hash after this event.
	Sum Sum

	Revocation *Revocation
	Lift       *Lift
	Key        *Key
	Era        *Era
}

// A Revocation kills what its selectors match.
type Revocation struct{ Selectors []revocation.Selector }

// A Lift ends a lock. It changes nothing for a verifier but the position.
type Lift struct{ Lock uint64 }

// A Key publishes a signing key, vouched for by the SVID of the broker that made it.
type Key struct {
	Public token.PublicKey
	// DER is the SubjectPublicKeyInfo of Public.
	DER          []byte
	Certificates [][]byte // X.509-SVID, leaf first, DER
	Signature    []byte   // by the leaf's key over KeyStatement
}

// An Era begins an era; every key and token of earlier ones is dead. It is the first
// record of its era.
type Era struct{ Era token.Era }

// ErrMalformed is wrapped by every complaint about an event or a delivery that
// contradicts itself: the fault of who sent or stored it, and no proof of a fork.
var ErrMalformed = errors.New("malformed event")

// Validate checks the event's form, not its place in the log.
func (e *Event) Validate() error {
	bodies := 0
	for _, set := range []bool{e.Revocation != nil, e.Lift != nil, e.Key != nil, e.Era != nil} {
		if set {
			bodies++
		}
	}
	switch {
	case bodies != 1:
		return fmt.Errorf("%w: %d bodies", ErrMalformed, bodies)
	case e.Seq == 0:
		return fmt.Errorf("%w: number 0", ErrMalformed)
	case e.Revocation != nil && len(e.Revocation.Selectors) == 0:
		return fmt.Errorf("%w: no selector", ErrMalformed)
	case e.Revocation != nil && slices.Contains(e.Revocation.Selectors, revocation.Selector{}):
		return fmt.Errorf("%w: a selector of nothing", ErrMalformed)
	case e.Lift != nil && (e.Lift.Lock == 0 || e.Lift.Lock >= e.Seq):
		return fmt.Errorf("%w: lift of no earlier lock", ErrMalformed)
	case e.Key != nil && e.Key.Public.ID.String() != keyID(e.Key.DER):
		// The running hash covers the bytes of the key, so its ID must follow from them.
		return fmt.Errorf("%w: the ID of key %q is not that of its bytes", ErrMalformed, e.Key.Public.ID)
	case e.Era != nil && e.Era.Era == 0:
		return fmt.Errorf("%w: era 0", ErrMalformed)
	}
	return nil
}

// keyID returns the text of the ID that token.KeyIDOf gives the key in der.
func keyID(der []byte) string {
	sum := sha256.Sum256(der)
	return base64.RawURLEncoding.EncodeToString(sum[:6])
}

// ParseKey makes the body of a key event from its wire form: the key itself and its
// ID follow from the bytes, so nothing can be said of them twice. Whether the
// signature vouches for it is for the caller to check. Errors wrap ErrMalformed.
func ParseKey(alg token.Algorithm, der []byte, certificates [][]byte, signature []byte) (*Key, error) {
	parsed, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return nil, fmt.Errorf("%w: reading a signing key: %w", ErrMalformed, err)
	}
	public, err := token.NewPublicKey(alg, parsed)
	if err != nil {
		return nil, fmt.Errorf("%w: reading a signing key: %w", ErrMalformed, err)
	}
	if public.ID.String() != keyID(der) {
		return nil, fmt.Errorf("%w: a signing key in a second spelling", ErrMalformed)
	}
	return &Key{Public: public, DER: der, Certificates: certificates, Signature: signature}, nil
}

// Chain returns the running hash after e, given the one before: SHA-256 over
// "dayfly log 1", the previous sum, the number (8 bytes, big-endian), the private
// digest, and the body as a name and fields, each with its length before it.
func (e *Event) Chain(previous Sum) Sum {
	h := sha256.New()
	h.Write([]byte("dayfly log 1"))
	h.Write(previous[:])
	var num [8]byte
	h.Write(binary.BigEndian.AppendUint64(num[:0], e.Seq))
	h.Write(e.Private[:])
	for _, f := range e.fields() {
		h.Write(binary.BigEndian.AppendUint32(num[:0], uint32(len(f))))
		h.Write(f)
	}
	return Sum(h.Sum(nil))
}

func (e *Event) fields() [][]byte {
	switch {
	case e.Revocation != nil:
		f := [][]byte{[]byte("revocation")}
		for _, s := range e.Revocation.Selectors {
			f = append(f, []byte(s.String()))
		}
		return f
	case e.Lift != nil:
		return [][]byte{[]byte("lift"), binary.BigEndian.AppendUint64(nil, e.Lift.Lock)}
	case e.Key != nil:
		f := [][]byte{[]byte("key"), []byte(e.Key.Public.Algorithm), e.Key.DER, e.Key.Signature}
		return append(f, e.Key.Certificates...)
	case e.Era != nil:
		return [][]byte{[]byte("era"), []byte(e.Era.Era.String())}
	}
	return nil
}

// KeyStatement is what a broker's SVID signs to vouch for a signing key.
func KeyStatement(issuer string, key token.PublicKey, der []byte) []byte {
	b := []byte("dayfly signing key 1\n" + issuer + "\n" + key.ID.String() + "\n" + string(key.Algorithm) + "\n")
	return append(b, der...)
}
