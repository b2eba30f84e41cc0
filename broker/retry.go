package broker

import (
	"crypto/sha256"
	"encoding/json"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A retried Issue or Exchange with the same idempotency key gets the same credential
// from the same process, for a minute, as far as memory allows; after that, or after a
// restart, a second one, which dies in minutes like the first.
const (
	retryWindow = time.Minute
	maxRetries  = 4096
)

type retries struct {
	mu      sync.Mutex
	answers map[string]*retriedAnswer
}

type retriedAnswer struct {
	request [32]byte
	at      time.Time
	done    chan struct{}
	cred    *Credential
	err     error
}

// once runs issue, or returns what it returned to the same caller, key and request.
func (b *Broker) once(c Caller, req Request, issue func() (*Credential, error)) (*Credential, error) {
	if req.IdempotencyKey == "" || len(req.IdempotencyKey) > MaxKeyLength || c.Leaf == nil {
		return issue()
	}
	digest := requestDigest(c, req)
	key := retryKey(c.ID.String(), req.IdempotencyKey)
	a, first := b.retries.enter(key, digest, b.cfg.Now())
	if !first {
		if a.request != digest {
			return nil, ErrIdempotencyReused
		}
		<-a.done
		return a.cred, a.err
	}
	a.cred, a.err = issue()
	close(a.done)
	if a.err != nil {
		b.retries.forget(key, a)
	}
	return a.cred, a.err
}

// requestDigest covers the certificate too: a credential bound to one SVID is no
// answer to another.
func requestDigest(c Caller, req Request) [32]byte {
	b, _ := json.Marshal([]any{c.certificate(), req.Audience, req.Scopes, req.TTL, req.Binding, sha256.Sum256([]byte(req.Subject.Reveal()))})
	return sha256.Sum256(b)
}

func (r *retries) enter(key string, digest [32]byte, now time.Time) (*retriedAnswer, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if a, ok := r.answers[key]; ok && now.Sub(a.at) < retryWindow {
		return a, false
	}
	if r.answers == nil {
		r.answers = map[string]*retriedAnswer{}
	}
	if len(r.answers) >= maxRetries {
		for k, a := range r.answers {
			if now.Sub(a.at) >= retryWindow || len(r.answers) >= maxRetries {
				delete(r.answers, k)
			}
		}
	}
	a := &retriedAnswer{request: digest, at: now, done: make(chan struct{})}
	r.answers[key] = a
	return a, true
}

func (r *retries) forget(key string, a *retriedAnswer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.answers[key] == a {
		delete(r.answers, key)
	}
}

// notBefores remembers the newest NotBefore seen of each identity, for the cut of a
// reissue lock: an SVID issuer's clock may be ahead of ours.
type notBefores struct {
	mu sync.Mutex
	at map[spiffeid.ID]time.Time
}

// maxNotBefores bounds the memory; above it only later ones than all are kept.
const maxNotBefores = 100_000

func (n *notBefores) note(id spiffeid.ID, t time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.at == nil {
		n.at = map[spiffeid.ID]time.Time{}
	}
	if len(n.at) >= maxNotBefores {
		var newest time.Time
		for _, at := range n.at {
			if at.After(newest) {
				newest = at
			}
		}
		n.at = map[spiffeid.ID]time.Time{{}: newest}
	}
	if t.After(n.at[id]) {
		n.at[id] = t
	}
}

// newest returns the latest NotBefore of the identities that match.
func (n *notBefores) newest(match func(spiffeid.ID) bool) time.Time {
	n.mu.Lock()
	defer n.mu.Unlock()
	var newest time.Time
	for id, t := range n.at {
		if (id.IsZero() || match(id)) && t.After(newest) {
			newest = t
		}
	}
	return newest
}
