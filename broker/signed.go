package broker

import (
	"context"
	"sync"
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
)

// signWithin bounds a proof that many wait for: it hangs on no caller's deadline.
const signWithin = 15 * time.Second

// signing gathers the pings that want a signed head: those that arrive while a proof is
// under way share the next one and its one signature. Nobody waits for a timer, and where
// nobody asks nothing is signed.
type signing struct {
	mu      sync.Mutex
	next    *headBatch
	running bool
}

// headBatch is the pings of one proof.
type headBatch struct {
	nonces []string
	done   chan struct{} // closed when the rest is set
	tree   *feed.NonceTree
	proof  Proof
	err    error
}

// Answer proves what a ping asks for. A relay that asked for signed heads gets one each
// time: those below it check their own pings against it. Anyone else who asked only
// keeps it, to show it to a broker that may have lost records since, so it gets one with
// its first ping and whenever the head is another: signing and sending one for every ping
// of a fleet would prove nothing more.
func (f *Follower) Answer(ctx context.Context, nonce string) (Proof, error) {
	b := f.b
	if b.cfg.SignHead == nil || !f.signed || !f.relay && f.shown == b.Head() {
		return f.Prove(ctx)
	}
	if err := f.Check(); err != nil {
		return Proof{}, err
	}
	if err := b.checkSilence(); err != nil {
		return Proof{}, err
	}
	p, err := b.proveSigned(ctx, nonce)
	if err != nil {
		return Proof{}, storeRefusal(err)
	}
	f.shown = p.Head
	if !f.answering() {
		return Proof{}, ErrForgotten
	}
	return p, nil
}

// proveSigned joins the next batch and waits for it.
func (b *Broker) proveSigned(ctx context.Context, nonce string) (Proof, error) {
	s := &b.signing
	s.mu.Lock()
	if s.next == nil {
		s.next = &headBatch{done: make(chan struct{})}
	}
	batch, i := s.next, len(s.next.nonces)
	batch.nonces = append(batch.nonces, nonce)
	if !s.running {
		s.running = true
		go b.signBatches(context.WithoutCancel(ctx))
	}
	s.mu.Unlock()
	select {
	case <-batch.done:
	case <-ctx.Done():
		return Proof{}, ctx.Err()
	}
	p := batch.proof
	if batch.tree != nil {
		p.Path = batch.tree.Path(i)
	}
	return p, batch.err
}

