package wire

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/durationpb"
)

// Limits of what is read.
const (
	// MaxSelectors bounds the selectors of one revocation.
	MaxSelectors = 256
	// MaxCertificates bounds the chain that vouches for a signing key.
	MaxCertificates = 8
	// MaxCertificateBytes bounds each of its certificates.
	MaxCertificateBytes = 16 << 10
)

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %s", feed.ErrMalformed, fmt.Sprintf(format, args...))
}

// Position makes a message; nil for the zero position.
func Position(p feed.Position) *dayflyv1.Position {
	if p == (feed.Position{}) {
		return nil
	}
	return &dayflyv1.Position{Era: p.Era.String(), Sequence: p.Seq, Sum: p.Sum[:]}
}

// ToPosition reads a position; an absent one is the zero position.
func ToPosition(m *dayflyv1.Position) (feed.Position, error) {
	if m == nil {
		return feed.Position{}, nil
	}
	era, err := token.ParseEra(m.GetEra())
	if err != nil {
		return feed.Position{}, malformed("position: %v", err)
	}
	if len(m.GetSum()) != sha256.Size {
		return feed.Position{}, malformed("position: a sum of %d bytes", len(m.GetSum()))
	}
	return feed.Position{Era: era, Seq: m.GetSequence(), Sum: feed.Sum(m.GetSum())}, nil
}

// Binding makes a message; "" is the choice of policy.
func Binding(b token.Binding) dayflyv1.Binding {
	switch b {
	case token.BindingSPIFFE:
		return dayflyv1.Binding_BINDING_SPIFFE
	case token.BindingX5T:
		return dayflyv1.Binding_BINDING_X5T
	case token.BindingNone:
		return dayflyv1.Binding_BINDING_NONE
	}
	return dayflyv1.Binding_BINDING_UNSPECIFIED
}

// Life is how long a credential lived at the least when the broker had issued it: the
// times that it tells are whole seconds, and it was issued at any moment of the first one.
// Of a life of less than ten seconds a tenth must do.
func Life(m *dayflyv1.Credential) time.Duration {
	life := m.GetExpiresAt().AsTime().Sub(m.GetIssuedAt().AsTime())
	return life - min(time.Second, life/10)
}

// ToBinding reads a binding; "" where it is left to policy.
func ToBinding(m dayflyv1.Binding) (token.Binding, error) {
	switch m {
	case dayflyv1.Binding_BINDING_UNSPECIFIED:
		return "", nil
	case dayflyv1.Binding_BINDING_SPIFFE:
		return token.BindingSPIFFE, nil
	case dayflyv1.Binding_BINDING_X5T:
		return token.BindingX5T, nil
	case dayflyv1.Binding_BINDING_NONE:
		return token.BindingNone, nil
	}
	return "", malformed("unknown binding %d", int32(m))
}

// OnStale makes a message of feed.Verifier's AcceptsStale.
func OnStale(accepts bool) dayflyv1.OnStale {
	if accepts {
		return dayflyv1.OnStale_ON_STALE_ACCEPT
	}
	return dayflyv1.OnStale_ON_STALE_REFUSE
}

// ToOnStale reports whether a verifier accepts when stale; unspecified, it refuses.
func ToOnStale(m dayflyv1.OnStale) (accepts bool, err error) {
	switch m {
	case dayflyv1.OnStale_ON_STALE_UNSPECIFIED, dayflyv1.OnStale_ON_STALE_REFUSE:
		return false, nil
	case dayflyv1.OnStale_ON_STALE_ACCEPT:
		return true, nil
	}
	return false, malformed("unknown on_stale %d", int32(m))
}

// ToDuration reads a duration that must be there and must not be negative.
func ToDuration(m *durationpb.Duration) (time.Duration, error) {
	if m == nil {
		return 0, malformed("a missing duration")
	}
	if err := m.CheckValid(); err != nil {
		return 0, malformed("a duration out of range")
	}
	d := m.AsDuration()
	if d < 0 {
		return 0, malformed("a negative duration")
	}
	return d, nil
}

// Selector makes a message; nil for the zero selector.
func Selector(s revocation.Selector) *dayflyv1.Selector {
	m := &dayflyv1.Selector{}
	switch v := s.Value(); s.Kind() {
	case revocation.KindGrant:
		m.Selector = &dayflyv1.Selector_Grant{Grant: v}
	case revocation.KindIdentity:
		m.Selector = &dayflyv1.Selector_Identity{Identity: v}
	case revocation.KindSubtree:
		m.Selector = &dayflyv1.Selector_Subtree{Subtree: v}
	case revocation.KindTrustDomain:
		m.Selector = &dayflyv1.Selector_TrustDomain{TrustDomain: v}
	case revocation.KindAudience:
		m.Selector = &dayflyv1.Selector_Audience{Audience: v}
	case revocation.KindSVID:
		m.Selector = &dayflyv1.Selector_Svid{Svid: v}
	case revocation.KindKey:
		m.Selector = &dayflyv1.Selector_Key{Key: v}
	case revocation.KindEverything:
		m.Selector = &dayflyv1.Selector_Everything_{Everything: &dayflyv1.Selector_Everything{}}
	default:
		return nil
	}
	return m
}

