package feed_test

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// fakeKey is the body of a key event whose bytes are no key: the log only hashes them.
func fakeKey(name string) *feed.Key {
	sum := sha256.Sum256([]byte(name))
	id, err := token.ParseKeyID(base64.RawURLEncoding.EncodeToString(sum[:6]))
	if err != nil {
		panic(err)
	}
	return &feed.Key{Public: token.PublicKey{ID: id, Algorithm: token.ES256}, DER: []byte(name), Signature: []byte("signature")}
}

func spiffeID(i int) spiffeid.ID {
	return spiffeid.RequireFromString(fmt.Sprintf("spiffe://example.org/ns/prod/sa/w%d", i))
}

func identity(i int) revocation.Selector { return revocation.Identity(spiffeID(i)) }

func grantID(n uint64) token.GrantID {
	id, err := token.GrantIDFromBytes(append(make([]byte, 10), binary.BigEndian.AppendUint64(nil, n)...))
	if err != nil {
		panic(err)
	}
	return id
}

func member(who int, grant uint64, key token.KeyID) token.Member {
	return token.Member{Identity: spiffeID(who), Grant: grantID(grant), Key: key}
}

func revokes(s ...revocation.Selector) feed.Event {
	return feed.Event{Revocation: &feed.Revocation{Selectors: s}}
}

// next numbers and chains an event behind a position.
func next(at feed.Position, e feed.Event) feed.Event {
	e.Seq = at.Seq + 1
	e.Sum = e.Chain(at.Sum)
	return e
}

// add appends an event to a log, numbered and chained.
func add(t testing.TB, l *feed.Log, e feed.Event) feed.Event {
	t.Helper()
	e = next(l.Head(), e)
	if err := l.Append(e); err != nil {
		t.Fatal(err)
	}
	return e
}

// newLog returns a log of era 1 with n revocations behind its first record.
func newLog(t testing.TB, n int) *feed.Log {
	t.Helper()
	l := new(feed.Log)
	add(t, l, feed.Event{Era: &feed.Era{Era: 1}})
	for i := range n {
		add(t, l, revokes(identity(i)))
	}
	return l
}
