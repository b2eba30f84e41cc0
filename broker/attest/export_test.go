package attest

// AssertionBurst is how many JWT-SVIDs an identity may show at once.
const AssertionBurst = assertionBurst

// Remembered is how many JWT-SVIDs are.
func (a *Attestor) Remembered() int { return a.signed.Len() }
