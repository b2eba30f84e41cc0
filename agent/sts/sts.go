// Package sts trades a token for a session at AWS's security token service, or at one
// that speaks as it does: one unsigned POST of AssumeRoleWithWebIdentity, so that no
// cloud's SDK is needed. Nothing is kept here.
package sts

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/dayflyhq/dayfly/agent/field"
	"github.com/dayflyhq/dayfly/proto/token"
)

const (
	// DefaultEndpoint is AWS's own, of no region.
	DefaultEndpoint = "https://sts.amazonaws.com"
	// DefaultSession is the name of a session where none is given.
	DefaultSession = "dayfly"
	// MinDuration and MaxDuration are what the service takes.
	MinDuration, MaxDuration = 15 * time.Minute, 12 * time.Hour

	version     = "2011-06-15"
	maxAnswer   = 64 << 10 // the largest real one has a few KiB
	maxMessage  = 256      // of a refusal, for a log or a terminal
	maxARN      = 2048
	maxField    = 16 << 10 // of a credential; a header that carries it isn't longer
	tradeWithin = 15 * time.Second
)

// A Role says where to trade tokens, and for what.
type Role struct {
	// Endpoint is the URL of the service: https, or http on loopback. Empty:
	// DefaultEndpoint.
	Endpoint string
	// ARN is the role. AWS requires one; MinIO reads the token's claims without it.
	ARN string
	// Session is the name that the service's records show. Empty: DefaultSession.
	Session string
	// Duration is the wanted life of the session; zero: what the service gives.
	Duration time.Duration
}

var sessionName = regexp.MustCompile(`^[A-Za-z0-9_+=,.@-]+$`)

// Validate says everything that is wrong: *field.Error values of "endpoint", "role", "session" and
// "duration", joined.
func (r *Role) Validate() error {
	var errs []error
	wrong := func(key, message string) { errs = append(errs, field.Wrong(key, "%s", message)) }
	if !goodEndpoint(r.endpoint()) {
		wrong("endpoint", "must be an https URL, or an http URL on loopback")
	}
	if r.ARN != "" && (!strings.HasPrefix(r.ARN, "arn:") || len(r.ARN) > maxARN || !printable(r.ARN)) {
		wrong("role", "must be an ARN such as arn:aws:iam::123456789012:role/orders-writer")
	}
	if s := r.session(); len(s) < 2 || len(s) > 64 || !sessionName.MatchString(s) {
		wrong("session", "must have 2 to 64 of the characters a-z, A-Z, 0-9 and _+=,.@-")
	}
	if r.Duration != 0 && (r.Duration < MinDuration || r.Duration > MaxDuration) {
		wrong("duration", fmt.Sprintf("is %v to %v, or absent", MinDuration, MaxDuration))
	}
	return errors.Join(errs...)
}

func (r *Role) endpoint() string {
	if r.Endpoint == "" {
		return DefaultEndpoint
	}
	return r.Endpoint
}

func (r *Role) session() string {
	if r.Session == "" {
		return DefaultSession
	}
	return r.Session
}

func goodEndpoint(s string) bool {
	u, err := url.Parse(s)
	if err != nil || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return false
	}
	addr, err := netip.ParseAddr(u.Hostname())
	return u.Scheme == "https" || u.Scheme == "http" && (u.Hostname() == "localhost" || err == nil && addr.IsLoopback())
}

// A Session is what a token was traded for.
type Session struct {
	AccessKeyID                   string
	SecretAccessKey, SessionToken token.Secret
	Expires                       time.Time // by the service's clock
}

// An Error is a refusal of the service, or an answer that is none of its own.
type Error struct {
	Status  int    // of HTTP
	Code    string // the service's, such as InvalidIdentityToken; "" if it has none
	Message string // without any credential
}

func (e *Error) Error() string {
	code := e.Code
	if code == "" {
		code = "no reason given"
	}
	text := fmt.Sprintf("the token service answered %d (%s)", e.Status, code)
	if e.Message != "" {
		text += ": " + e.Message
	}
	return text
}

