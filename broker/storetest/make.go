package storetest

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// noon is when the things of these tests happen.
var noon = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

// Identity returns the i-th identity of the tests' trust domain.
func Identity(i int) spiffeid.ID {
	return spiffeid.RequireFromString(fmt.Sprintf("spiffe://example.org/ns/prod/sa/workload-%d", i))
}

// Grant makes the n-th grant, a root of one presenter, which expires at a time and
// stands at a position. It is the same for the same arguments.
func Grant(n int, presenter spiffeid.ID, expires time.Time, at feed.Position) *broker.Grant {
	issued := expires.Add(-5 * time.Minute)
	g := &broker.Grant{
		Lineage:     []token.Member{member(n, presenter, issued)},
		Audience:    "orders",
		Scopes:      []string{"orders:read", "orders:write"},
		Binding:     token.BindingSPIFFE,
		IssuedAt:    issued,
		Expires:     expires,
		Position:    at,
		Fingerprint: sha256.Sum256(binary.BigEndian.AppendUint64([]byte("token"), uint64(n))),
		Transaction: fmt.Sprintf("txn-%d", n),
		Peer:        netip.MustParseAddr("192.0.2.1"),
	}
	if n%2 == 1 {
		g.Peer = netip.Addr{}
		g.Binding = token.BindingX5T
		g.Certificate = sha256.Sum256([]byte("certificate"))
		g.Scopes = nil
	}
	return g
}

// Derive makes the n-th grant as a child of another, for another presenter.
func Derive(n int, parent *broker.Grant, presenter spiffeid.ID, at feed.Position) *broker.Grant {
	g := Grant(n, presenter, parent.Expires, at)
	g.Lineage = append(append([]token.Member(nil), parent.Lineage...), g.Lineage...)
	return g
}

func member(n int, id spiffeid.ID, at time.Time) token.Member {
	sum := sha256.Sum256(binary.BigEndian.AppendUint64([]byte("random"), uint64(n)))
	grant, err := token.NewGrantID(id, at, constant(sum[:7]))
	if err != nil {
		panic(fmt.Sprintf("internal error: making a grant ID: %v", err))
	}
	key, err := token.ParseKeyID("AAAAAAAA")
	if err != nil {
		panic(fmt.Sprintf("internal error: making a key ID: %v", err))
	}
	return token.Member{Identity: id, Grant: grant, Key: key, SVID: token.Thumbprint(sum[:16])}
}

// constant reads the same bytes for ever.
type constant []byte

func (c constant) Read(p []byte) (int, error) { return copy(p, c), nil }

// Revocation makes a record that revokes what the selectors match.
func Revocation(reason string, selectors ...revocation.Selector) broker.Record {
	return broker.Record{
		Event:   feed.Event{Revocation: &feed.Revocation{Selectors: selectors}},
		Details: broker.Details{Time: noon, Actor: "spiffe://example.org/operator", Reason: reason, Lock: broker.LockQuarantine},
	}
}

// Next returns what Append takes to append a record wherever the head is.
func Next(r broker.Record) func(feed.Position) (broker.Record, error) {
	return func(feed.Position) (broker.Record, error) { return r, nil }
}

// Admit lets every grant in.
func Admit([]broker.Record) error { return nil }
