package supervise

import (
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/proto/token"
)

// What the program holds, from its start on: each thing that happens is noticed once, of
// whatever it may still present.
func TestHoldings(t *testing.T) {
	now := time.Unix(1e9, 0)
	at := func(grant string, life time.Duration) held {
		return held{grant, now.Add(life), &token.Claims{Transaction: grant}}
	}
	dead := map[string]bool{}
	isRevoked := func(c *token.Claims) bool { return dead[c.Transaction] }
	of := func(i int) kind { return kind(i) }
	var h holdings
	look := func(after time.Duration, offered ...[]held) (is [causes]bool) {
		h.look(now.Add(after), offered, of, isRevoked)
		is, h.events = h.events, [causes]bool{}
		return is
	}
	want := func(what string, got [causes]bool, which ...cause) {
		t.Helper()
		var want [causes]bool
		for _, c := range which {
			want[c] = true
		}
		if got != want {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
	}
	env, file1, other := []held{at("env", time.Minute)}, []held{at("file", time.Minute), at("file'", time.Hour)}, []held{at("other", time.Minute)}
	start := func() { h.begin([][]held{env, file1, other}) }

	start()
	want("nothing", look(time.Second, env, file1, other))
	want("nothing is there any more", look(time.Second, nil, nil, nil))
	next := []held{at("env2", 2*time.Minute)}
	want("a successor", look(2*time.Second, next, file1, other), renewed)
	want("the same successor", look(3*time.Second, next, file1, other))
	file2 := []held{at("file2", 2*time.Minute), at("file'", time.Hour)}
	want("a file", look(4*time.Second, next, file2, other), renewed)
	want("what tells of itself", look(5*time.Second, next, file2, []held{at("other2", 2*time.Minute)}))
	dead["file"] = true
	want("what a file held before", look(6*time.Second, next, file2, nil), revoked)
	want("once", look(7*time.Second, next, file2, nil))
	dead["env2"] = true
	want("a successor that it never got", look(8*time.Second, nil, file2, nil))
	want("the end of the environment's", look(time.Minute, nil, file2, nil), expired)
	want("once", look(61*time.Second, nil, file2, nil))
	want("the end of what nobody renewed", look(2*time.Minute, nil, nil, nil), expired)
	dead["file'"] = true
	want("what lives", look(3*time.Minute, nil, nil, nil), revoked)

	// What was revoked doesn't expire as well, and a new start holds nothing of the last.
	dead = map[string]bool{"env": true, "other": true}
	start()
	want("two at once", look(time.Second, next, file1, nil), revoked, renewed)
	want("the ends of the revoked", look(time.Minute-time.Second, next, file1, nil))
	if due := h.due(now.Add(50 * time.Second)); due != 10*time.Second {
		t.Errorf("due in %v", due)
	}
	dead = map[string]bool{}
	h.begin([][]held{next, file2, other})
	dead = map[string]bool{"env": true, "file": true}
	want("what the last one held", look(time.Second, next, file2, other))
}
