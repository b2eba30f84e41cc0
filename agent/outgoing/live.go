package outgoing

import (
	"context"
	"net/http"
	"sync"

	"github.com/dayflyhq/dayfly/agent/hop"
	"github.com/dayflyhq/dayfly/proto/token"
)

// An exchange is one request under way.
type exchange struct {
	ctx     context.Context // of the request; its cause is a *refusal if it was cut
	cancel  context.CancelCauseFunc
	http1   bool
	grpc    bool
	secret  token.Secret
	body    *replay // nil: there is none
	outcome Outcome
	reason  string // "" if the upstream answered
	// answered says that the upstream's answer has begun.
	answered bool
}

type exchangeKey struct{}

func exchangeOf(ctx context.Context) *exchange {
	x, ok := ctx.Value(exchangeKey{}).(*exchange)
	if !ok {
		panic("internal error: a request without an exchange")
	}
	return x
}

// begin makes the exchange of a request.
func begin(r *http.Request) (*http.Request, *exchange) {
	x := &exchange{http1: r.ProtoMajor == 1, grpc: hop.IsGRPC(r)}
	ctx, cancel := context.WithCancelCause(r.Context())
	x.cancel = cancel
	x.ctx = context.WithValue(ctx, exchangeKey{}, x)
	return r.WithContext(x.ctx), x
}

// early reports whether an answer begins before its request has ended, on a connection of
// HTTP/1: what is left of the body must not be taken for the next request, so there is none.
func (x *exchange) early() bool { return x.http1 && x.body != nil && !x.body.done() }

// live is all requests under way, to be ended when their tokens are revoked.
type live struct {
	tokens Tokens

	mu  sync.Mutex
	all map[*exchange]*token.Claims // nil: no token yet, or one that nobody takes back
	// drained is closed when all is empty, while somebody waits for that.
	drained chan struct{}
}

func newLive(tokens Tokens) *live { return &live{tokens: tokens, all: map[*exchange]*token.Claims{}} }

func (l *live) add(x *exchange) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all[x] = nil
}

func (l *live) remove(x *exchange) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.all, x)
	if l.drained != nil && len(l.all) == 0 {
		close(l.drained)
		l.drained = nil
	}
}

// drain returns a channel that is closed once nothing is under way.
func (l *live) drain() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	done := make(chan struct{})
	if len(l.all) == 0 {
		close(done)
	} else {
		l.drained = done
	}
	return done
}

// hold says with which token a request is made, and reports false if that is revoked.
func (l *live) hold(x *exchange, claims *token.Claims) bool {
	l.mu.Lock()
	l.all[x] = claims
	l.mu.Unlock()
	return !l.tokens.Revoked(claims) // after it is in the list: whatever comes later finds it
}

// watch cuts what is revoked, until ctx ends.
func (l *live) watch(ctx context.Context) {
	for {
		changed := l.tokens.Changed()
		l.mu.Lock()
		verdicts := map[*token.Claims]bool{}
		for x, claims := range l.all {
			if claims == nil {
				continue
			}
			if _, ok := verdicts[claims]; !ok {
				verdicts[claims] = l.tokens.Revoked(claims)
			}
			if verdicts[claims] {
				x.cancel(errRevoked)
			}
		}
		l.mu.Unlock()
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
	}
}

// cut ends everything.
func (l *live) cut(why *refusal) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for x := range l.all {
		x.cancel(why)
	}
}
