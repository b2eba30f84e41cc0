package verify

// Judge is Verify without counting the use: what counting costs is measured against it.
func (v *Verifier) Judge(raw string, peer Peer) error {
	if _, _, r := v.judge(raw, peer); r != nil {
		return r
	}
	return nil
}
