package broker

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
)

// A LockMode says who can get new credentials after a revocation.
type LockMode string

// The modes of a lock.
const (
	LockQuarantine LockMode = "quarantine" // nobody whom it matches, until lifted
	LockReissue    LockMode = "reissue"    // only SVIDs issued after the cut
	LockNone       LockMode = "none"       // everyone: there is no lock
)

// A Record is one event of the log with its private part: what operators see and
// verifiers don't.
type Record struct {
	feed.Event
	Details Details
}

// Details is the private part of a record. Its SHA-256 is in the event, so that it
// is under the log's running hash too.
type Details struct {
	Time   time.Time `json:"time"`
	Actor  string    `json:"actor"`
	Reason string    `json:"reason,omitempty"`
	// IdempotencyKey makes a retried call find the record it made before.
	IdempotencyKey string `json:"idempotency_key,omitempty"`

	// Proposed is set where it took two persons: Actor is who confirmed.
	Proposed *Proposal `json:"proposed,omitempty"`

	// Lock, LockEnds and LockCut are set with a revocation.
	Lock     LockMode  `json:"lock,omitempty"`
	LockEnds time.Time `json:"lock_ends,omitzero"`
	LockCut  time.Time `json:"lock_cut,omitzero"`
	// SVIDExpires maps an SVID selector's thumbprint to the latest moment that the
	// certificate can still be valid, where known: until then the lock stands.
	SVIDExpires map[string]time.Time `json:"svid_expires,omitempty"`

	// GivenBack is set where the holder revoked its own grant, and no operator did.
	GivenBack bool `json:"given_back,omitempty"`

	// Restored is set with an era that began with a backup.
	Restored *Restored `json:"restored,omitempty"`
	// CarriedFrom is set with what was carried over from an earlier era.
	CarriedFrom *CarriedFrom `json:"carried_from,omitempty"`
}

// Digest returns the SHA-256 of the canonical JSON of the details.
func (d *Details) Digest() [sha256.Size]byte {
	b, err := json.Marshal(d)
	if err != nil {
		panic(fmt.Sprintf("internal error: marshalling details of a record: %v", err))
	}
	return sha256.Sum256(b)
}

// Seal numbers a record and chains it behind a position: the one way that a store
// makes the next record of the log. An era record begins its era; every other record
// continues the era of its predecessor.
func (r Record) Seal(previous feed.Position) (Record, feed.Position) {
	r.Seq = previous.Seq + 1
	r.Private = r.Details.Digest()
	r.Sum = r.Chain(previous.Sum)
	era := previous.Era
	if r.Era != nil {
		era = r.Era.Era
	}
	return r, feed.Position{Era: era, Seq: r.Seq, Sum: r.Sum}
}
