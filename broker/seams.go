package broker

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"net/netip"
	"time"

	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A Caller is whoever it proved to be, and nothing else that a request says. A workload
// has either Leaf or JWT.
type Caller struct {
	ID   spiffeid.ID
	Leaf *x509.Certificate // X.509-SVID of the connection; nil for a JWT-SVID and over the break-glass socket
	JWT  *JWTSVID          // what it showed instead of a certificate
	Peer netip.AddrPort    // invalid on a unix socket
	// Local names the caller of the break-glass socket, "break-glass:uid=0". Policy is
	// not asked for it, and the records say so.
	Local string
}

// A JWTSVID is what is known of a caller without a certificate: whoever holds the
// document is taken for its subject until it expires.
type JWTSVID struct{ IssuedAt, Expires time.Time }

// Attested says from when to when the caller's SVID is good. Both are zero without one.
func (c Caller) Attested() (from, until time.Time) {
	switch {
	case c.Leaf != nil:
		return c.Leaf.NotBefore, c.Leaf.NotAfter
	case c.JWT != nil:
		return c.JWT.IssuedAt, c.JWT.Expires
	}
	return time.Time{}, time.Time{}
}

// Actor is how the records name the caller.
func (c Caller) Actor() string {
	if c.Local != "" {
		return c.Local
	}
	return c.ID.String()
}

func (c Caller) thumbprint() token.Thumbprint {
	if c.Leaf == nil {
		return token.Thumbprint{}
	}
	return token.ThumbprintOf(c.Leaf)
}

// certificate is zero for a caller without one.
func (c Caller) certificate() [32]byte {
	if c.Leaf == nil {
		return [32]byte{}
	}
	return sha256.Sum256(c.Leaf.Raw)
}

// An Action is what policy is asked about.
type Action string

// The actions.
const (
	ActionIssue            Action = "issue"
	ActionExchange         Action = "exchange"
	ActionFollow           Action = "follow"
	ActionRelay            Action = "relay"
	ActionReport           Action = "report"
	ActionRevoke           Action = "revoke"
	ActionRevokeEverything Action = "revoke_everything"
	ActionLift             Action = "lift"
	ActionLiftConfirm      Action = "lift_confirm"
	ActionList             Action = "list"
	ActionPlan             Action = "plan"
	ActionGiveBack         Action = "give_back"
	ActionIntrospect       Action = "introspect"
	ActionBackup           Action = "backup"    // over the break-glass socket only
	ActionRestore          Action = "restore"   // audited at the first start after it
	ActionHandOver         Action = "hand_over" // over the break-glass socket only
)

// A Question is put to policy at every request.
type Question struct {
	Action   Action
	Caller   Caller
	Time     time.Time
	Audience string
	Scopes   []string
	TTL      time.Duration
	Binding  token.Binding // "" leaves it to policy
	// Parent is the presented token of an exchange, or the one to be given back or
	// introspected.
	Parent *token.Claims
	// Selectors and Lock are those of a revocation.
	Selectors []string
	Lock      LockMode
	// Verifier is who wants to follow.
	Audiences    []string
	MaxStaleness time.Duration
	AcceptsStale bool
}

// A Decision is policy's answer. The zero value denies.
type Decision struct {
	Allow   bool
	Scopes  []string
	TTL     time.Duration
	Binding token.Binding
	// Reason, Message, Hint and Metadata say why not.
	Reason   string
	Message  string
	Hint     string
	Metadata map[string]string
	// Limits of the caller are for issue, exchange and give_back.
	Limits Limits
	// SecondPerson is for lifts and for revocations of everything.
	SecondPerson SecondPerson
	// Rule and Data say what decided, Revision of which policy, for the audit.
	Rule     string
	Data     []string
	Revision string
}

// SecondPerson is what policy says of calls that take two persons. It is set whatever
// the decision.
type SecondPerson struct {
	// Required: a lift only proposes, and another operator confirms. A revocation of
	// everything always takes two.
	Required bool
	// Within is how long a proposal waits; 0: 15 minutes.
	Within time.Duration
	// Confirmers are patterns of identities that may confirm, to be told to who proposes.
	Confirmers []string
}

