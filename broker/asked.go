package broker

import (
	"time"

	"github.com/dayflyhq/dayfly/proto/token"
)

// How a caller proved its identity, as the audit spells it.
const (
	attestedX509 = "x509"
	attestedJWT  = "jwt"
)

// An Asked is one question that policy was asked, and its answer: what it takes to ask
// another policy the same. It never holds a credential.
type Asked struct {
	Action      Action    `json:"action"`
	Time        time.Time `json:"time"`
	Attestation string    `json:"attestation"` // "x509" or "jwt"
	SVID        AskedSVID `json:"svid"`
	Peer        string    `json:"peer,omitempty"` // with its port

	Audience string        `json:"audience,omitempty"`
	Scopes   []string      `json:"scopes,omitempty"`
	TTL      time.Duration `json:"ttl_ns,omitempty"`
	Binding  token.Binding `json:"binding,omitempty"`
	Parent   *AskedParent  `json:"parent,omitempty"`

	Selectors []string `json:"selectors,omitempty"`
	Lock      LockMode `json:"lock,omitempty"`

	Verifier *AskedVerifier `json:"verifier,omitempty"`

	// Answer is absent where policy had none: none was in force, or it failed.
	Answer *Answer `json:"answer,omitempty"`
}

// AskedSVID is what policy is told of an SVID.
type AskedSVID struct {
	Serial    string    `json:"serial,omitempty"` // of a certificate, hexadecimal
	NotBefore time.Time `json:"not_before"`
	NotAfter  time.Time `json:"not_after"`
}

// AskedParent is what policy is told of a presented token.
type AskedParent struct {
	Audience string        `json:"audience"`
	Scopes   []string      `json:"scopes,omitempty"`
	Lineage  []AskedMember `json:"lineage"`
}

// AskedMember is one of a lineage, root first.
type AskedMember struct {
	Identity string `json:"identity"`
	Grant    string `json:"grant"`
	Key      string `json:"key"`
}

// AskedVerifier is what a follower promises.
type AskedVerifier struct {
	Audiences    []string      `json:"audiences,omitempty"`
	MaxStaleness time.Duration `json:"max_staleness_ns"`
	AcceptsStale bool          `json:"accepts_stale,omitempty"`
}

// An Answer is policy's, before the broker's caps, locks and limits.
type Answer struct {
	Allow   bool          `json:"allow"`
	Reason  string        `json:"reason,omitempty"` // policy's own
	Scopes  []string      `json:"scopes,omitempty"`
	TTL     time.Duration `json:"ttl_ns,omitempty"`
	Binding token.Binding `json:"binding,omitempty"`
}

// AskedOf writes down a question, without an answer yet.
func AskedOf(q Question) Asked {
	a := Asked{
		Action: q.Action, Time: q.Time.UTC(), Attestation: attestedJWT,
		Audience: q.Audience, Scopes: q.Scopes, TTL: q.TTL, Binding: q.Binding, Selectors: q.Selectors, Lock: q.Lock,
	}
	from, until := q.Caller.Attested()
	a.SVID = AskedSVID{NotBefore: from.UTC(), NotAfter: until.UTC()}
	if leaf := q.Caller.Leaf; leaf != nil {
		a.Attestation, a.SVID.Serial = attestedX509, leaf.SerialNumber.Text(16)
	}
	if q.Caller.Peer.IsValid() {
		a.Peer = q.Caller.Peer.String()
	}
	if q.Parent != nil {
		a.Parent = &AskedParent{Audience: q.Parent.Audience, Scopes: q.Parent.Scopes}
		for _, m := range q.Parent.Lineage {
			a.Parent.Lineage = append(a.Parent.Lineage, AskedMember{m.Identity.String(), m.Grant.String(), m.Key.String()})
		}
	}
	if q.Action == ActionFollow || q.Action == ActionRelay {
		a.Verifier = &AskedVerifier{q.Audiences, q.MaxStaleness, q.AcceptsStale}
	}
	return a
}

func answer(d Decision) *Answer {
	a := &Answer{Allow: d.Allow, Reason: d.Reason, Scopes: d.Scopes, TTL: d.TTL, Binding: d.Binding}
	if d.Allow {
		a.Reason = ""
	}
	return a
}
