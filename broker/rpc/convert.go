package rpc

import (
	"encoding/base64"
	"fmt"
	"strconv"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/wire"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// invalid is the refusal of a field that a message can't have like this.
func invalid(field, what string) error {
	r := *broker.ErrInvalidRequest
	r.Message = field + " " + what
	r.Metadata = map[string]string{"field": field}
	return &r
}

// timestamp is absent for the zero time, never 1970.
func timestamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func bindingMessage(b token.Binding) dayflyv1.Binding { return wire.Binding(b) }

// tokenRequest is what IssueRequest and ExchangeRequest share.
type tokenRequest interface {
	GetAudience() string
	GetScopes() []string
	GetTtl() *durationpb.Duration
	GetBinding() dayflyv1.Binding
	GetIdempotencyKey() string
}

func toRequest(m tokenRequest) (broker.Request, error) {
	req := broker.Request{Audience: m.GetAudience(), Scopes: m.GetScopes(), IdempotencyKey: m.GetIdempotencyKey()}
	if n := len(req.Scopes); n > token.MaxScopes {
		return req, invalid("scopes", fmt.Sprintf("has %d entries, at most %d", n, token.MaxScopes))
	}
	if d := m.GetTtl(); d != nil {
		if err := d.CheckValid(); err != nil || d.AsDuration() <= 0 {
			return req, invalid("ttl", "must be positive; leave it out for the policy's choice")
		}
		req.TTL = d.AsDuration()
	}
	var err error
	if req.Binding, err = wire.ToBinding(m.GetBinding()); err != nil {
		return req, invalid("binding", "is unknown")
	}
	return req, nil
}

// toSelectors says precisely which selector is wrong and why.
func toSelectors(ms []*dayflyv1.Selector) ([]revocation.Selector, error) {
	if len(ms) == 0 || len(ms) > broker.MaxSelectors {
		return nil, invalid("selectors", fmt.Sprintf("has %d entries, 1 to %d", len(ms), broker.MaxSelectors))
	}
	out := make([]revocation.Selector, len(ms))
	for i, m := range ms {
		sel, err := wire.ToSelector(m)
		if err != nil {
			return nil, invalid(fmt.Sprintf("selectors[%d]", i), err.Error())
		}
		out[i] = sel
	}
	return out, nil
}

var lockModes = map[dayflyv1.LockMode]broker.LockMode{
	dayflyv1.LockMode_LOCK_MODE_UNSPECIFIED: "",
	dayflyv1.LockMode_LOCK_MODE_QUARANTINE:  broker.LockQuarantine,
	dayflyv1.LockMode_LOCK_MODE_REISSUE:     broker.LockReissue,
	dayflyv1.LockMode_LOCK_MODE_NONE:        broker.LockNone,
}

func toLockMode(m dayflyv1.LockMode) (broker.LockMode, error) {
	mode, ok := lockModes[m]
	if !ok {
		return "", invalid("lock_mode", "is unknown")
	}
	return mode, nil
}

func lockModeMessage(mode broker.LockMode) dayflyv1.LockMode {
	for m, l := range lockModes {
		if l == mode {
			return m
		}
	}
	return dayflyv1.LockMode_LOCK_MODE_UNSPECIFIED
}

func revocationMessage(r broker.RevocationRecord) *dayflyv1.Revocation {
	m := &dayflyv1.Revocation{
		Position:   wire.Position(r.Position),
		Selectors:  wire.Selectors(r.Record.Revocation.Selectors),
		LockMode:   lockModeMessage(r.Details.Lock),
		LockEndsAt: timestamp(r.Details.LockEnds),
		LockCut:    timestamp(r.Details.LockCut),
		Reason:     r.Details.Reason,
		Actor:      r.Details.Actor,
		Time:       timestamp(r.Details.Time),
		Proposal:   proposalMessage(r.Details.Proposed, nil),
		GivenBack:  r.Details.GivenBack,
	}
	if r.Lift != nil {
		m.Lift = liftMessage(*r.Lift)
	}
	return m
}

func liftMessage(rec broker.Record) *dayflyv1.Lift {
	return &dayflyv1.Lift{
		Lock: rec.Lift.Lock, Reason: rec.Details.Reason, Actor: rec.Details.Actor,
		Time: timestamp(rec.Details.Time), Sequence: rec.Seq, Proposal: proposalMessage(rec.Details.Proposed, nil),
	}
}

// proposedLiftMessage is a lift that waits for its second person.
func proposedLiftMessage(lock uint64, p *broker.Proposal, confirmers []string) *dayflyv1.Lift {
	return &dayflyv1.Lift{
		Lock: lock, Reason: p.Reason, Actor: p.Actor, Time: timestamp(p.Time), Proposal: proposalMessage(p, confirmers),
	}
}

// proposalMessage is nil where one person was enough.
func proposalMessage(p *broker.Proposal, confirmers []string) *dayflyv1.Proposal {
	if p == nil {
		return nil
	}
	return &dayflyv1.Proposal{
		Actor: p.Actor, Reason: p.Reason, Time: timestamp(p.Time), ExpiresAt: timestamp(p.Ends), Confirmers: confirmers,
	}
}

func lockMessage(l broker.Lock) *dayflyv1.Lock {
	return &dayflyv1.Lock{
		Number: l.Number, Selectors: wire.Selectors(l.Selectors), Mode: lockModeMessage(l.Mode),
		EndsAt: timestamp(l.End()), Cut: timestamp(l.Cut), Reason: l.Reason, Actor: l.Actor, Time: timestamp(l.Time),
	}
}

var receiptStates = map[feed.ReceiptState]dayflyv1.ReceiptState{
	feed.Confirmed: dayflyv1.ReceiptState_RECEIPT_STATE_CONFIRMED,
	feed.Pending:   dayflyv1.ReceiptState_RECEIPT_STATE_PENDING,
	feed.Closed:    dayflyv1.ReceiptState_RECEIPT_STATE_CLOSED,
	feed.Unbounded: dayflyv1.ReceiptState_RECEIPT_STATE_UNBOUNDED,
}

func containmentMessage(seq uint64, c *broker.Containment) *dayflyv1.Containment {
	m := &dayflyv1.Containment{
		Sequence:  seq,
		Confirmed: uint64(c.Counts[feed.Confirmed]),
		Pending:   uint64(c.Counts[feed.Pending]),
		Closed:    uint64(c.Counts[feed.Closed]),
		Unbounded: uint64(c.Counts[feed.Unbounded]),
		Contained: c.Contained,
		External:  audienceMessages(c.External),
	}
	for _, r := range c.Receipts {
		m.Receipts = append(m.Receipts, receiptMessage(r, c))
	}
	for _, a := range c.UsesAfter {
		m.UsesAfter = append(m.UsesAfter, &dayflyv1.UseAfter{
			Verifier: a.Verifier, ClaimedIdentity: a.Claimed, Refused: a.Refused, AcceptedKnowing: a.AcceptedKnowing, AcceptedUnaware: a.AcceptedUnaware,
			LastSeen: timestamp(a.LastSeen), Peers: a.Peers, Addresses: a.Addresses, More: a.More,
		})
	}
	switch {
	case c.Contained:
		m.ContainedAt = timestamp(c.Time(c.By))
	case c.Counts[feed.Unbounded] == 0:
		m.ContainedBy = timestamp(c.Time(c.By))
	}
	return m
}

func receiptMessage(r feed.Receipt, c *broker.Containment) *dayflyv1.Receipt {
	m := &dayflyv1.Receipt{
		Identity: r.Verifier.ID.Identity, Instance: r.Verifier.ID.Instance, Audiences: r.Verifier.Audiences,
		State: receiptStates[r.State], MaxStaleness: durationpb.New(r.Verifier.Bound),
		OnStale: wire.OnStale(r.Verifier.AcceptsStale), Via: splitVia(r.Verifier.ID.Via),
		ClaimedIdentity: r.Verifier.Claimed,
	}
	switch r.State {
	case feed.Confirmed, feed.Closed:
		m.Since = timestamp(c.Time(r.At))
	case feed.Pending:
		m.ClosesAt = timestamp(c.Time(r.At))
	}
	return m
}

func audienceMessages(audiences []broker.PlannedAudience) []*dayflyv1.AffectedAudience {
	var out []*dayflyv1.AffectedAudience
	for _, a := range audiences {
		out = append(out, &dayflyv1.AffectedAudience{
			Audience: a.Audience.Name, Owner: a.Audience.Owner, VerifiedBy: a.Audience.VerifiedBy,
			LiveGrants: a.Live, LastExpiry: timestamp(a.LastExpiry), Fallback: fallbackMessage(a.Audience.Fallback),
		})
	}
	return out
}

func fallbackMessage(f broker.Fallback) *dayflyv1.Fallback {
	if f == (broker.Fallback{}) {
		return nil
	}
	return &dayflyv1.Fallback{Owner: f.Owner, Text: f.Text, Link: f.Link}
}

var grantStates = map[broker.GrantState]dayflyv1.GrantState{
	broker.GrantLive:    dayflyv1.GrantState_GRANT_STATE_LIVE,
	broker.GrantExpired: dayflyv1.GrantState_GRANT_STATE_EXPIRED,
	broker.GrantRevoked: dayflyv1.GrantState_GRANT_STATE_REVOKED,
}

func grantMessage(b *broker.Broker, g *broker.Grant) *dayflyv1.Grant {
	state, by := b.GrantState(g)
	m := &dayflyv1.Grant{
		Grant: g.ID().String(), Lineage: wire.Lineage(g.Lineage), Audience: g.Audience, Scopes: g.Scopes,
		Binding: bindingMessage(g.Binding), IssuedAt: timestamp(g.IssuedAt), ExpiresAt: timestamp(g.Expires),
		Position: wire.Position(g.Position), Fingerprint: g.Fingerprint[:], Transaction: g.Transaction,
		State: grantStates[state], RevokedBy: by,
	}
	if g.Peer.IsValid() {
		m.PeerAddress = g.Peer.String()
	}
	return m
}

func pageSize(n int32) (int, error) {
	switch {
	case n < 0 || n > broker.MaxPageSize:
		return 0, invalid("page_size", fmt.Sprintf("is 0 to %d", broker.MaxPageSize))
	case n == 0:
		return broker.PageSize, nil
	}
	return int(n), nil
}

// numberToken is the page token of lists that go down by number.
func numberToken(n uint64) string {
	return base64.RawURLEncoding.EncodeToString([]byte(strconv.FormatUint(n, 10)))
}

func toNumber(pageToken string) (uint64, error) {
	if pageToken == "" {
		return 0, nil
	}
	b, err := base64.RawURLEncoding.DecodeString(pageToken)
	if err != nil {
		return 0, broker.ErrBadPageToken
	}
	n, err := strconv.ParseUint(string(b), 10, 64)
	if err != nil || n == 0 {
		return 0, broker.ErrBadPageToken
	}
	return n, nil
}
