package token

import (
	"encoding/base64"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits of a token. The numbers are those of the design.
const (
	// MaxBytes bounds the whole token, so that it fits any header.
	MaxBytes = 2048
	// MaxDepth bounds the members of a lineage: a root and five exchanges.
	MaxDepth = 6
	// MaxScopes bounds the scopes of one token.
	MaxScopes = 32
	// MaxScopeBytes bounds one scope.
	MaxScopeBytes = 128
	// MaxAudienceBytes bounds the audience; a SPIFFE ID may have 2,048, but a
	// token of that size could not be issued.
	MaxAudienceBytes = 512
	// MaxIssuerBytes bounds the issuer, a URL.
	MaxIssuerBytes = 512
	// MaxTransactionBytes bounds the ID of a call chain.
	MaxTransactionBytes = 64
	// MaxTTL is the hard cap on a token's life, whatever policy says.
	MaxTTL = time.Hour
	// Leeway is what a verifier grants clocks at exp and nbf.
	Leeway = 30 * time.Second
)

// maxUnix is the last second that RFC 3339 can write.
const maxUnix = 253402300799

// A Binding says who may present a token.
type Binding string

// The bindings, weakest first.
const (
	BindingNone   Binding = "none"   // a bearer token
	BindingSPIFFE Binding = "spiffe" // the peer's SPIFFE ID must be the presenter
	BindingX5T    Binding = "x5t"    // exactly the certificate of cnf (RFC 8705)
)

func (b Binding) strictness() int {
	return slices.Index([]Binding{BindingNone, BindingSPIFFE, BindingX5T}, b)
}

// Valid reports whether b is one of the three.
func (b Binding) Valid() bool { return b.strictness() >= 0 }

// Stricter returns the stricter of two valid bindings.
func (b Binding) Stricter(other Binding) Binding {
	if other.strictness() > b.strictness() {
		return other
	}
	return b
}

// A Member is one link of a lineage: who, by which grant, proven by which
// certificate, signed by which key.
type Member struct {
	Identity spiffeid.ID
	Grant    GrantID
	Key      KeyID
	SVID     Thumbprint // zero for a JWT-SVID
}

// A Position is the place in the log that a token was issued at: the first 8 bytes
// of the log's running hash after record Rev.
type Position struct {
	Era Era
	Rev uint64
	Sum [8]byte
}

// Claims is what a token says. Times are whole seconds.
type Claims struct {
	Issuer   string
	Audience string
	// Lineage has 1 to MaxDepth members, root first; the last one's grant is the
	// token's jti, its key the kid.
	Lineage   []Member
	Scopes    []string // sorted, no duplicates
	IssuedAt  time.Time
	NotBefore time.Time
	Expires   time.Time
	Binding   Binding
	// Certificate is the SHA-256 of the bound certificate, with BindingX5T only.
	Certificate [32]byte
	Transaction string // RFC-style txn: one ID for a whole call chain
	Position    Position
}

// Root is the identity that the chain acts for: the sub claim.
func (c *Claims) Root() spiffeid.ID { return c.Lineage[0].Identity }

// Self is the token's own member: its presenter, grant, key and SVID.
func (c *Claims) Self() Member { return c.Lineage[len(c.Lineage)-1] }

// Presenter is who may use the token: the outermost act.sub, else sub.
func (c *Claims) Presenter() spiffeid.ID { return c.Self().Identity }

// Clone returns a copy that shares nothing that could be changed.
func (c *Claims) Clone() Claims {
	out := *c
	out.Lineage, out.Scopes = slices.Clone(c.Lineage), slices.Clone(c.Scopes)
	return out
}

// Grant is the jti.
func (c *Claims) Grant() GrantID { return c.Self().Grant }

// The wire forms. Field order is the order in a token.

type wireClaims struct {
	Issuer      string   `json:"iss"`
	Subject     string   `json:"sub"`
	Audience    string   `json:"aud"`
	Expires     int64    `json:"exp"`
	NotBefore   int64    `json:"nbf"`
	IssuedAt    int64    `json:"iat"`
	ID          string   `json:"jti"`
	ClientID    string   `json:"client_id"`
	Scope       *string  `json:"scope,omitzero"`
	Act         *wireAct `json:"act,omitzero"`
	Cnf         *wireCnf `json:"cnf,omitzero"`
	Transaction string   `json:"txn"`
	Dayfly      wireDfy  `json:"dfy"`

	// Others may add claims of their own (RFC 9068 section 2.2): read past.
	Other jsontext.Value `json:",embed"`
}

// The inner objects are ours alone: an unknown field of theirs is refused.

type wireAct struct {
	Subject string   `json:"sub"`
	Act     *wireAct `json:"act,omitzero"`
}

type wireCnf struct {
	X5T string `json:"x5t#S256"`
}

type wireDfy struct {
	Era     string     `json:"era"`
	Rev     *uint64    `json:"rev"` // a missing one is no 0
	Sum     string     `json:"sum"`
	Binding string     `json:"bnd"`
	Lineage [][]string `json:"lin"`
}

// MarshalJSON gives the payload of the token.
func (c *Claims) MarshalJSON() ([]byte, error) {
	if err := c.validate(); err != nil {
		return nil, err
	}
	w := wireClaims{
		Issuer:      c.Issuer,
		Subject:     c.Root().String(),
		Audience:    c.Audience,
		Expires:     c.Expires.Unix(),
		NotBefore:   c.NotBefore.Unix(),
		IssuedAt:    c.IssuedAt.Unix(),
		ID:          c.Grant().String(),
		ClientID:    c.Presenter().String(),
		Transaction: c.Transaction,
		Dayfly: wireDfy{
			Era:     c.Position.Era.String(),
			Rev:     &c.Position.Rev,
			Sum:     base64.RawURLEncoding.EncodeToString(c.Position.Sum[:]),
			Binding: string(c.Binding),
		},
	}
	if len(c.Scopes) > 0 {
		scope := strings.Join(c.Scopes, " ")
		w.Scope = &scope
	}
	for i, m := range c.Lineage {
		if i > 0 {
			w.Act = &wireAct{Subject: m.Identity.String(), Act: w.Act}
		}
		entry := []string{m.Grant.String(), m.Key.String()}
		if !m.SVID.IsZero() {
			entry = append(entry, base64.RawURLEncoding.EncodeToString(m.SVID[:]))
		}
		w.Dayfly.Lineage = append(w.Dayfly.Lineage, entry)
	}
	if c.Binding == BindingX5T {
		w.Cnf = &wireCnf{X5T: base64.RawURLEncoding.EncodeToString(c.Certificate[:])}
	}
	return json.Marshal(&w)
}

// UnmarshalJSON reads a payload, strictly: see the package comment.
func (c *Claims) UnmarshalJSON(b []byte) error {
	var w wireClaims
	if err := json.Unmarshal(b, &w, json.RejectUnknownMembers(true)); err != nil {
		return jsonError(err)
	}
	if hasNull(b) {
		return malformed("payload", "has a null")
	}
	if err := checkOthers(w.Other); err != nil {
		return err
	}
	out, err := w.claims()
	if err != nil {
		return err
	}
	if err := out.validate(); err != nil {
		return err
	}
	if out.Grant().String() != w.ID {
		return malformed("jti", "is not the last grant of the lineage")
	}
	if out.Presenter().String() != w.ClientID {
		return malformed("client_id", "is not the presenter")
	}
	*c = *out
	return nil
}

func (w *wireClaims) claims() (*Claims, error) {
	c := &Claims{
		Issuer:      w.Issuer,
		Audience:    w.Audience,
		Expires:     time.Unix(w.Expires, 0).UTC(),
		NotBefore:   time.Unix(w.NotBefore, 0).UTC(),
		IssuedAt:    time.Unix(w.IssuedAt, 0).UTC(),
		Binding:     Binding(w.Dayfly.Binding),
		Transaction: w.Transaction,
	}
	if w.Scope != nil {
		c.Scopes = strings.Split(*w.Scope, " ")
	}
	var err error
	if c.Position, err = w.Dayfly.position(); err != nil {
		return nil, err
	}
	if c.Lineage, err = w.lineage(); err != nil {
		return nil, err
	}
	if (w.Cnf != nil) != (c.Binding == BindingX5T) {
		return nil, malformed("cnf", "is there exactly when bnd is x5t")
	}
	if w.Cnf != nil {
		if decodeExact(c.Certificate[:], w.Cnf.X5T) != nil {
			return nil, malformed("cnf", "is no certificate thumbprint")
		}
	}
	return c, nil
}

func (w *wireDfy) position() (p Position, err error) {
	if p.Era, err = ParseEra(w.Era); err != nil {
		return p, malformed("dfy.era", "is not 8 lower-case hexadecimal digits")
	}
	if decodeExact(p.Sum[:], w.Sum) != nil {
		return p, malformed("dfy.sum", "is not 11 characters of base64url")
	}
	if w.Rev == nil {
		return p, malformed("dfy.rev", "is missing")
	}
	p.Rev = *w.Rev
	return p, nil
}

// lineage joins the identities of sub and act with the entries of dfy.lin.
func (w *wireClaims) lineage() ([]Member, error) {
	identities := []string{w.Subject}
	for a := w.Act; a != nil; a = a.Act {
		if len(identities) == MaxDepth {
			return nil, malformed("act", fmt.Sprintf("is nested deeper than %d", MaxDepth-1))
		}
		identities = append(identities, a.Subject)
	}
	slices.Reverse(identities[1:]) // act names the current actor first
	if len(identities) != len(w.Dayfly.Lineage) {
		return nil, malformed("dfy.lin", "is not one longer than act is deep")
	}
	lineage := make([]Member, len(identities))
	for i, entry := range w.Dayfly.Lineage {
		m, err := parseMember(identities[i], entry)
		if err != nil {
			return nil, err
		}
		lineage[i] = m
	}
	return lineage, nil
}

func parseMember(identity string, entry []string) (m Member, err error) {
	if m.Identity, err = spiffeid.FromString(identity); err != nil {
		return m, malformed("sub", "or an act.sub is no SPIFFE ID")
	}
	if len(entry) != 2 && len(entry) != 3 {
		return m, malformed("dfy.lin", "has an entry that is not [grant, key] or [grant, key, SVID]")
	}
	if m.Grant, err = ParseGrantID(entry[0]); err != nil {
		return m, malformed("dfy.lin", "has a malformed grant ID")
	}
	if m.Key, err = ParseKeyID(entry[1]); err != nil {
		return m, malformed("dfy.lin", "has a malformed key ID")
	}
	if len(entry) == 3 && (decodeExact(m.SVID[:], entry[2]) != nil || m.SVID.IsZero()) {
		return m, malformed("dfy.lin", "has a malformed SVID thumbprint")
	}
	return m, nil
}

// validate checks what must hold of every token, read or written.
func (c *Claims) validate() error {
	switch {
	case !printable(c.Issuer, MaxIssuerBytes):
		return malformed("iss", "is not an issuer")
	case ValidateAudience(c.Audience) != nil:
		return malformed("aud", "is not one audience")
	case len(c.Lineage) == 0 || len(c.Lineage) > MaxDepth:
		return malformed("dfy.lin", fmt.Sprintf("has not 1 to %d members", MaxDepth))
	case !c.Binding.Valid():
		return malformed("dfy.bnd", "is unknown")
	case (c.Binding == BindingX5T) != (c.Certificate != [32]byte{}):
		return malformed("cnf", "is there exactly when bnd is x5t")
	case !printable(c.Transaction, MaxTransactionBytes):
		return malformed("txn", fmt.Sprintf("is not 1 to %d printable characters", MaxTransactionBytes))
	case c.Position.Era == 0:
		return malformed("dfy.era", "is missing")
	}
	if err := c.validateTimes(); err != nil {
		return err
	}
	for _, m := range c.Lineage {
		if m.Identity.IsZero() || m.Grant.IsZero() || m.Key.IsZero() {
			return malformed("dfy.lin", "has an incomplete member")
		}
	}
	if len(c.Scopes) > MaxScopes {
		return malformed("scope", fmt.Sprintf("has more than %d scopes", MaxScopes))
	}
	for i, s := range c.Scopes {
		if ValidateScope(s) != nil || i > 0 && c.Scopes[i-1] >= s {
			return malformed("scope", "is not a sorted list of scopes")
		}
	}
	return nil
}

// validateTimes compares the whole seconds that a token says.
func (c *Claims) validateTimes() error {
	exp, nbf, iat := c.Expires.Unix(), c.NotBefore.Unix(), c.IssuedAt.Unix()
	for _, t := range []struct {
		name string
		at   int64
	}{{"exp", exp}, {"nbf", nbf}, {"iat", iat}} {
		if t.at < 1 || t.at > maxUnix {
			return malformed(t.name, "is not a time after 1970 and before 10000")
		}
	}
	if exp <= iat || exp <= nbf {
		return malformed("exp", "is not after iat and nbf")
	}
	// Or an iat in the far future would put exp there too, within the cap.
	if nbf < iat {
		return malformed("nbf", "is before iat")
	}
	if exp-iat > int64(MaxTTL/time.Second) {
		return malformed("exp", "is more than the hard cap after iat")
	}
	return nil
}

// ValidateScope checks a scope-token of RFC 6749 section 3.3: printable ASCII
// without space, quote and backslash.
func ValidateScope(s string) error {
	if !printable(s, MaxScopeBytes) {
		return fmt.Errorf("a scope is 1 to %d characters of printable ASCII without spaces, quotes and backslashes", MaxScopeBytes)
	}
	return nil
}

// ValidateAudience checks an audience: printable ASCII without space, quote and
// backslash.
func ValidateAudience(s string) error {
	if !printable(s, MaxAudienceBytes) {
		return fmt.Errorf("an audience is 1 to %d characters of printable ASCII without spaces, quotes and backslashes", MaxAudienceBytes)
	}
	return nil
}

// printable reports whether s is 1 to limit characters that stand for themselves in
// JSON, in a log line and in a list separated by spaces.
func printable(s string, limit int) bool {
	if s == "" || len(s) > limit {
		return false
	}
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c > '~' || c == '"' || c == '\\' {
			return false
		}
	}
	return true
}

// NormalizeScopes checks, sorts and deduplicates; it never changes its argument.
func NormalizeScopes(scopes []string) ([]string, error) {
	for _, s := range scopes {
		if err := ValidateScope(s); err != nil {
			return nil, err
		}
	}
	out := slices.Clone(scopes)
	slices.Sort(out)
	out = slices.Compact(out)
	if len(out) > MaxScopes {
		return nil, fmt.Errorf("at most %d scopes, not %d", MaxScopes, len(out))
	}
	return out, nil
}
