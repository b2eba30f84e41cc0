package sts

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/proto/token"
)

const answer = `<?xml version="1.0" encoding="UTF-8"?>
<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleWithWebIdentityResult>
<AssumedRoleUser><Arn>arn:x</Arn></AssumedRoleUser>
<Credentials><AccessKeyId>ASIA1</AccessKeyId><SecretAccessKey>s3cr3t/+=</SecretAccessKey><SessionToken>t0k3n</SessionToken><Expiration>%s</Expiration></Credentials>
</AssumeRoleWithWebIdentityResult><ResponseMetadata><RequestId>r</RequestId></ResponseMetadata></AssumeRoleWithWebIdentityResponse>`

var (
	now    = time.Date(2026, 11, 27, 0, 0, 0, 0, time.UTC)
	secret = token.NewSecret("eyJoZWFk.eyJwYXls.c2lnbmF0dXJl")
)

// serve answers each request with a status and a body, and returns a role there.
func serve(t *testing.T, handle http.HandlerFunc) Role {
	t.Helper()
	s := httptest.NewServer(handle)
	t.Cleanup(s.Close)
	return Role{Endpoint: s.URL + "/", ARN: "arn:aws:iam::1:role/r"}
}

func TestTrade(t *testing.T) {
	role := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if err := r.ParseForm(); err != nil || r.Method != http.MethodPost || r.URL.RawQuery != "" || r.Header.Get("Authorization") != "" {
			t.Errorf("%s %s %v", r.Method, r.URL, err)
		}
		want := "Action=AssumeRoleWithWebIdentity&DurationSeconds=900&RoleArn=arn%3Aaws%3Aiam%3A%3A1%3Arole%2Fr&RoleSessionName=dayfly&Version=2011-06-15&WebIdentityToken=eyJoZWFk.eyJwYXls.c2lnbmF0dXJl"
		if got := r.PostForm.Encode(); got != want {
			t.Errorf("asked %s", got)
		}
		fmt.Fprintf(w, answer, "2026-11-27T01:00:00.5Z")
	})
	role.Duration = MinDuration
	s, err := Trade(t.Context(), role, secret, now)
	if err != nil {
		t.Fatal(err)
	}
	if s.AccessKeyID != "ASIA1" || s.SecretAccessKey.Reveal() != "s3cr3t/+=" || s.SessionToken.Reveal() != "t0k3n" || !s.Expires.Equal(now.Add(time.Hour+500*time.Millisecond)) {
		t.Errorf("got %+v", s)
	}
	if text := fmt.Sprintf("%+v %v", s, *s); strings.Contains(text, "s3cr3t") || strings.Contains(text, "t0k3n") {
		t.Errorf("a session prints its secrets: %s", text)
	}
}

// Whatever goes wrong is said, without the token.
func TestTradeRefused(t *testing.T) {
	for name, c := range map[string]struct {
		status     int
		body, want string
	}{
		"refused": {400, `<ErrorResponse xmlns="x"><Error><Type>Sender</Type><Code>InvalidIdentityToken</Code><Message>No provider
for eyJoZWFk.eyJwYXls.c2lnbmF0dXJl</Message></Error></ErrorResponse>`, "answered 400 (InvalidIdentityToken): No provider for [token].[token].[token]"},
		"a long refusal":      {403, "<ErrorResponse><Error><Code>C</Code><Message>" + strings.Repeat("m", 999) + "</Message></Error></ErrorResponse>", strings.Repeat("m", 256) + "..."},
		"no XML":              {503, "upstream c2lnbmF0dXJl", "answered 503 (no reason given)"},
		"a redirect":          {307, "", "answered 307"},
		"another answer":      {200, "<html></html>", "is no AssumeRoleWithWebIdentityResponse"},
		"cut off":             {200, answer[:300], "is no AssumeRoleWithWebIdentityResponse"},
		"too long":            {200, strings.Repeat(" ", maxAnswer+1), "longer than"},
		"expired":             {200, fmt.Sprintf(answer, "2026-11-27T00:00:00Z"), "has expired"},
		"no expiry":           {200, fmt.Sprintf(answer, "soon"), "doesn't say when"},
		"no key":              {200, strings.Replace(fmt.Sprintf(answer, "2026-11-27T01:00:00Z"), "ASIA1", "", 1), "no whole credential"},
		"a line in a token":   {200, strings.Replace(fmt.Sprintf(answer, "2026-11-27T01:00:00Z"), "t0k3n", "t0\nk3n", 1), "no whole credential"},
		"an entity of theirs": {200, "<!DOCTYPE a [<!ENTITY b \"c\">]><a>&b;</a>", "is no AssumeRole"},
	} {
		t.Run(name, func(t *testing.T) {
			var followed bool
			role := serve(t, func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path != "/" {
					followed = true
				}
				w.Header().Set("Location", "/elsewhere")
				w.WriteHeader(c.status)
				fmt.Fprint(w, c.body)
			})
			_, err := Trade(t.Context(), role, secret, now)
			var refused *Error
			if !errors.As(err, &refused) || refused.Status != c.status || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v, want %q", err, c.want)
			}
			if followed || strings.Contains(err.Error(), "c2lnbmF0dXJl") || strings.Contains(err.Error(), "t0") || strings.Contains(err.Error(), "\n") {
				t.Errorf("followed %v: %v", followed, err)
			}
		})
	}
}

func TestRoleRefused(t *testing.T) {
	for field, role := range map[string]Role{
		"endpoint: ":  {Endpoint: "http://sts.example.org"},
		"endpoint:":   {Endpoint: "https://user@sts.example.org"},
		"endpoint: m": {Endpoint: "ftp://localhost"},
		"role":        {ARN: "orders-writer"},
		"session":     {Session: "a b"},
		"session: ":   {Session: "a"},
		"session: m":  {Session: strings.Repeat("a", 65)},
		"duration":    {Duration: time.Minute},
	} {
		if err := role.Validate(); err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: %v", field, err)
		}
		if _, err := Trade(t.Context(), role, secret, now); err == nil {
			t.Errorf("%s: traded", field)
		}
	}
	if err := (&Role{}).Validate(); err != nil {
		t.Error(err)
	}
}

func FuzzSTSAnswer(f *testing.F) {
	f.Add([]byte(fmt.Sprintf(answer, "2026-11-27T01:00:00Z")))
	f.Add([]byte("<ErrorResponse><Error><Code>a</Code><Message>eyJoZWFk.eyJwYXls.c2lnbmF0dXJl</Message></Error></ErrorResponse>"))
	f.Add([]byte("<a>" + strings.Repeat("<b>", 999)))
	f.Fuzz(func(t *testing.T, body []byte) {
		if s, err := parseSession(body, now); err == nil {
			if !printable(s.AccessKeyID+s.SecretAccessKey.Reveal()+s.SessionToken.Reveal()) || s.AccessKeyID == "" || !s.Expires.After(now) {
				t.Fatalf("%q", body)
			}
		}
		e := parseError(400, body, secret)
		if text := e.Error(); strings.Contains(text, "c2lnbmF0dXJl") || strings.ContainsAny(text, "\n\r\x1b") || len(text) > 3*maxMessage {
			t.Fatalf("%q", text)
		}
	})
}