// How an audience verifies. The feed's verifiers learn a key at once, and who introspects
// asks this broker; the others have what they last read of the JWK set.
const (
	VerifiedByFeed          = "feed"
	VerifiedByIntrospection = "introspection"
	VerifiedByExternal      = "external"
)

// An Audience is what policy data declares of one.
type Audience struct {
	Name       string
	Owner      string
	VerifiedBy string // VerifiedByFeed, VerifiedByIntrospection or VerifiedByExternal
	// MaxStaleness is the largest bound its verifiers may have; 0: no limit of its own.
	MaxStaleness time.Duration
	Fallback     Fallback
}

// A Fallback is what an owner documented for the time without credentials.
type Fallback struct{ Owner, Text, Link string }

// Policy is what the broker asks of policy: evaluated at every call, never cached.
type Policy interface {
	// Decide answers one question. An error refuses: with ErrNoPolicy, if it wraps that,
	// else with ErrPolicyFailed.
	Decide(ctx context.Context, q Question) (Decision, error)
	// AnswersTo reports whether data assigns the audience name to the identity.
	AnswersTo(id spiffeid.ID, audience string) bool
	Audience(name string) (Audience, bool)
	// External returns every audience that data declares to be outside the feed and not to
	// introspect; one with placeholders as it is written.
	External() []Audience
	// Fallback is what a caller does without credentials for an audience: its own, where
	// data has one, else the audience's.
	Fallback(caller spiffeid.ID, audience string) Fallback
}

// A Signer signs with a key that is published.
type Signer struct {
	Public token.PublicKey
	// SpreadIn is how long those who only read the JWK set may still use a copy without
	// this key; zero: each has it.
	SpreadIn time.Duration
	Sign     func(token.Unsigned) (token.Secret, error)
}

// PrivateSigner makes a Signer of a private key.
func PrivateSigner(pub token.PublicKey, key crypto.Signer) Signer {
	return Signer{Public: pub, Sign: func(u token.Unsigned) (token.Secret, error) { return u.Sign(key) }}
}

// An AuditEntry is one decision, denial or operator's call. It never holds a
// credential.
type AuditEntry struct {
	Time   time.Time `json:"time"`
	Action Action    `json:"action"`
	Actor  string    `json:"actor"`
	Peer   string    `json:"peer,omitempty"`
	// Attestation is "jwt" where the actor showed a JWT-SVID, and not a certificate.
	Attestation string   `json:"attestation,omitempty"`
	Outcome     string   `json:"outcome"` // "allowed", "refused", "proposed" or "alarm"
	Reason      string   `json:"reason,omitempty"`
	Message     string   `json:"message,omitempty"`
	Rule        string   `json:"rule,omitempty"`
	Revision    string   `json:"revision,omitempty"` // of the policy that decided
	Audience    string   `json:"audience,omitempty"`
	Scopes      []string `json:"scopes,omitempty"`
	// TTL and Binding are of what was given, or can't be released; see Asked for what
	// was asked for.
	TTL      time.Duration `json:"ttl_ns,omitempty"`
	Binding  token.Binding `json:"binding,omitempty"`
	Grant    string        `json:"grant,omitempty"`
	Parent   string        `json:"parent,omitempty"`
	Sequence uint64        `json:"sequence,omitempty"`
	Selector []string      `json:"selectors,omitempty"`
	Lock     LockMode      `json:"lock,omitempty"`
	Why      string        `json:"why,omitempty"` // the operator's own words
	// ProposedBy is the first of two persons; Actor is the second.
	ProposedBy string `json:"proposed_by,omitempty"`
	Alert      bool   `json:"alert,omitempty"`
	// Asked are the questions that policy was asked for this, with its answers.
	Asked []Asked `json:"asked,omitempty"`
}
