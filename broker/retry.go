package broker

import (
	"container/list"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"strconv"
	"sync"
	"time"
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
	answers map[string]*list.Element // of *retriedAnswer
	oldest  list.List                // the same, oldest first
}

type retriedAnswer struct {
	key     string
	request [32]byte
	at      time.Time
	done    chan struct{}
	cred    *Credential // nil: it failed
}

// once runs issue, or returns the credential that the same caller got for the same key
// and request, while that is good. A failure is not kept: whoever waited for it tries
// for itself.
func (b *Broker) once(ctx context.Context, action Action, c Caller, req Request, issue func() (*Credential, error)) (*Credential, error) {
	if req.IdempotencyKey == "" || len(req.IdempotencyKey) > MaxKeyLength || b.checkWorkload(c) != nil {
		return issue()
	}
	digest := requestDigest(c, req)
	key := retryKey(c.ID.String(), req.IdempotencyKey)
	for {
		a, first := b.retries.enter(key, digest, b.cfg.Now())
		if first {
			return b.first(key, a, issue)
		}
		if a.request != digest {
			return nil, ErrIdempotencyReused
		}
		select {
		case <-a.done:
			if a.cred != nil {
				if state, _ := b.GrantState(a.cred.Grant); state == GrantLive {
					return b.repeat(ctx, action, c, req, a.cred)
				}
				b.retries.forget(key, a) // it was revoked since: whether there is another is asked anew
			}
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// first makes the answer that others may be waiting for.
func (b *Broker) first(key string, a *retriedAnswer, issue func() (*Credential, error)) (*Credential, error) {
	defer func() { // also when issue panics, or they would wait for ever
		if a.cred == nil {
			b.retries.forget(key, a)
		}
		close(a.done)
	}()
	cred, err := issue()
	a.cred = cred
	return cred, err
}

// requestDigest covers the certificate too: a credential bound to one SVID is no
// answer to another.
func requestDigest(c Caller, req Request) [32]byte {
	svid := c.certificate()
	b := svid[:]
	for _, field := range append([]string{req.Audience, strconv.FormatInt(int64(req.TTL), 10), string(req.Binding), req.Subject.Reveal()}, req.Scopes...) {
		b = binary.AppendUvarint(b, uint64(len(field)))
		b = append(b, field...)
	}
	return sha256.Sum256(b)
}

func (r *retries) enter(key string, digest [32]byte, now time.Time) (*retriedAnswer, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e, ok := r.answers[key]; ok {
		if a := e.Value.(*retriedAnswer); now.Sub(a.at) < retryWindow {
			return a, false
		}
		r.remove(e)
	}
	if r.answers == nil {
		r.answers = map[string]*list.Element{}
	}
	for e := r.oldest.Front(); e != nil && (r.oldest.Len() >= maxRetries || now.Sub(e.Value.(*retriedAnswer).at) >= retryWindow); e = r.oldest.Front() {
		r.remove(e)
	}
	a := &retriedAnswer{key: key, request: digest, at: now, done: make(chan struct{})}
	r.answers[key] = r.oldest.PushBack(a)
	return a, true
}

// remove forgets one; mu is held.
func (r *retries) remove(e *list.Element) {
	delete(r.answers, e.Value.(*retriedAnswer).key)
	r.oldest.Remove(e)
}

func (r *retries) forget(key string, a *retriedAnswer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e, ok := r.answers[key]; ok && e.Value == a {
		r.remove(e)
	}
}

// repeat gives a credential out again if policy still allows it: a decision is never
// remembered.
func (b *Broker) repeat(ctx context.Context, action Action, c Caller, req Request, cred *Credential) (*Credential, error) {
	e := b.entry(action, c)
	g := cred.Grant
	e.Audience, e.Scopes, e.TTL, e.Binding, e.Grant = g.Audience, g.Scopes, g.Expires.Sub(g.IssuedAt), g.Binding, g.ID().String()
	q := Question{
		Action: action, Caller: c, Time: b.cfg.Now(),
		Audience: req.Audience, Scopes: req.Scopes, TTL: req.TTL, Binding: req.Binding,
	}
	if !req.Subject.IsZero() {
		parent, err := b.subject(ctx, c, req.Subject)
		if err != nil {
			return nil, b.refuse(e, err)
		}
		q.Parent = &parent.Claims
	}
	if _, err := b.decide(ctx, q, &e); err != nil {
		return nil, b.refuse(e, err)
	}
	e.Outcome, e.Message = "allowed", "repeated"
	if err := b.cfg.Audit(e); err != nil {
		return nil, fmt.Errorf("writing the audit: %w", err)
	}
	return cred, nil
}
