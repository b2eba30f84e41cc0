package verify

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

// Forget empties the memory of signed tokens: what Verify answers then can't be of it.
func (v *Verifier) Forget() { v.seen.table.Store(nil) }

// Remembered returns how many signed tokens are remembered.
func (v *Verifier) Remembered() (n int) {
	if table := v.seen.table.Load(); table != nil {
		for i := range table {
			if table[i].Load() != nil {
				n++
			}
		}
	}
	return n
}