// client goes nowhere but to the endpoint: a redirect would take the token along.
var client = &http.Client{
	Timeout:       tradeWithin,
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}

// Trade gives a token to the service and returns the session that it gives. The session
// must still live at now.
func Trade(ctx context.Context, role Role, secret token.Secret, now time.Time) (*Session, error) {
	if err := role.Validate(); err != nil {
		return nil, err
	}
	form := url.Values{
		"Action": {"AssumeRoleWithWebIdentity"}, "Version": {version},
		"RoleSessionName": {role.session()}, "WebIdentityToken": {secret.Reveal()},
	}
	if role.ARN != "" {
		form.Set("RoleArn", role.ARN)
	}
	if role.Duration > 0 {
		form.Set("DurationSeconds", strconv.Itoa(int(role.Duration/time.Second)))
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, role.endpoint(), strings.NewReader(form.Encode()))
	if err != nil {
		return nil, errors.New("asking the token service: the endpoint is no URL")
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Accept", "application/xml")
	resp, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("asking the token service: %w", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return nil, fmt.Errorf("reading the token service's answer: %w", err)
	}
	if len(body) > maxAnswer {
		return nil, &Error{Status: resp.StatusCode, Message: fmt.Sprintf("the answer is longer than %d bytes", maxAnswer)}
	}
	if resp.StatusCode != http.StatusOK {
		return nil, parseError(resp.StatusCode, body, secret)
	}
	return parseSession(body, now)
}

// parseSession reads the answer to a trade.
func parseSession(body []byte, now time.Time) (*Session, error) {
	bad := func(what string) error {
		return &Error{Status: http.StatusOK, Message: "the answer " + what} // none of it is quoted: it may hold a credential
	}
	var answer struct {
		XMLName xml.Name `xml:"AssumeRoleWithWebIdentityResponse"`
		Result  struct {
			Credentials struct {
				AccessKeyID     string `xml:"AccessKeyId"`
				SecretAccessKey string
				SessionToken    string
				Expiration      string
			}
		} `xml:"AssumeRoleWithWebIdentityResult"`
	}
	if err := xml.Unmarshal(body, &answer); err != nil {
		return nil, bad("is no AssumeRoleWithWebIdentityResponse")
	}
	c := answer.Result.Credentials
	for _, text := range []string{c.AccessKeyID, c.SecretAccessKey, c.SessionToken} {
		if text == "" || len(text) > maxField || !printable(text) {
			return nil, bad("has no whole credential")
		}
	}
	expires, err := time.Parse(time.RFC3339, c.Expiration)
	if err != nil {
		return nil, bad("doesn't say when the credential expires")
	}
	if !expires.After(now) {
		return nil, bad("has a credential that has expired")
	}
	return &Session{
		AccessKeyID: c.AccessKeyID, SecretAccessKey: token.NewSecret(c.SecretAccessKey), SessionToken: token.NewSecret(c.SessionToken),
		Expires: expires.UTC(),
	}, nil
}

// parseError reads a refusal.
func parseError(status int, body []byte, secret token.Secret) *Error {
	var answer struct {
		XMLName xml.Name `xml:"ErrorResponse"`
		Error   struct{ Code, Message string }
	}
	e := &Error{Status: status}
	if xml.Unmarshal(body, &answer) != nil {
		return e
	}
	e.Code, e.Message = harmless(answer.Error.Code, secret), harmless(answer.Error.Message, secret)
	return e
}

// harmless is a text of the service's for people: short, in one line, and without the
// token's signature, even if the service quotes what it got.
func harmless(text string, secret token.Secret) string {
	for part := range strings.SplitSeq(secret.Reveal(), ".") {
		if part != "" {
			text = strings.ReplaceAll(text, part, "[token]")
		}
	}
	text = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, text)
	if len(text) > maxMessage {
		text = strings.ToValidUTF8(text[:maxMessage], "") + "..."
	}
	return text
}

// printable reports whether a text is what fits into a header: visible ASCII.
func printable(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r <= ' ' || r > '~' }) < 0
}
