package incoming

import (
	"context"
	"time"

	extauthzv1 "github.com/dayflyhq/dayfly/proto/dayfly/extauthz/v1"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"google.golang.org/grpc"
)

// A Finder says what a request needs, or why it is refused.
type Finder func(method, host, path string) (need string, reason string)

// NewFinder returns one for routes. What is needed is "public", or the scopes.
func NewFinder(all []Route) (Finder, error) {
	r, err := newRoutes(all)
	if err != nil {
		return nil, err
	}
	return func(method, host, path string) (string, string) {
		need, no := r.find(method, host, path)
		switch {
		case no != nil:
			return "", no.reason
		case need.public:
			return "public", ""
		}
		out := "token"
		for _, s := range need.scopes {
			out += " " + s
		}
		return out, ""
	}, nil
}

// MustGo is for property tests.
var MustGo = mustGo

// NewChecker is an Envoy's without a listener and without a feed: it refuses every token.
func NewChecker(p Policy, bundles x509bundle.Source) (func(*extauthzv1.CheckRequest) (*extauthzv1.CheckResponse, error), error) {
	g, err := newGuard(p, Env{Conn: noConn{}, Bundles: bundles})
	if err != nil {
		return nil, err
	}
	e := &Envoy{cfg: EnvoyConfig{Admit: func(context.Context) error { return nil }}, env: Env{Bundles: bundles, Now: time.Now}, guard: g}
	return func(in *extauthzv1.CheckRequest) (*extauthzv1.CheckResponse, error) {
		return e.Check(context.Background(), in)
	}, nil
}

// NoConn reaches nobody.
var NoConn grpc.ClientConnInterface = noConn{}
