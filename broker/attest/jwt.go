package attest

import (
	"strings"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
)

const (
	// MaxAssertionLife is how long a JWT-SVID may live, from its iat to its exp: it is
	// a bearer document, and whoever reads it on its way has it for as long.
	MaxAssertionLife = 5 * time.Minute
	// maxAssertionBytes bounds one: a header of our other door takes no more either.
	maxAssertionBytes = 8 << 10
)

// Refusals of a JWT-SVID. Their messages never quote it.
var (
	ErrJWTSVID = &broker.Refusal{
		Kind: broker.Unauthenticated, Reason: "JWT_SVID_INVALID",
		Message: "this is no JWT-SVID that is valid here now",
		Hint:    "fetch one from the Workload API, for exactly one audience, the issuer of this broker; it may live for 5m at most, and its trust domain must be served here",
	}
	ErrJWTSVIDRate = &broker.Refusal{
		Kind: broker.Exhausted, Reason: "JWT_SVID_RATE_LIMITED",
		Message: "this identity authenticates with JWT-SVIDs faster than the broker lets it",
		Hint:    "keep a credential for its life instead of fetching one for each call, or authenticate with an X.509-SVID over mTLS",
	}
)

func badJWT(message string) error {
	r := *ErrJWTSVID
	r.Message = message
	return &r
}

// JWT proves whoever sent a JWT-SVID.
func (a *Attestor) JWT(assertion string) (broker.Caller, error) {
	if a.cfg.JWT == nil {
		return broker.Caller{}, badJWT("JWT-SVIDs are not taken here")
	}
	if len(assertion) > maxAssertionBytes {
		return broker.Caller{}, badJWT("the JWT-SVID is larger than 8 KiB")
	}
	a.forget()
	p, remembered, err := a.assertion(assertion)
	if err != nil {
		return broker.Caller{}, err
	}
	if err := a.inTime(p.JWTSVID); err != nil {
		return broker.Caller{}, err
	}
	if !remembered { // only now: what is never good here takes no place
		a.remember(assertion, p)
	}
	// Now, not earlier: a stranger who names somebody else uses up nothing of it.
	if !a.rates.draw(p.id, a.cfg.Now()) {
		r := *ErrJWTSVIDRate
		r.Metadata = map[string]string{"retry_after": (time.Second / assertionsPerSecond).String()}
		return broker.Caller{}, &r
	}
	return broker.Caller{ID: p.id, JWT: &p.JWTSVID}, nil
}

// An asserted is what a JWT-SVID says whose signature holds, and the bundle with which it
// does.
type asserted struct {
	broker.JWTSVID
	id     spiffeid.ID
	bundle *jwtbundle.Bundle
}

// assertion reads a JWT-SVID and checks form and signature: once, as long as the bundle
// of its trust domain is the same.
func (a *Attestor) assertion(raw string) (p asserted, remembered bool, err error) {
	if p, ok := a.signed.Get(raw); ok {
		bundle, err := served{a}.GetJWTBundleForTrustDomain(p.id.TrustDomain())
		if err == nil && bundle.Clone().Equal(p.bundle) { // which takes no lock
			return p, true, nil
		}
	}
	bundles := &noting{Source: served{a}}
	// No audience here: it would be content with one among others.
	svid, err := jwtsvid.ParseAndValidate(raw, bundles, nil)
	if err != nil {
		return asserted{}, false, badJWT("this is no JWT-SVID, or it has expired, or no authority of a trust domain that is served here has signed it")
	}
	if len(svid.Audience) != 1 || svid.Audience[0] != a.cfg.Audience {
		return asserted{}, false, badJWT("the aud of the JWT-SVID must be the issuer of this broker, and that alone")
	}
	if a.serves(svid.ID) != nil {
		return asserted{}, false, badJWT("the sub of the JWT-SVID is a trust domain and no workload")
	}
	issued, ok := svid.Claims["iat"].(float64)
	if !ok || issued < 0 || issued > float64(svid.Expiry.Unix()) {
		return asserted{}, false, badJWT("the JWT-SVID must say in iat when it was issued")
	}
	p = asserted{broker.JWTSVID{IssuedAt: time.Unix(int64(issued), 0).UTC(), Expires: svid.Expiry}, svid.ID, bundles.gave}
	return p, false, nil
}

// forgetEvery is how often what has expired is forgotten, while others come.
const forgetEvery = time.Minute

func (a *Attestor) remember(raw string, p asserted) {
	a.signed.Put(token.NewSecret(strings.Clone(raw)), p, p.Expires, a.cfg.Now())
}

// forget drops what has expired, now and then.
func (a *Attestor) forget() {
	now := a.cfg.Now()
	last := a.forgot.Load()
	if now.Sub(time.Unix(0, last)).Abs() >= forgetEvery && a.forgot.CompareAndSwap(last, now.UnixNano()) {
		a.signed.Sweep(now)
	}
}

// inTime judges the times of a JWT-SVID whose signature is good.
func (a *Attestor) inTime(proof broker.JWTSVID) error {
	now := a.cfg.Now()
	switch {
	case proof.Expires.Sub(proof.IssuedAt) > MaxAssertionLife:
		return badJWT("the JWT-SVID lives for more than 5m")
	case proof.IssuedAt.After(now.Add(broker.ClockSkew)):
		return badJWT("the JWT-SVID is from the future")
	case now.After(proof.Expires):
		return badJWT("the JWT-SVID has expired")
	}
	return nil
}

// noting is a source that notes what it gave: the bundle that one JWT-SVID was checked with.
type noting struct {
	jwtbundle.Source
	gave *jwtbundle.Bundle
}

func (n *noting) GetJWTBundleForTrustDomain(td spiffeid.TrustDomain) (*jwtbundle.Bundle, error) {
	b, err := n.Source.GetJWTBundleForTrustDomain(td)
	if err == nil {
		b = b.Clone() // as it is now: its owner may change it
		n.gave = b
	}
	return b, err
}

// served gives the JWT authorities of the trust domains that are served, and no others.
type served struct{ a *Attestor }

func (s served) GetJWTBundleForTrustDomain(td spiffeid.TrustDomain) (*jwtbundle.Bundle, error) {
	if err := s.a.servesDomain(td); err != nil {
		return nil, err
	}
	return s.a.cfg.JWT.GetJWTBundleForTrustDomain(td)
}
