package broker

import (
	"errors"
	"fmt"
	"maps"
)

// A Kind sorts refusals by what the caller can do about them. broker/rpc gives each a
// gRPC code.
type Kind int

// The kinds of refusals.
const (
	Invalid         Kind = iota + 1 // the request itself is wrong: change it
	Unauthenticated                 // no identity, or one that has expired
	Denied                          // a known identity that may not do this
	NotFound                        // there is no such thing, or not for this caller
	Conflict                        // the state of things is against it
	Exhausted                       // a limit is reached: wait
	Unavailable                     // nothing can be recorded or proven now: try again
)

// A Refusal is every answer of the broker that is not a yes. Its reason is stable and
// machine-readable; message and hint are for people. None of it is ever secret.
type Refusal struct {
	Kind     Kind
	Reason   string // UPPER_SNAKE_CASE
	Message  string
	Hint     string
	Metadata map[string]string
}

func (r *Refusal) Error() string { return fmt.Sprintf("%s: %s", r.Reason, r.Message) }

// Is makes two refusals equal when their reasons are.
func (r *Refusal) Is(target error) bool {
	other, ok := target.(*Refusal)
	return ok && other.Reason == r.Reason
}

// because returns a copy of a refusal with a message of its own.
func (r *Refusal) because(format string, args ...any) *Refusal {
	out := *r
	out.Message = fmt.Sprintf(format, args...)
	return &out
}

// with returns a copy with one more metadata entry.
func (r *Refusal) with(key, value string) *Refusal {
	out := *r
	out.Metadata = maps.Clone(r.Metadata)
	if out.Metadata == nil {
		out.Metadata = map[string]string{}
	}
	out.Metadata[key] = value
	return &out
}

