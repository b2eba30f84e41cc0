package verify

// Judge is Verify without counting the use: what counting costs is measured against it.
func (v *Verifier) Judge(raw string, peer Peer) error {
	if _, _, r := v.judge(raw, peer); r != nil {
		return r
	}
	return nil
}

// Counter returns what Verify does beside judging: it counts one use.
func (v *Verifier) Counter(raw string, peer Peer) func() {
	t, at, r := v.judge(raw, peer)
	return func() { v.uses.note(t, at, peer, r, v.cfg.Now()) }
}