// ToSelector reads a selector. Its error says what is wrong in words that may be
// shown to whoever sent it.
func ToSelector(m *dayflyv1.Selector) (revocation.Selector, error) {
	kind, value := selectorText(m)
	if kind == "" {
		return revocation.Selector{}, malformed("a selector that selects nothing")
	}
	s, err := revocation.New(kind, value)
	if err != nil {
		return revocation.Selector{}, malformed("%v", err)
	}
	return s, nil
}

func selectorText(m *dayflyv1.Selector) (revocation.Kind, string) {
	switch s := m.GetSelector().(type) {
	case *dayflyv1.Selector_Grant:
		return revocation.KindGrant, s.Grant
	case *dayflyv1.Selector_Identity:
		return revocation.KindIdentity, s.Identity
	case *dayflyv1.Selector_Subtree:
		return revocation.KindSubtree, s.Subtree
	case *dayflyv1.Selector_TrustDomain:
		return revocation.KindTrustDomain, s.TrustDomain
	case *dayflyv1.Selector_Audience:
		return revocation.KindAudience, s.Audience
	case *dayflyv1.Selector_Svid:
		return revocation.KindSVID, s.Svid
	case *dayflyv1.Selector_Key:
		return revocation.KindKey, s.Key
	case *dayflyv1.Selector_Everything_:
		return revocation.KindEverything, ""
	}
	return "", ""
}

// Selectors makes messages.
func Selectors(selectors []revocation.Selector) []*dayflyv1.Selector {
	out := make([]*dayflyv1.Selector, len(selectors))
	for i, s := range selectors {
		out[i] = Selector(s)
	}
	return out
}

// ToSelectors reads 1 to MaxSelectors selectors.
func ToSelectors(ms []*dayflyv1.Selector) ([]revocation.Selector, error) {
	if len(ms) == 0 || len(ms) > MaxSelectors {
		return nil, malformed("%d selectors, not 1 to %d", len(ms), MaxSelectors)
	}
	out := make([]revocation.Selector, len(ms))
	for i, m := range ms {
		s, err := ToSelector(m)
		if err != nil {
			return nil, err
		}
		out[i] = s
	}
	return out, nil
}

// Member makes a message.
func Member(m token.Member) *dayflyv1.Member {
	out := &dayflyv1.Member{Identity: m.Identity.String(), Grant: m.Grant.String(), KeyId: m.Key.String()}
	if !m.SVID.IsZero() {
		out.Svid = m.SVID.String()
	}
	return out
}

// ToMember reads one link of a lineage.
func ToMember(m *dayflyv1.Member) (out token.Member, err error) {
	if out.Identity, err = spiffeid.FromString(m.GetIdentity()); err != nil {
		return token.Member{}, malformed("member: no SPIFFE ID")
	}
	if out.Grant, err = token.ParseGrantID(m.GetGrant()); err != nil {
		return token.Member{}, malformed("member: %v", err)
	}
	if out.Key, err = token.ParseKeyID(m.GetKeyId()); err != nil {
		return token.Member{}, malformed("member: %v", err)
	}
	if m.GetSvid() != "" {
		if out.SVID, err = token.ParseThumbprint(m.GetSvid()); err != nil {
			return token.Member{}, malformed("member: %v", err)
		}
	}
	return out, nil
}

// Lineage makes messages, root first.
func Lineage(members []token.Member) []*dayflyv1.Member {
	out := make([]*dayflyv1.Member, len(members))
	for i, m := range members {
		out[i] = Member(m)
	}
	return out
}

// ToLineage reads 1 to token.MaxDepth members, root first.
func ToLineage(ms []*dayflyv1.Member) ([]token.Member, error) {
	if len(ms) == 0 || len(ms) > token.MaxDepth {
		return nil, malformed("a lineage of %d members", len(ms))
	}
	out := make([]token.Member, len(ms))
	for i, m := range ms {
		member, err := ToMember(m)
		if err != nil {
			return nil, err
		}
		out[i] = member
	}
	return out, nil
}

// Key makes a message.
func Key(k feed.Key) *dayflyv1.KeyEvent {
	return &dayflyv1.KeyEvent{
		KeyId:        k.Public.ID.String(),
		Algorithm:    string(k.Public.Algorithm),
		PublicKey:    k.DER,
		Certificates: k.Certificates,
		Signature:    k.Signature,
	}
}

// ToKey reads a signing key. The ID must be that of the key, and the key in its one
// encoding. Who vouches for it is not checked here.
func ToKey(m *dayflyv1.KeyEvent) (feed.Key, error) {
	if len(m.GetCertificates()) > MaxCertificates {
		return feed.Key{}, malformed("key: %d certificates", len(m.GetCertificates()))
	}
	for _, c := range m.GetCertificates() {
		if len(c) > MaxCertificateBytes {
			return feed.Key{}, malformed("key: a certificate of %d bytes", len(c))
		}
	}
	public, err := x509.ParsePKIXPublicKey(m.GetPublicKey())
	if err != nil {
		return feed.Key{}, malformed("key: no public key")
	}
	key, err := token.NewPublicKey(token.Algorithm(m.GetAlgorithm()), public)
	if err != nil {
		return feed.Key{}, malformed("key: does not fit its algorithm")
	}
	if key.ID.String() != m.GetKeyId() {
		return feed.Key{}, malformed("key: the ID is not that of the key")
	}
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil || !bytes.Equal(der, m.GetPublicKey()) {
		return feed.Key{}, malformed("key: not in its one encoding")
	}
	return feed.Key{Public: key, DER: der, Certificates: m.GetCertificates(), Signature: m.GetSignature()}, nil
}
