package broker

import (
	"sync"
	"time"

	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// seenSVIDs remembers of each identity the newest NotBefore (a JWT-SVID's iat), for
// the cut of a reissue lock (an SVID issuer's clock may be ahead of ours), and of each SVID when it expires,
// until when a lock on it must stand.
type seenSVIDs struct {
	mu        sync.Mutex
	notBefore map[spiffeid.ID]time.Time
	notAfter  map[token.Thumbprint]time.Time
}

// maxSeen bounds each map. A full one is begun anew: of the identities the newest
// NotBefore of all is kept for everyone, and an SVID that was forgotten stays locked
// until its lock is lifted. Both err on the side of refusing.
const maxSeen = 100_000

func (s *seenSVIDs) note(c Caller) {
	from, until := c.Attested()
	s.noteNotBefore(c.ID, from)
	if c.Leaf == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.notAfter == nil || len(s.notAfter) >= maxSeen {
		s.notAfter = map[token.Thumbprint]time.Time{}
	}
	s.notAfter[c.thumbprint()] = until
}

// noteNotBefore notes that an identity has an SVID whose NotBefore may be as late as t.
func (s *seenSVIDs) noteNotBefore(id spiffeid.ID, t time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.notBefore == nil || len(s.notBefore) >= maxSeen {
		s.notBefore = map[spiffeid.ID]time.Time{{}: newestOf(s.notBefore)}
	}
	if t.After(s.notBefore[id]) {
		s.notBefore[id] = t
	}
}

func newestOf(times map[spiffeid.ID]time.Time) time.Time {
	var newest time.Time
	for _, t := range times {
		if t.After(newest) {
			newest = t
		}
	}
	return newest
}

// newestNotBefore returns the latest NotBefore of the identities that match.
func (s *seenSVIDs) newestNotBefore(match func(spiffeid.ID) bool) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	var newest time.Time
	for id, t := range s.notBefore {
		if (id.IsZero() || match(id)) && t.After(newest) {
			newest = t
		}
	}
	return newest
}

// expiry returns when an SVID that was seen expires.
func (s *seenSVIDs) expiry(t token.Thumbprint) (time.Time, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at, ok := s.notAfter[t]
	return at, ok
}