// signBatches proves and signs for as long as somebody waits.
func (b *Broker) signBatches(ctx context.Context) {
	s := &b.signing
	for {
		s.mu.Lock()
		batch := s.next
		s.next = nil
		if batch == nil {
			s.running = false
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
		b.signBatch(ctx, batch)
		close(batch.done)
	}
}

func (b *Broker) signBatch(ctx context.Context, batch *headBatch) {
	ctx, cancel := context.WithTimeout(ctx, signWithin)
	defer cancel()
	if batch.err = b.owns(ctx); batch.err != nil {
		return
	}
	st, err := b.cfg.Store.State(ctx)
	if err == nil {
		err = b.state.await(ctx, st.Head.Seq)
	}
	if err != nil {
		batch.err = err
		return
	}
	// Head, horizon and keys of one moment: at or after the proof.
	b.state.mu.RLock()
	l := &b.state.log
	statement := feed.HeadStatement{
		Head: l.Head(), Horizon: l.Horizon(), KeySet: feed.KeySetDigest(l.Events()), SignedAt: b.cfg.Now().UTC(),
	}
	b.state.mu.RUnlock()
	batch.proof = Proof{Head: statement.Head, Horizon: statement.Horizon}
	tree := feed.NewNonceTree(batch.nonces)
	statement.NonceRoot = tree.Root()
	signed, err := b.cfg.SignHead(statement)
	if err != nil {
		// A relay's own knowledge needs no signature; those behind it on other hosts
		// close.
		b.cfg.Log.ErrorContext(ctx, "signing a head failed; verifiers behind relays on other hosts get no answer", "err", err)
		return
	}
	batch.tree, batch.proof.Signed = tree, signed
}

// A Silence is why a broker issues nothing and proves nothing to anybody.
type Silence struct {
	Head     feed.Position // what was signed, and isn't on this log
	SignedAt time.Time     // by the signer's clock
	ShownBy  string        // the verifier's SPIFFE ID
	Since    time.Time
}

// Silent returns the silence of this process, nil where there is none. It lasts until the
// process ends; the next verifier that kept such a head brings it back.
func (b *Broker) Silent() *Silence { return b.silence.Load() }

func (b *Broker) checkSilence() error {
	s := b.silence.Load()
	if s == nil {
		return nil
	}
	return ErrLogBehind.because("a broker signed for %s on %s, and this broker's log lacks it", s.Head, s.SignedAt.Format(time.RFC3339)).
		with("signed_head", s.Head.String()).with("shown_by", s.ShownBy)
}

// heard looks at the newest signed head that a subscriber kept. If a broker did sign it,
// and this log lacks it, records were lost: new verifiers would never learn of them, so
// this broker goes silent until an operator has looked. Whatever isn't signed is a claim
// that anybody could make, and a line in the log.
func (b *Broker) heard(ctx context.Context, c Caller, h feed.SignedHead) error {
	claimed, err := feed.ParseHeadStatement(h.Statement)
	if err != nil || !b.lacks(claimed.Head) || b.cfg.VerifyHead == nil {
		return nil // most often there is none, or it is an old one
	}
	s, err := b.cfg.VerifyHead(h)
	if err != nil {
		b.cfg.Log.ErrorContext(ctx, "a verifier shows a head that no broker is known to have signed", "verifier", c.Actor(), "head", claimed.Head.String(), "err", err)
		return nil
	}
	// On a shared store another broker may have signed what this one hasn't applied yet.
	if err := b.owns(ctx); err != nil {
		return storeRefusal(err)
	}
	if err := b.catchUp(ctx); err != nil {
		return storeRefusal(err)
	}
	switch disregard := b.cfg.Disregard; {
	case !b.lacks(s.Head):
		return nil
	case s.Head.Era == disregard.Era && s.Head.Seq <= disregard.Seq:
		b.cfg.Log.WarnContext(ctx, "a verifier shows a signed head that this log lacks, and that an operator said to disregard", "verifier", c.Actor(), "head", s.Head.String())
		return nil
	}
	return b.goSilent(ctx, c, s)
}

func (b *Broker) goSilent(ctx context.Context, c Caller, s feed.HeadStatement) error {
	silence := &Silence{Head: s.Head, SignedAt: s.SignedAt, ShownBy: c.Actor(), Since: b.cfg.Now().UTC()}
	if !b.silence.CompareAndSwap(nil, silence) {
		return nil // it is, and the first reason is as good as any
	}
	b.cfg.Log.ErrorContext(ctx, "THIS LOG LACKS A RECORD THAT A BROKER SIGNED FOR: nothing is issued and no verifier is told that it is current until an operator has looked; revoking works",
		"signed_head", s.Head.String(), "signed_at", s.SignedAt, "shown_by", c.Actor(), "head", b.Head().String())
	e := b.entry(ActionFollow, c)
	e.Outcome, e.Reason, e.Alert = "refused", ErrLogBehind.Reason, true
	e.Message = "the log lacks " + s.Head.String() + ", signed at " + s.SignedAt.Format(time.RFC3339) + ": the broker is silent"
	return b.cfg.Audit(e)
}

// lacks reports whether a position is above this log, or has another history on it. Of a
// number that was pruned nobody can tell.
func (b *Broker) lacks(p feed.Position) bool {
	b.state.mu.RLock()
	defer b.state.mu.RUnlock()
	head := b.state.log.Head()
	if p.Compare(head) > 0 {
		return true
	}
	at, known := b.state.log.At(p.Seq)
	return known && p.ForkOf(at)
}
