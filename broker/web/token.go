package web

import (
	"context"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/token"
)

// Names of RFC 6749 and RFC 8693.
const (
	grantClientCredentials = "client_credentials"
	grantTokenExchange     = "urn:ietf:params:oauth:grant-type:token-exchange"
	typeAccessToken        = "urn:ietf:params:oauth:token-type:access_token"
	typeJWT                = "urn:ietf:params:oauth:token-type:jwt"
)

// tokenAnswer is that of RFC 6749 section 5.1 and RFC 8693 section 2.2.1. It names the
// grant, as the records and operators do.
type tokenAnswer struct {
	AccessToken     string        `json:"access_token"`
	IssuedTokenType string        `json:"issued_token_type,omitempty"`
	TokenType       string        `json:"token_type"`
	ExpiresIn       int64         `json:"expires_in"` // whole seconds that are left, rounded down: of a repeated call fewer
	Scope           string        `json:"scope,omitempty"`
	Grant           string        `json:"dayfly_grant"`
	Binding         token.Binding `json:"dayfly_binding"`
}

// token is the token endpoint.
func (p *public) token(ctx context.Context, c broker.Caller, f form) (any, error) {
	switch f.get("grant_type") {
	case "":
		return nil, invalidRequest("grant_type is missing")
	case grantClientCredentials:
		req, err := requestOf(f)
		if err != nil {
			return nil, err
		}
		cred, err := p.cfg.Broker.Issue(ctx, c, req)
		if err != nil {
			return nil, err
		}
		return p.answerOf(cred), nil
	case grantTokenExchange:
		return p.exchange(ctx, c, f)
	}
	return nil, oauth(http.StatusBadRequest, "unsupported_grant_type", errGrantType, "")
}

func (p *public) exchange(ctx context.Context, c broker.Caller, f form) (any, error) {
	issued, err := checkTypes(f)
	if err != nil {
		return nil, err
	}
	req, err := requestOf(f)
	if err != nil {
		return nil, err
	}
	req.Subject = token.NewSecret(f.get("subject_token"))
	cred, err := p.cfg.Broker.Exchange(ctx, c, req)
	if err != nil {
		return nil, err
	}
	answer := p.answerOf(cred)
	answer.IssuedTokenType = issued
	return answer, nil
}

// checkTypes checks what an exchange says of its tokens, and returns the type of what it
// will be given. Both of ours are true of an access token that is a JWT.
func checkTypes(f form) (issued string, err error) {
	ours := func(t string) bool { return t == typeAccessToken || t == typeJWT }
	issued = f.get("requested_token_type")
	if issued == "" {
		issued = typeAccessToken
	}
	switch {
	case f.get("subject_token") == "":
		return "", invalidRequest("subject_token is missing")
	case f.get("subject_token_type") == "":
		return "", invalidRequest("subject_token_type is missing")
	case !ours(f.get("subject_token_type")):
		return "", invalidRequest("subject_token_type: only an access token of this issuer can be exchanged, " + typeAccessToken)
	case f.get("actor_token") != "" || f.get("actor_token_type") != "":
		return "", invalidRequest("actor_token: the actor of an exchange is always the authenticated client, and no token can name another")
	case !ours(issued):
		return "", invalidRequest("requested_token_type: only " + typeAccessToken + " is issued, which is a " + typeJWT + " too")
	}
	return issued, nil
}

// requestOf reads what both grants share.
func requestOf(f form) (broker.Request, error) {
	audience, err := targetOf(f)
	if err != nil {
		return broker.Request{}, err
	}
	req := broker.Request{Audience: audience, Binding: token.Binding(f.get("dayfly_binding")), IdempotencyKey: f.get("dayfly_idempotency_key")}
	if req.Scopes, err = scopesOf(f); err != nil {
		return req, err
	}
	if req.Binding != "" && !req.Binding.Valid() {
		return req, invalidRequest("dayfly_binding is none, spiffe or x5t")
	}
	if s := f.get("dayfly_ttl"); s != "" {
		n, err := strconv.ParseUint(s, 10, 20)
		if err != nil || n == 0 {
			return req, invalidRequest("dayfly_ttl is a number of seconds")
		}
		req.TTL = time.Duration(n) * time.Second
	}
	return req, nil
}

// targetOf returns the one target of a request: an audience of RFC 8693, or a resource of
// RFC 8707. Several would need several tokens, for each has one aud.
func targetOf(f form) (string, error) {
	resources, audiences := f.all("resource"), f.all("audience")
	switch len(resources) + len(audiences) {
	case 0:
		return "", invalidTarget("no target: send an audience or a resource")
	case 1:
	default:
		return "", invalidTarget("more than one target: ask for a token for each")
	}
	if len(audiences) == 1 {
		return audiences[0], nil
	}
	u, err := url.Parse(resources[0])
	if err != nil || !u.IsAbs() || strings.Contains(resources[0], "#") {
		return "", invalidTarget("resource is an absolute URI without a fragment")
	}
	return resources[0], nil
}

func (p *public) answerOf(cred *broker.Credential) *tokenAnswer {
	g := cred.Grant
	return &tokenAnswer{
		AccessToken: cred.Token.Reveal(), TokenType: "Bearer",
		ExpiresIn: max(0, int64(g.Expires.Sub(p.cfg.Now())/time.Second)), Scope: strings.Join(g.Scopes, " "),
		Grant: g.ID().String(), Binding: g.Binding,
	}
}
