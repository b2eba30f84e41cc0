package verify

import (
	"crypto/x509"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
)

// Judge is Verify without counting the use: what counting costs is measured against it.
func (v *Verifier) Judge(raw string, peer Peer) error {
	if _, j := v.try(raw, peer); j.refusal != nil {
		return j.refusal
	}
	return nil
}

// Counter returns what Verify does beside judging: it counts one use.
func (v *Verifier) Counter(raw string, peer Peer) func() {
	s, j := v.try(raw, peer)
	return func() { v.uses.note(&s.Token, j.at, peer, j.refusal, v.cfg.Now()) }
}

// Welcome, Deliver, Ping and Answer are what the stream does with what comes, for a
// verifier that isn't run.
func (v *Verifier) Welcome(m *dayflyv1.Welcome) error { return v.welcome(m) }

func (v *Verifier) Deliver(m *dayflyv1.FollowResponse) error {
	_, _, err := v.delivered(m)
	return err
}

func (v *Verifier) Ping(nonce string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.fresh.Sent(nonce, v.cfg.Boot())
}

func (v *Verifier) Answer(m *dayflyv1.Pong) error {
	_, _, err := v.answered(m)
	return err
}

// TakeUses returns the uses that were counted since the last call, and how often.
func (v *Verifier) TakeUses() map[string]uint64 {
	out := map[string]uint64{}
	uses, _ := v.uses.take()
	for _, u := range uses {
		n := u.Count
		u.Count = 0
		out[u.String()] = n
	}
	return out
}

// Forget empties the memory of signed tokens: what Verify answers then can't be of it.
func (v *Verifier) Forget() { v.seen.Clear() }

// Remembers reports whether a signed token is remembered.
func (v *Verifier) Remembers(raw string) bool {
	_, ok := v.seen.Get(raw)
	return ok
}

// Sweep forgets what has expired.
func (v *Verifier) Sweep() { v.forget() }

// RemembersChain reports whether a chain with the leaf is remembered, Chains how many are.
func (v *Verifier) RemembersChain(leaf *x509.Certificate) bool { return v.peers.get(leaf.Raw) != nil }

func (v *Verifier) Chains() int {
	v.peers.mu.RLock()
	defer v.peers.mu.RUnlock()
	return len(v.peers.chains)
}

// MaxChains is the most that are remembered.
const MaxChains = maxChains

// Remembered returns how many signed tokens are remembered.
func (v *Verifier) Remembered() int { return v.seen.Len() }
