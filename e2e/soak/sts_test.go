//go:build linux

package soak_test

import (
	"encoding/xml"
	"fmt"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"
)

// A tokenService trades tokens for sessions as AWS's does, and knows the JWK set only.
type tokenService struct {
	w   *world
	url string

	mu       sync.Mutex
	sessions map[string]time.Time // by access key: when it was given
	n        int
}

func newTokenService(t testing.TB, w *world) *tokenService {
	s := &tokenService{w: w, sessions: map[string]time.Time{}}
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	s.url = server.URL
	return s
}

type stsCredentials struct {
	AccessKeyID     string `xml:"AccessKeyId"`
	SecretAccessKey string
	SessionToken    string
	Expiration      string
}

type stsAnswer struct {
	XMLName xml.Name       `xml:"AssumeRoleWithWebIdentityResponse"`
	Given   stsCredentials `xml:"AssumeRoleWithWebIdentityResult>Credentials"`
}

func (s *tokenService) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	start := time.Now()
	c, err := s.w.checker.check(r.PostFormValue("WebIdentityToken"), identity(unitAWS), exchange)
	if err != nil || !c.expires.After(start) {
		s.w.violate("token service", "was shown a token that is no good: %v", err)
		rw.WriteHeader(http.StatusBadRequest)
		return
	}
	s.mu.Lock()
	s.n++
	key := fmt.Sprintf("ASIA%016d", s.n)
	s.sessions[key] = start
	for k, at := range s.sessions {
		if time.Since(at) > 4*s.w.life {
			delete(s.sessions, k)
		}
	}
	s.mu.Unlock()
	text, err := xml.Marshal(stsAnswer{Given: stsCredentials{key, "secret", "session", start.Add(s.w.life).UTC().Format(time.RFC3339)}})
	if err != nil {
		panic(err)
	}
	_, _ = rw.Write(text)
}

// session says when one was given.
func (s *tokenService) session(key string) (time.Time, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at, ok := s.sessions[key]
	return at, ok
}
