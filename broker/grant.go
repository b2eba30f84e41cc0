package broker

import (
	"net/netip"
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A Grant is the record of one issued credential. It never holds the credential.
type Grant struct {
	// Lineage is root first; the last member is the grant's own.
	Lineage     []token.Member
	Audience    string
	Scopes      []string // sorted
	Binding     token.Binding
	Certificate [32]byte  // SHA-256 of the bound certificate, with x5t only
	IssuedAt    time.Time // whole seconds, UTC
	Expires     time.Time // whole seconds, UTC
	// Position is where locks and parent were read, as the token says.
	Position    feed.Position
	Fingerprint token.Fingerprint
	Transaction string
	// Peer is the address that asked; invalid on a unix socket.
	Peer netip.Addr
}

// ID returns the grant's own ID.
func (g *Grant) ID() token.GrantID { return g.Lineage[len(g.Lineage)-1].Grant }

// Presenter returns who may use the credential.
func (g *Grant) Presenter() spiffeid.ID { return g.Lineage[len(g.Lineage)-1].Identity }

// Parent returns the grant that this one derives from; zero for a root.
func (g *Grant) Parent() token.GrantID {
	if len(g.Lineage) < 2 {
		return token.GrantID{}
	}
	return g.Lineage[len(g.Lineage)-2].Grant
}

// Derived reports whether an exchange made the grant.
func (g *Grant) Derived() bool { return len(g.Lineage) > 1 }

// Subject returns what the rule of revocation needs.
func (g *Grant) Subject() revocation.Subject {
	return revocation.Subject{Position: g.Position.Token(), Audience: g.Audience, Lineage: g.Lineage}
}
