package web

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/token"
)

// inactive is all that is said of a token that isn't good, that doesn't exist, and that
// the client may not ask about (RFC 7662 section 2.2).
var inactive = map[string]any{"active": false}

// introspect is the introspection endpoint (RFC 7662). There is one kind of token, so a
// token_type_hint says nothing.
func (p *public) introspect(ctx context.Context, c broker.Caller, f form) (any, error) {
	secret, err := presented(f)
	if err != nil {
		return nil, err
	}
	got, err := p.cfg.Broker.Introspect(ctx, c, secret)
	switch {
	case err != nil:
		return nil, err
	case !got.Active():
		return inactive, nil
	}
	return activeAnswer(got.Claims)
}

// activeAnswer is the token's own claims, in the same words. Its dfy.bnd and client_id say
// who may present it, which the endpoint can't check.
func activeAnswer(c *token.Claims) (any, error) {
	claims, err := c.MarshalJSON()
	if err != nil {
		return nil, fmt.Errorf("writing claims: %w", err)
	}
	return json.RawMessage(append([]byte(`{"active":true,"token_type":"Bearer",`), claims[1:]...)), nil
}

// revoke is the revocation endpoint (RFC 7009): a holder gives its own token back.
func (p *public) revoke(ctx context.Context, c broker.Caller, f form) (any, error) {
	secret, err := presented(f)
	if err != nil {
		return nil, err
	}
	if otherType(secret.Reveal()) {
		return nil, oauth(http.StatusBadRequest, "unsupported_token_type", errTokenType, "")
	}
	err = p.cfg.Broker.GiveBack(ctx, c, secret)
	var refusal *broker.Refusal
	if errors.As(err, &refusal) && refusal.Is(broker.ErrPolicyDenied) {
		return nil, oauth(http.StatusBadRequest, "unauthorized_client", refusal, "") // it is the client's own
	}
	return nil, err
}

var errTokenType = &broker.Refusal{
	Kind: broker.Invalid, Reason: "TOKEN_TYPE_UNSUPPORTED",
	Message: "this is a JWT, and no access token of dayfly",
	Hint:    "only access tokens of this issuer can be given back; an SVID ends with its lifetime, or is revoked by an operator",
}

func presented(f form) (token.Secret, error) {
	if f.get("token") == "" {
		return token.Secret{}, invalidRequest("token is missing")
	}
	return token.NewSecret(f.get("token")), nil
}

// otherType reports whether something says of itself that it is a JWT of another kind,
// such as an SVID or an ID token. It looks at nothing but what was sent.
func otherType(s string) bool {
	head, _, _ := strings.Cut(s, ".")
	b, err := base64.RawURLEncoding.DecodeString(head)
	if err != nil || strings.Count(s, ".") != 2 {
		return false
	}
	var h struct{ Alg, Typ string }
	return json.Unmarshal(b, &h) == nil && h.Alg != "" && !strings.EqualFold(h.Typ, "at+jwt")
}
