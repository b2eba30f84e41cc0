package attest

// AssertionBurst is how many JWT-SVIDs an identity may show at once.
const AssertionBurst = assertionBurst
