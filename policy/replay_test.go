package policy_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/policy"
	"pgregory.net/rapid"
)

// answered is what a policy says to a question, as the audit records it.
func answered(t testing.TB, p *policy.Policy, in policy.Input) policy.Recorded {
	t.Helper()
	d, err := p.Decide(t.Context(), in)
	if err != nil {
		t.Fatal(err)
	}
	r := policy.Recorded{Input: in, Answer: policy.Answer{Allow: d.Allow, Scopes: d.Scopes, TTL: d.TTL, Binding: d.Binding}}
	if !d.Allow {
		r.Answer = policy.Answer{Reason: d.Denials[0].Reason}
	}
	return r
}

func wants(path, audience string, scopes ...string) policy.Input {
	return policy.Input{Action: policy.ActionIssue, Caller: policy.Caller{ID: id(path)}, Audience: audience, Scopes: scopes, Time: time.Unix(1_800_000_000, 0)}
}

const before = `audiences:
  a: {owner: o, identities: [spiffe://dayfly.test/a]}
entitlements:
  spiffe://dayfly.test/denied: {a: {scopes: [r]}}
  spiffe://dayfly.test/short: {a: {scopes: [r], ttl: 10m}}
  spiffe://dayfly.test/capped: {a: {scopes: [r], ttl: 10m}}
  spiffe://dayfly.test/long: {a: {scopes: [r], ttl: 1m}}
  spiffe://dayfly.test/fewer: {a: {scopes: [r, w]}}
  spiffe://dayfly.test/bound: {a: {scopes: [r], binding: none}}
  spiffe://dayfly.test/same: {a: {scopes: [r]}}
operators:
  spiffe://dayfly.test/ops: [list]
`

const after = `audiences:
  a: {owner: o, identities: [spiffe://dayfly.test/a]}
entitlements:
  spiffe://dayfly.test/short: {a: {scopes: [r], ttl: 1m}}
  spiffe://dayfly.test/capped: {a: {scopes: [r], ttl: 7m}}
  spiffe://dayfly.test/long: {a: {scopes: [r], ttl: 2m}}
  spiffe://dayfly.test/fewer: {a: {scopes: [r, x]}}
  spiffe://dayfly.test/bound: {a: {scopes: [r], binding: x5t}}
  spiffe://dayfly.test/same: {a: {scopes: [r]}}
  spiffe://dayfly.test/allowed: {a: {scopes: [r]}}
`

// A candidate that denies, allows, shortens and the rest is told apart from one that
// does the same, question by question, with how often each was asked.
func TestReplay(t *testing.T) {
	now := load(t, policy.Config{Dir: written(t, map[string]string{"data.yaml": before})})
	candidate := load(t, policy.Config{Dir: written(t, map[string]string{"data.yaml": after}), Timeout: patience})
	var asked []policy.Recorded
	for i, path := range []string{"/denied", "/short", "/capped", "/long", "/fewer", "/bound", "/same", "/allowed", "/nobody", "/same", "/denied"} {
		r := answered(t, now, wants(path, "a"))
		r.Input.Time = r.Input.Time.Add(time.Duration(i) * time.Second)
		r.Input.PeerAddress = fmt.Sprintf("192.0.2.1:%d", i)
		if path == "/capped" {
			r.Given = 5 * time.Minute // below both
		}
		asked = append(asked, r)
	}
	asked = append(asked, answered(t, now, policy.Input{Action: policy.ActionList, Caller: policy.Caller{ID: id("/ops")}}))

	got, err := candidate.Replay(t.Context(), slices.Values(asked))
	if err != nil {
		t.Fatal(err)
	}
	type line struct {
		caller string
		kinds  []policy.ChangeKind
		count  int
	}
	want := []line{
		{"/denied", []policy.ChangeKind{policy.NewlyDenied}, 2},
		{"/ops", []policy.ChangeKind{policy.NewlyDenied}, 1},
		{"/short", []policy.ChangeKind{policy.Shortened}, 1},
		{"/fewer", []policy.ChangeKind{policy.FewerScopes, policy.MoreScopes}, 1},
		{"/bound", []policy.ChangeKind{policy.StricterBound}, 1},
		{"/allowed", []policy.ChangeKind{policy.NewlyAllowed}, 1},
		{"/long", []policy.ChangeKind{policy.Lengthened}, 1},
	}
	if got.Asked != 12 || got.Same != 4 || len(got.Changes) != len(want) || got.Revision != candidate.Status().Revision {
		t.Errorf("asked %d, same %d, %d changes: %+v", got.Asked, got.Same, len(got.Changes), got)
	}
	for i, c := range got.Changes {
		if w := want[i]; c.Caller != id(w.caller).String() || !slices.Equal(c.Kinds, w.kinds) || c.Count != w.count {
			t.Errorf("%d: %s %v x %d, want %+v", i, c.Caller, c.Kinds, c.Count, w)
		}
	}
	if c := got.Changes[0]; c.Before.Allow != true || c.After.Reason != "no_entitlement" || c.Message == "" || c.Last != asked[10].Input.Time {
		t.Errorf("%+v", c)
	}
	if got.Count(policy.NewlyDenied) != 3 {
		t.Errorf("newly denied: %d", got.Count(policy.NewlyDenied))
	}
}

// What fails to evaluate is refused by the broker, and so counts as denied.
func TestReplayFailure(t *testing.T) {
	p := rules(t, "decision := {\"allow\": true, \"mistake\": 1}", policy.Config{})
	got, err := p.Replay(t.Context(), slices.Values([]policy.Recorded{{Input: wants("/x", "a"), Answer: policy.Answer{Allow: true}}}))
	if err != nil || got.Count(policy.NewlyDenied) != 1 || got.Changes[0].After.Reason != policy.ReasonFailed {
		t.Errorf("%+v, %v", got, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := p.Replay(ctx, slices.Values([]policy.Recorded{{}})); !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
}

// The policy that answered changes nothing, whatever was asked.
func TestReplayAgainstItself(t *testing.T) {
	p := load(t, policy.Config{Dir: written(t, map[string]string{"more.yaml": templates}), Timeout: patience})
	rapid.Check(t, func(rt *rapid.T) {
		var asked []policy.Recorded
		for range rapid.IntRange(0, 20).Draw(rt, "questions") {
			in := wants(rapid.SampledFrom([]string{"/ns/shop/payments", "/ns/shop/orders", "/ns/other/reports", "/ops/alice", "/x"}).Draw(rt, "caller"),
				rapid.SampledFrom([]string{"orders", "ledger", "web", "minio/shop", "nowhere"}).Draw(rt, "audience"),
				rapid.SliceOfDistinct(rapid.SampledFrom([]string{"orders.read", "ledger.read", "web.read"}), rapid.ID).Draw(rt, "scopes")...)
			in.Action = rapid.SampledFrom([]policy.Action{policy.ActionIssue, policy.ActionExchange, policy.ActionRevoke, policy.ActionFollow}).Draw(rt, "action")
			in.TTL = rapid.SampledFrom([]time.Duration{0, time.Minute, time.Hour}).Draw(rt, "ttl")
			in.ParentAudience, in.ParentScopes = "orders", []string{"ledger.read"}
			asked = append(asked, answered(t, p, in))
		}
		got, err := p.Replay(t.Context(), slices.Values(asked))
		if err != nil || got.Asked != len(asked) || got.Same != len(asked) || len(got.Changes) != 0 {
			rt.Fatalf("%+v, %v", got, err)
		}
	})
}
