//go:build linux

package soak_test

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/golang-jwt/jwt/v5"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A checker checks tokens by the JWK set alone, which it asks the broker for and not an
// agent. A key that it doesn't know yet, since the broker that published it is away, is
// asked for later: a token's signature doesn't change meanwhile.
type checker struct {
	issuer, jwks string
	life         time.Duration
	violate      func(about, format string, args ...any)

	mu      sync.Mutex
	keys    map[string]crypto.PublicKey
	seen    map[string]*checked // by token
	waiting map[string]bool     // tokens of seen whose key isn't known
}

// checked is what a token says that is in order.
type checked struct {
	grant   string
	issued  time.Time
	expires time.Time
	subject string
	client  string
	aud     string
}

type claims struct {
	jwt.RegisteredClaims
	ClientID string `json:"client_id"`
}

// check returns what a token says, or what is wrong with it whenever it is looked at.
func (c *checker) check(raw string, of spiffeid.ID, audience string) (*checked, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	got, ok := c.seen[raw]
	if !ok {
		var err error
		if got, err = c.first(raw); err != nil {
			return nil, err
		}
		c.seen[raw] = got
	}
	if got.subject != of.String() || got.client != of.String() || got.aud != audience {
		return nil, fmt.Errorf("a token of %s for %s, by %s, and not of %s for %s", got.subject, got.aud, got.client, of, audience)
	}
	return got, nil
}

// first looks at a token that wasn't seen before; mu is held.
func (c *checker) first(raw string) (*checked, error) {
	var said claims
	_, err := c.parse(raw, &said)
	if errors.Is(err, errKeyUnknown) {
		c.waiting[raw] = true
	} else if err != nil {
		return nil, err
	}
	if said.ExpiresAt == nil || said.IssuedAt == nil || len(said.Audience) != 1 || said.ID == "" || said.Issuer != c.issuer {
		return nil, errors.New("a token without exp, iat, jti, the one aud or the issuer")
	}
	if life := said.ExpiresAt.Sub(said.IssuedAt.Time); life > c.life {
		return nil, fmt.Errorf("a token that lives for %v, and policy gives %v", life, c.life)
	}
	return &checked{
		grant: said.ID, issued: said.IssuedAt.Time, expires: said.ExpiresAt.Time,
		subject: said.Subject, client: said.ClientID, aud: said.Audience[0],
	}, nil
}

var errKeyUnknown = errors.New("signed by a key that is in no JWK set")

func (c *checker) parse(raw string, into *claims) (*jwt.Token, error) {
	// Its times are looked at when it is served.
	return jwt.NewParser(jwt.WithValidMethods([]string{"ES256"}), jwt.WithoutClaimsValidation()).ParseWithClaims(raw, into, func(t *jwt.Token) (any, error) {
		kid, _ := t.Header["kid"].(string)
		key, ok := c.keys[kid]
		if !ok {
			return nil, errKeyUnknown
		}
		return key, nil
	})
}

// refresh fetches the JWK set and looks at what waits for a key.
func (c *checker) refresh(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.jwks, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return err
	}
	set, err := jwtbundle.Read(sandbox.TrustDomain, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("reading the JWK set: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for kid, key := range set.JWTAuthorities() {
		c.keys[kid] = key
	}
	for raw := range c.waiting {
		_, err := c.parse(raw, new(claims))
		if errors.Is(err, errKeyUnknown) {
			continue
		}
		delete(c.waiting, raw)
		if err != nil {
			c.violate("JWK set", "a token with a bad signature was served: %v", err)
		}
	}
	return nil
}

// run keeps the set as new as need be, and forgets old tokens.
func (c *checker) run(ctx context.Context) {
	every := time.NewTicker(time.Second)
	defer every.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-every.C:
		}
		c.mu.Lock()
		want := len(c.waiting) > 0
		for raw, t := range c.seen {
			if time.Since(t.expires) > 4*c.life && !c.waiting[raw] {
				delete(c.seen, raw)
			}
		}
		c.mu.Unlock()
		if want {
			_ = c.refresh(ctx) // the broker may be away
		}
	}
}

// finish is the last look: nothing may wait any more.
func (c *checker) finish(ctx context.Context) error {
	if err := c.refresh(ctx); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := len(c.waiting); n > 0 {
		c.violate("JWK set", "%d tokens that were served are signed by keys that the broker never published", n)
	}
	return nil
}
