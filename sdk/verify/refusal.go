package verify

import (
	"errors"
	"fmt"

	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
)

// A Reason says why a token was refused. Reasons are stable.
type Reason string

// The reasons of a refusal.
const (
	// TokenMissing: there is no token in the request.
	TokenMissing Reason = "TOKEN_MISSING"
	// RequestInvalid: there is more than one Authorization header in the request, of which
	// two readers could choose differently.
	RequestInvalid Reason = "INVALID_REQUEST"
	// TokenMalformed: not a token of dayfly, whoever signed it.
	TokenMalformed Reason = "TOKEN_MALFORMED"
	// SignatureInvalid: the key is known and did not sign this.
	SignatureInvalid Reason = "SIGNATURE_INVALID"
	// KeyUnknown: signed by a key that the feed has not published, also after asking.
	KeyUnknown Reason = "KEY_UNKNOWN"
	// KeyRevoked: a key in its lineage is revoked.
	KeyRevoked Reason = "KEY_REVOKED"
	// TokenRevoked: a revocation matches its lineage; Refusal.By is its number.
	TokenRevoked Reason = "TOKEN_REVOKED"
	// TokenExpired: exp has passed, with the leeway.
	TokenExpired Reason = "TOKEN_EXPIRED"
	// TokenNotYetValid: nbf has not come, with the leeway.
	TokenNotYetValid Reason = "TOKEN_NOT_YET_VALID"
	// TokenTooLong: it would live longer than any honest token.
	TokenTooLong Reason = "TOKEN_TOO_LONG_LIVED"
	// IssuerMismatch: another broker's token.
	IssuerMismatch Reason = "ISSUER_MISMATCH"
	// AudienceMismatch: addressed to somebody else.
	AudienceMismatch Reason = "AUDIENCE_MISMATCH"
	// PresenterMismatch: the peer is not the identity that the token is bound to.
	PresenterMismatch Reason = "PRESENTER_MISMATCH"
	// CertificateMismatch: the peer's certificate is not the one that the token is
	// bound to.
	CertificateMismatch Reason = "CERTIFICATE_MISMATCH"
	// WrongEra: issued before the broker's store was restored from a backup.
	WrongEra Reason = "WRONG_ERA"
	// OffLog: issued at a position that this log never had.
	OffLog Reason = "OFF_LOG"
	// BelowHorizon: issued so long ago that it has expired, whatever the clock says.
	BelowHorizon Reason = "BELOW_HORIZON"
	// Ahead: issued at a position that the feed does not reach, also after asking.
	Ahead Reason = "AHEAD"
	// ScopeMissing: valid, but without the scope that is needed.
	ScopeMissing Reason = "SCOPE_MISSING"
	// VerifierStale: what the verifier knows is older than its bound, so it refuses
	// every token.
	VerifierStale Reason = "VERIFIER_STALE"
	// VerifierForked: the verifier was shown two histories of the log. It refuses
	// everything until an operator has looked and restarted it.
	VerifierForked Reason = "VERIFIER_FORKED"
)

// A Refusal is every no of a verifier. Nothing in it is secret or quotes the token.
type Refusal struct {
	Reason  Reason
	Message string
	Hint    string // what to try next
	// By is the number of the revocation that is to blame, 0 for none.
	By uint64
}

func (r *Refusal) Error() string {
	if r.Hint == "" {
		return fmt.Sprintf("%s: %s", r.Reason, r.Message)
	}
	return fmt.Sprintf("%s: %s (%s)", r.Reason, r.Message, r.Hint)
}

// Is makes two refusals equal when their reasons are, so that
// errors.Is(err, verify.Because(verify.TokenRevoked)) asks for one.
func (r *Refusal) Is(target error) bool {
	other, ok := target.(*Refusal)
	return ok && other.Reason == r.Reason
}

// ReasonOf returns the reason of a refusal, "" for any other error and for nil.
func ReasonOf(err error) Reason {
	var r *Refusal
	if errors.As(err, &r) {
		return r.Reason
	}
	return ""
}

// Because returns the refusal of a reason with its usual words.
func Because(reason Reason) *Refusal {
	message, hint := words(reason)
	return &Refusal{Reason: reason, Message: message, Hint: hint}
}

const (
	fetchAnew   = "fetch a new token"
	asReceived  = "present the access token exactly as it was received"
	ownIdentity = "present your own token over mTLS with your own SVID"
)

func words(reason Reason) (message, hint string) {
	switch reason {
	case TokenMissing:
		return "the request carries no token", "send it as Authorization: Bearer TOKEN"
	case RequestInvalid:
		return "the request has more than one Authorization header", "send one token"
	case TokenMalformed:
		return "this is not a token of dayfly", asReceived
	case SignatureInvalid:
		return "the token's signature is not good", asReceived
	case KeyUnknown:
		return "the token was signed by an unknown key", fetchAnew
	case KeyRevoked:
		return "a key that signed the token or its lineage is revoked", fetchAnew
	case TokenRevoked:
		return "the token is revoked", "it stays so; fetch a new one, if policy and locks allow"
	case TokenExpired:
		return "the token has expired", fetchAnew
	case TokenNotYetValid:
		return "the token is not valid yet", "compare the clocks of broker and verifier"
	case TokenTooLong:
		return "the token would live longer than any token may", fetchAnew
	case IssuerMismatch:
		return "the token is of another issuer", "fetch it from the broker that this service trusts"
	case AudienceMismatch:
		return "the token is addressed to another audience", "fetch or exchange a token for this one"
	case PresenterMismatch:
		return "the token is bound to another identity than the peer's", ownIdentity
	case CertificateMismatch:
		return "the token is bound to another certificate than the peer's", "fetch a new token with the current SVID"
	case WrongEra:
		return "the token is of another era: the broker's store was restored since", fetchAnew
	case OffLog:
		return "the token names a position that the log never had", fetchAnew
	case BelowHorizon:
		return "the token is older than any live one", fetchAnew
	case Ahead:
		return "the token is newer than what the feed has told", "try again"
	case ScopeMissing:
		return "the token lacks a scope that is needed", "ask for a token with that scope"
	case VerifierStale:
		return "the verifier has not heard from its feed for longer than its bound", "try again; if it lasts, look at the verifier's connection to the broker"
	case VerifierForked:
		return "the verifier was shown two histories of the log", "it opens by itself once an operator has restored the broker's store: docs/operations.md"
	}
	return "refused", ""
}

// unparsed turns an error of token.Parse into a refusal.
func unparsed(err error) *Refusal {
	switch {
	case errors.Is(err, token.ErrUnknownKey):
		return Because(KeyUnknown)
	case errors.Is(err, token.ErrSignature):
		return Because(SignatureInvalid)
	}
	r := Because(TokenMalformed)
	r.Message = err.Error() // names the field; never quotes the token
	return r
}

// killed turns a verdict into a refusal; nil for a live token.
func killed(v revocation.Verdict) *Refusal {
	var r *Refusal
	switch v.Reason {
	case revocation.Alive:
		return nil
	case revocation.Revoked:
		r = Because(TokenRevoked)
	case revocation.KeyRevoked:
		r = Because(KeyRevoked)
	case revocation.WrongEra:
		r = Because(WrongEra)
	case revocation.OffLog:
		r = Because(OffLog)
	case revocation.BelowHorizon:
		r = Because(BelowHorizon)
	default:
		r = Because(Ahead)
	}
	r.By = v.By
	return r
}
