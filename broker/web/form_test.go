package web_test

import (
	"crypto/tls"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/dayflyhq/dayfly/broker/web"
)

// A form is read as it was sent, or refused in words that don't quote it.
func FuzzForm(f *testing.F) {
	f.Add("grant_type=client_credentials&audience=orders&scope=read+write")
	f.Add("resource=https%3A%2F%2Fa.example&resource=https%3A%2F%2Fb.example&audience=c")
	f.Add("client_assertion=secret&client_assertion=secret")
	f.Add("a=%zz;b=%ff&&=&=x&a==")
	f.Fuzz(func(t *testing.T, body string) {
		r := httptest.NewRequest(http.MethodPost, "/token", strings.NewReader(body))
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		got, err := web.ReadForm(r)
		want, parseErr := url.ParseQuery(body)
		if err != nil {
			if len(body) > 8 && strings.Contains(err.Error(), body) {
				t.Fatalf("%q quotes the form", err)
			}
			return
		}
		if parseErr != nil {
			t.Fatalf("took %q", body)
		}
		for name, all := range want {
			var sent []string
			for _, v := range all {
				if v != "" {
					sent = append(sent, v)
				}
			}
			if strings.Join(got[name], "\x00") != strings.Join(sent, "\x00") {
				t.Fatalf("%s is %q, sent was %q", name, got[name], sent)
			}
			if len(sent) > 1 && name != "resource" && name != "audience" {
				t.Fatalf("%q is there %d times", name, len(sent))
			}
		}
		if len(got) > len(want) {
			t.Fatalf("more than was sent: %q", got)
		}
	})
}

// The token endpoint answers whatever a client sends with an error of the standard, or
// with what it asked for.
func FuzzToken(f *testing.F) {
	w := newWorld(f)
	shown := &tls.ConnectionState{PeerCertificates: w.svid(payments).Certificates}
	f.Add(credentials().Encode())
	f.Add(credentials("scope", "read", "dayfly_ttl", "60", "dayfly_binding", "x5t").Encode())
	f.Add(exchange("a.b.c", "requested_token_type", jwtType).Encode())
	f.Add("resource=a:&grant_type=client_credentials")
	known := map[string]bool{"invalid_request": true, "invalid_client": true, "invalid_target": true, "invalid_scope": true, "unsupported_grant_type": true, "unauthorized_client": true}
	f.Fuzz(func(t *testing.T, body string) {
		r := httptest.NewRequest(http.MethodPost, "/token", strings.NewReader(body))
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		r.TLS = shown
		resp := httptest.NewRecorder()
		w.handler.ServeHTTP(resp, r)
		a := answer{status: resp.Code}
		if err := json.Unmarshal(resp.Body.Bytes(), &a.body); err != nil {
			t.Fatal(err)
		}
		if a.status == http.StatusOK {
			if a.text("access_token") == "" || a.text("token_type") != "Bearer" {
				t.Fatalf("got %v", a.body)
			}
			return
		}
		if a.status != http.StatusBadRequest && a.status != http.StatusUnauthorized || !known[a.text("error")] {
			t.Fatalf("%q: %d %v", body, a.status, a.body)
		}
		if d := a.text("error_description"); d == "" || strings.ContainsFunc(d, func(r rune) bool { return r < ' ' || r > '~' || r == '"' || r == '\\' }) {
			t.Fatalf("error_description is %q", d)
		}
	})
}
