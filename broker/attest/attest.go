package attest

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Config says whom to believe.
type Config struct {
	// X509 has the authorities of X.509-SVIDs. Required.
	X509 x509bundle.Source
	// JWT has the authorities of JWT-SVIDs. Nil: none is taken.
	JWT jwtbundle.Source
	// TrustDomains whose identities are served. At least one.
	TrustDomains []spiffeid.TrustDomain
	// Audience is what a JWT-SVID must be for: the broker's issuer. Required with JWT.
	Audience string
	Now      func() time.Time // nil: time.Now
}

// An Attestor proves peers. Its methods may be called at once.
type Attestor struct {
	cfg    Config
	rates  rates
	signed token.Memory[asserted]
	forgot atomic.Int64 // when signed was swept, in Unix nanoseconds
}

// New checks the configuration.
func New(cfg Config) (*Attestor, error) {
	if cfg.X509 == nil || len(cfg.TrustDomains) == 0 {
		return nil, errors.New("attest: X509 and TrustDomains are required")
	}
	if cfg.JWT != nil && cfg.Audience == "" {
		return nil, errors.New("attest: Audience is required with JWT")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Attestor{cfg: cfg}, nil
}

// ErrNoSVID: the connection's certificate proves no identity, or none that is served.
var ErrNoSVID = &broker.Refusal{
	Kind: broker.Unauthenticated, Reason: "SVID_INVALID",
	Message: "the SVID of this connection is not valid here now",
	Hint:    "connect again with a current X.509-SVID of a trust domain that this broker serves",
}

// serves says why an identity isn't served here. SPIFFE lets no workload have an ID
// without a path.
func (a *Attestor) serves(id spiffeid.ID) error {
	if id.Path() == "" {
		return fmt.Errorf("%s is a trust domain and no workload", id)
	}
	return a.servesDomain(id.TrustDomain())
}

func (a *Attestor) servesDomain(td spiffeid.TrustDomain) error {
	if !slices.Contains(a.cfg.TrustDomains, td) {
		return fmt.Errorf("trust domain %q is not served here", td.Name())
	}
	return nil
}
