package boltstore

import (
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// The stored forms. Each value begins with its version, every length stands before
// what it measures, and there is one encoding of a thing: what decodes, encodes to
// the same bytes again.
const (
	grantVersion = 1
	entryVersion = 1
)

// Kinds of an entry of the log.
const (
	entryDropped    = 0
	entryRevocation = 1
	entryLift       = 2
	entryKey        = 3
	entryEra        = 4
)

var errEncoding = errors.New("malformed encoding")

// An entry is what the log bucket holds for one number: a record, or of a dropped
// one only its place in the log, which positions and the chain still need.
type entry struct {
	position feed.Position
	dropped  bool
	record   broker.Record
}

type encoder []byte

func (e *encoder) byte(b byte)      { *e = append(*e, b) }
func (e *encoder) fixed(b []byte)   { *e = append(*e, b...) }
func (e *encoder) uint32(n uint32)  { *e = binary.BigEndian.AppendUint32(*e, n) }
func (e *encoder) uint64(n uint64)  { *e = binary.BigEndian.AppendUint64(*e, n) }
func (e *encoder) count(n int)      { *e = binary.AppendUvarint(*e, uint64(n)) }
func (e *encoder) bytes(b []byte)   { e.count(len(b)); *e = append(*e, b...) }
func (e *encoder) string(s string)  { e.count(len(s)); *e = append(*e, s...) }
func (e *encoder) time(t time.Time) { e.uint64(uint64(t.Unix())) }

func (e *encoder) position(p feed.Position) {
	e.uint32(uint32(p.Era))
	e.uint64(p.Seq)
	e.fixed(p.Sum[:])
}

// A decoder reads what an encoder wrote. After the first error it yields zeros.
type decoder struct {
	rest []byte
	err  error
}

func (d *decoder) fail(what string) {
	if d.err == nil {
		d.err = fmt.Errorf("%w: %s", errEncoding, what)
	}
	d.rest = nil
}

// fixed returns the next n bytes, which die with the transaction.
func (d *decoder) fixed(n int) []byte {
	if n < 0 || n > len(d.rest) {
		d.fail("too short")
		return make([]byte, max(0, min(n, 64)))
	}
	b := d.rest[:n]
	d.rest = d.rest[n:]
	return b
}

func (d *decoder) byte() byte     { return d.fixed(1)[0] }
func (d *decoder) uint32() uint32 { return binary.BigEndian.Uint32(d.fixed(4)) }
func (d *decoder) uint64() uint64 { return binary.BigEndian.Uint64(d.fixed(8)) }

// count reads a number of things of which each takes at least a byte.
func (d *decoder) count() int {
	n, size := binary.Uvarint(d.rest)
	switch {
	case size <= 0, size > 1 && d.rest[size-1] == 0:
		d.fail("bad length")
		return 0
	case n > uint64(len(d.rest)-size):
		d.fail("length beyond the end")
		return 0
	}
	d.rest = d.rest[size:]
	return int(n)
}

func (d *decoder) bytes() []byte {
	if b := d.fixed(d.count()); len(b) > 0 {
		return append([]byte(nil), b...)
	}
	return nil
}

func (d *decoder) string() string  { return string(d.fixed(d.count())) }
func (d *decoder) time() time.Time { return time.Unix(int64(d.uint64()), 0).UTC() }

func (d *decoder) position() feed.Position {
	return feed.Position{Era: token.Era(d.uint32()), Seq: d.uint64(), Sum: feed.Sum(d.fixed(32))}
}

func (d *decoder) version(want byte) {
	if got := d.byte(); d.err == nil && got != want {
		d.fail(fmt.Sprintf("version %d, not %d", got, want))
	}
}

func (d *decoder) end() error {
	if len(d.rest) > 0 {
		d.fail("bytes after the end")
	}
	return d.err
}

func decodeUsing[T any](d *decoder, parse func(string) (T, error)) T {
	var zero T
	s := d.string()
	if d.err != nil {
		return zero
	}
	v, err := parse(s)
	if err != nil {
		d.fail(err.Error())
		return zero
	}
	return v
}

func encodePosition(p feed.Position) []byte {
	var e encoder
	e.position(p)
	return e
}

func decodePosition(b []byte) (feed.Position, error) {
	d := &decoder{rest: b}
	p := d.position()
	return p, d.end()
}

// encodeGrant refuses what it could not give back unchanged.
func encodeGrant(g *broker.Grant) ([]byte, error) {
	switch {
	case len(g.Lineage) == 0:
		return nil, errors.New("a grant has a lineage")
	case g.ID().IsZero():
		return nil, errors.New("a grant has an ID")
	case g.IssuedAt.Nanosecond() != 0 || g.Expires.Nanosecond() != 0:
		return nil, errors.New("the times of a grant are whole seconds")
	}
	e := make(encoder, 0, 512)
	e.byte(grantVersion)
	e.count(len(g.Lineage))
	for _, m := range g.Lineage {
		e.string(m.Identity.String())
		e.fixed(m.Grant.Bytes())
		e.string(m.Key.String())
		e.fixed(m.SVID[:])
	}
	e.string(g.Audience)
	e.count(len(g.Scopes))
	for _, s := range g.Scopes {
		e.string(s)
	}
	e.string(string(g.Binding))
	if g.Certificate == [32]byte{} {
		e.bytes(nil)
	} else {
		e.bytes(g.Certificate[:])
	}
	e.time(g.IssuedAt)
	e.time(g.Expires)
	e.position(g.Position)
	e.fixed(g.Fingerprint[:])
	e.string(g.Transaction)
	peer, err := g.Peer.MarshalBinary()
	if err != nil {
		return nil, fmt.Errorf("encoding peer: %w", err)
	}
	e.bytes(peer)
	return e, nil
}

func decodeGrant(b []byte) (*broker.Grant, error) {
	d := &decoder{rest: b}
	d.version(grantVersion)
	g := &broker.Grant{}
	members := d.count()
	if d.err == nil && members == 0 {
		d.fail("no lineage")
	}
	for range members {
		g.Lineage = append(g.Lineage, d.member())
	}
	g.Audience = d.string()
	for range d.count() {
		g.Scopes = append(g.Scopes, d.string())
	}
	g.Binding = token.Binding(d.string())
	g.Certificate = d.certificate()
	g.IssuedAt = d.time()
	g.Expires = d.time()
	g.Position = d.position()
	g.Fingerprint = token.Fingerprint(d.fixed(32))
	g.Transaction = d.string()
	g.Peer = d.peer()
	if err := d.end(); err != nil {
		return nil, fmt.Errorf("decoding grant: %w", err)
	}
	if g.ID().IsZero() {
		return nil, fmt.Errorf("decoding grant: %w: no ID", errEncoding)
	}
	return g, nil
}

func (d *decoder) member() token.Member {
	var m token.Member
	m.Identity = decodeUsing(d, parseIdentity)
	id, err := token.GrantIDFromBytes(d.fixed(18))
	if err != nil {
		d.fail(err.Error())
	}
	m.Grant = id
	m.Key = decodeUsing(d, parseKeyID)
	m.SVID = token.Thumbprint(d.fixed(16))
	return m
}

func parseIdentity(s string) (spiffeid.ID, error) {
	if s == "" {
		return spiffeid.ID{}, nil
	}
	id, err := spiffeid.FromString(s)
	if err == nil && id.String() != s {
		err = errors.New("not the spelling of a SPIFFE ID")
	}
	return id, err
}

func parseKeyID(s string) (token.KeyID, error) {
	if s == "" {
		return token.KeyID{}, nil
	}
	return token.ParseKeyID(s)
}

func (d *decoder) certificate() (sum [32]byte) {
	b := d.bytes()
	switch {
	case len(b) == 0:
		return sum
	case len(b) != len(sum):
		d.fail("certificate is no SHA-256")
		return sum
	}
	sum = [32]byte(b)
	if sum == [32]byte{} {
		d.fail("certificate of zeros")
	}
	return sum
}

func (d *decoder) peer() netip.Addr {
	b := d.bytes()
	var a netip.Addr
	if err := a.UnmarshalBinary(b); err != nil {
		d.fail(err.Error())
	}
	if again, err := a.MarshalBinary(); err != nil || string(again) != string(b) {
		d.fail("not the spelling of an address")
	}
	return a
}

// encodeRecord encodes a sealed record of an era.
func encodeRecord(r broker.Record, era token.Era) ([]byte, error) {
	details, err := json.Marshal(r.Details)
	if err != nil {
		return nil, fmt.Errorf("encoding details: %w", err)
	}
	e := make(encoder, 0, 512)
	e.byte(entryVersion)
	e.position(feed.Position{Era: era, Seq: r.Seq, Sum: r.Sum})
	switch {
	case r.Revocation != nil:
		e.byte(entryRevocation)
		e.count(len(r.Revocation.Selectors))
		for _, s := range r.Revocation.Selectors {
			e.string(s.String())
		}
	case r.Lift != nil:
		e.byte(entryLift)
		e.uint64(r.Lift.Lock)
	case r.Key != nil:
		e.byte(entryKey)
		e.string(string(r.Key.Public.Algorithm))
		e.bytes(r.Key.DER)
		e.bytes(r.Key.Signature)
		e.count(len(r.Key.Certificates))
		for _, c := range r.Key.Certificates {
			e.bytes(c)
		}
	case r.Era != nil:
		e.byte(entryEra)
		e.uint32(uint32(r.Era.Era))
	default:
		return nil, errors.New("a record has a body")
	}
	e.fixed(r.Private[:])
	e.bytes(details)
	return e, nil
}

func encodeDropped(p feed.Position) []byte {
	var e encoder
	e.byte(entryVersion)
	e.position(p)
	e.byte(entryDropped)
	return e
}

func decodeEntry(b []byte) (entry, error) {
	d := &decoder{rest: b}
	d.version(entryVersion)
	var en entry
	en.position = d.position()
	r := &en.record
	r.Seq, r.Sum = en.position.Seq, en.position.Sum
	switch kind := d.byte(); {
	case d.err != nil:
	case kind == entryDropped:
		en.dropped = true
		en.record = broker.Record{}
	case kind == entryRevocation:
		r.Revocation = d.revocation()
	case kind == entryLift:
		r.Lift = &feed.Lift{Lock: d.uint64()}
	case kind == entryKey:
		r.Key = d.key()
	case kind == entryEra:
		r.Era = &feed.Era{Era: token.Era(d.uint32())}
	default:
		d.fail(fmt.Sprintf("kind %d", kind))
	}
	if !en.dropped {
		r.Private = [32]byte(d.fixed(32))
		r.Details = d.details()
	}
	if err := d.end(); err != nil {
		return entry{}, fmt.Errorf("decoding record: %w", err)
	}
	return en, nil
}

func (d *decoder) revocation() *feed.Revocation {
	rev := &feed.Revocation{}
	for range d.count() {
		s := decodeUsing(d, parseSelector)
		rev.Selectors = append(rev.Selectors, s)
	}
	return rev
}

func parseSelector(s string) (revocation.Selector, error) {
	sel, err := revocation.Parse(s)
	if err == nil && sel.String() != s {
		err = errors.New("not the spelling of a selector")
	}
	return sel, err
}

func (d *decoder) key() *feed.Key {
	k := &feed.Key{}
	alg := token.Algorithm(d.string())
	k.DER = d.bytes()
	k.Signature = d.bytes()
	for range d.count() {
		k.Certificates = append(k.Certificates, d.bytes())
	}
	if d.err != nil {
		return k
	}
	pub, err := x509.ParsePKIXPublicKey(k.DER)
	if err != nil {
		d.fail(err.Error())
		return k
	}
	if k.Public, err = token.NewPublicKey(alg, pub); err != nil {
		d.fail(err.Error())
	}
	return k
}

func (d *decoder) details() (det broker.Details) {
	b := d.bytes()
	if d.err != nil {
		return det
	}
	if err := json.Unmarshal(b, &det); err != nil {
		d.fail("details: " + err.Error())
		return det
	}
	// One spelling only: the digest of the record is over these very bytes.
	if again, err := json.Marshal(det); err != nil || string(again) != string(b) {
		d.fail("details: not the spelling of what they say")
	}
	return det
}