// The refusals of the broker, one home per reason. docs/errors.md lists them.
var (
	ErrInvalidRequest = &Refusal{Invalid, "INVALID_REQUEST", "the request is malformed", "see the message for the field", nil}
	ErrTokenTooLarge  = &Refusal{Invalid, "TOKEN_TOO_LARGE", "the token would be too large", "ask for fewer or shorter scopes, or exchange fewer times", nil}

	ErrSVIDExpired   = &Refusal{Unauthenticated, "SVID_EXPIRED", "the SVID of this connection has expired", "fetch the current SVID and connect again", nil}
	ErrNoCertificate = &Refusal{Denied, "BINDING_NEEDS_CERTIFICATE", "a token bound to a certificate needs a caller with one, and this one showed a JWT-SVID", "authenticate with an X.509-SVID over mTLS, or ask for another binding", nil}

	ErrPolicyDenied = &Refusal{Denied, "POLICY_DENIED", "policy does not allow this", "dayfly policy explain shows which rule decided", nil}
	ErrPolicyFailed = &Refusal{Unavailable, "POLICY_UNAVAILABLE", "policy could not be evaluated, so nothing is allowed", "try again; if it lasts, the broker's log says why", nil}
	ErrNoPolicy     = &Refusal{Unavailable, "NO_POLICY", "the broker has had no good policy since it started, so nothing is allowed", "mend the folder (dayfly policy check DIR), or see why no bundle could be taken (its log): the broker takes it up by itself", nil}
	ErrLocked       = &Refusal{Denied, "IDENTITY_LOCKED", "a standing lock refuses this identity", "the security team lifts it with: dayfly lift NUMBER --reason ...", nil}

	ErrSubjectMalformed    = &Refusal{Invalid, "SUBJECT_TOKEN_MALFORMED", "the subject token is not a token of dayfly", "present the access token exactly as it was received", nil}
	ErrSubjectSignature    = &Refusal{Denied, "SUBJECT_TOKEN_SIGNATURE_INVALID", "the subject token's signature is not good", "present the access token exactly as it was received", nil}
	ErrSubjectKeyUnknown   = &Refusal{Denied, "SUBJECT_TOKEN_KEY_UNKNOWN", "the subject token was signed by an unknown key", "it may come from another broker, or from before a restart long ago: fetch a new one", nil}
	ErrSubjectExpired      = &Refusal{Denied, "SUBJECT_TOKEN_EXPIRED", "the subject token has expired", "its presenter fetches a new one", nil}
	ErrSubjectRevoked      = &Refusal{Denied, "SUBJECT_TOKEN_REVOKED", "the subject token is revoked", "it stays so; its presenter needs a new one, if policy and locks allow", nil}
	ErrSubjectNotAddressed = &Refusal{Denied, "SUBJECT_TOKEN_NOT_ADDRESSED", "the subject token is addressed to another audience", "only whom a token is addressed to may exchange it", nil}
	ErrSubjectUnknown      = &Refusal{Denied, "SUBJECT_TOKEN_UNKNOWN", "the subject token was never recorded", "this is reported to the operators", nil}
	ErrChainTooDeep        = &Refusal{Denied, "CHAIN_TOO_DEEP", "the chain of exchanges is at its maximal depth", "fetch a token of your own instead of exchanging", nil}
	ErrScopeWiderParent    = &Refusal{Denied, "SCOPE_EXCEEDS_SUBJECT", "a derived token can't have scopes that its subject token lacks", "ask for fewer scopes", nil}
	ErrTTLLongerParent     = &Refusal{Denied, "TTL_EXCEEDS_SUBJECT", "a derived token can't outlive its subject token", "ask for a shorter life, or none", nil}
	ErrIdempotencyReused   = &Refusal{Invalid, "IDEMPOTENCY_KEY_REUSED", "the idempotency key was used for another request", "use a new key for a new request", nil}

	ErrEverythingUnflagged = &Refusal{Invalid, "EVERYTHING_NOT_ALLOWED", "the selector \"everything\" needs its flag", "set allow_everything (--everything) if you mean every credential there is", nil}
	ErrSecondPerson        = &Refusal{Conflict, "SECOND_PERSON_REQUIRED", "whoever proposed it can't confirm it", "another operator runs the same command in time; root on the broker's host needs no second person: --break-glass", nil}
	ErrReasonRequired      = &Refusal{Invalid, "REASON_REQUIRED", "a reason is required", "say why in up to 1,024 characters; it goes to the records", nil}
	ErrNotStanding         = &Refusal{NotFound, "LOCK_NOT_FOUND", "there is no standing lock with this number", "dayfly locks lists those that stand", nil}
	ErrNoSuchGrant         = &Refusal{NotFound, "GRANT_NOT_FOUND", "there is no such grant", "dayfly grants list shows those on record", nil}
	ErrNoSuchRevocation    = &Refusal{NotFound, "REVOCATION_NOT_FOUND", "there is no such revocation", "dayfly revocations list shows those on record", nil}
	ErrBadPageToken        = &Refusal{Invalid, "PAGE_TOKEN_INVALID", "the page token is malformed", "use the token of the previous answer to the same query", nil}

	ErrFeedRejected    = &Refusal{Invalid, "FEED_MESSAGE_INVALID", "a message of the feed is out of order or malformed", "this is a fault of the verifier's library", nil}
	ErrBoundTooLarge   = &Refusal{Invalid, "STALENESS_BOUND_INVALID", "the staleness bound is out of range", "between 500ms and 1h, and no larger than policy data says", nil}
	ErrFull            = &Refusal{Unavailable, "STORE_FULL", "the store's disk is full: nothing can be recorded, so nothing is issued", "free space on the broker's disk; it goes on by itself", nil}
	ErrStoreLost       = &Refusal{Unavailable, "STORE_UNAVAILABLE", "the store can't be written now", "try again; the broker reopens it by itself", nil}
	ErrNoSigningKey    = &Refusal{Unavailable, "NO_SIGNING_KEY", "the broker has no published signing key yet", "try again in a moment", nil}
	ErrKeyNotSpread    = &Refusal{Unavailable, "KEY_NOT_SPREAD_YET", "this audience may still use a copy of the JWK set without the signing key", "wait as long as retry_after says: the broker started without a successor's key, or its key was revoked", nil}
	ErrLogBehind       = &Refusal{Unavailable, "LOG_BEHIND_SIGNED_HEAD", "a broker signed for a record that this broker's log lacks", "records were lost: an operator must look; see docs/operations.md, When a broker is silent", nil}
	ErrForeignKey      = &Refusal{Denied, "KEY_NOT_VOUCHED_FOR", "no broker of this issuer vouches for the signing key", "the next process needs this one's issuer and an SVID of its SPIFFE ID", nil}
	ErrBusy            = &Refusal{Unavailable, "BUSY", "revocations keep arriving faster than this request could be recorded", "try again", nil}
	ErrRosterFull      = &Refusal{Exhausted, "ROSTER_FULL", "this identity has too many verifiers that may still accept tokens", "those that are gone leave once their staleness bound has passed", nil}
	ErrForgotten       = &Refusal{Unavailable, "VERIFIER_FORGOTTEN", "this verifier was silent for so long that it left the roster", "follow anew; the library does so by itself", nil}
	ErrRateLimited     = &Refusal{Exhausted, "ISSUE_RATE_LIMITED", "this identity asks for credentials faster than policy lets it", "wait as long as retry_after says; keep a credential for its life instead of fetching one for each call", nil}
	ErrLiveLimited     = &Refusal{Exhausted, "LIVE_GRANTS_LIMITED", "this identity has as many live credentials as policy lets it", "wait as long as retry_after says, until one expires; keep credentials for their life, ask for shorter ones, or have the limit raised", nil}
	ErrGiveBackLimited = &Refusal{Exhausted, "GIVE_BACK_RATE_LIMITED", "this identity gives credentials back faster than policy lets it", "wait as long as retry_after says, or let short credentials expire", nil}
	ErrGiveBackFull    = &Refusal{Unavailable, "GIVE_BACK_FULL", "so much is revoked that only operators may revoke more", "wait as long as retry_after says, or let the credential expire", nil}
	ErrBackupBusy      = &Refusal{Exhausted, "BACKUP_UNDER_WAY", "another backup is under way", "wait until it has ended", nil}
	ErrBackupGaveWay   = &Refusal{Unavailable, "BACKUP_GAVE_WAY", "the backup was given up, since it held up the broker's own writes", "ask again, and write it to a fast disk", nil}
	ErrTooManyStreams  = &Refusal{Exhausted, "TOO_MANY_STREAMS", "this identity follows the feed with too many streams", "close some, or follow through one agent per host", nil}
)

// storeRefusal turns an error of the store into what a caller may hear.
func storeRefusal(err error) error {
	var refusal *Refusal
	switch {
	case err == nil, errors.As(err, &refusal):
		return err
	case errors.Is(err, ErrStoreFull):
		return ErrFull
	case errors.Is(err, ErrStoreClosed):
		return ErrStoreLost
	}
	return err
}
