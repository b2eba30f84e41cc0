package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/spf13/pflag"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// maxSelectors is what one record holds, as the protocol says.
const maxSelectors = 64

// selectorFlags collect what is to be revoked: a list for each kind.
type selectorFlags struct {
	values     map[revocation.Kind]*[]string
	everything bool
}

// selectorKinds are the flags, in the order in which help and records have them.
var selectorKinds = []struct {
	kind       revocation.Kind
	flag, help string
}{
	{revocation.KindIdentity, "identity", "SPIFFE `ID`, anywhere in a lineage"},
	{revocation.KindSubtree, "subtree", "every identity below a `path`, by whole segments: spiffe://example.org/ns/prod/*"},
	{revocation.KindTrustDomain, "trust-domain", "every identity of a trust domain: its `name`"},
	{revocation.KindAudience, "audience", "every token addressed to an audience: its `name`"},
	{revocation.KindSVID, "svid", "one certificate, by its `thumbprint`: 32 hexadecimal digits"},
	{revocation.KindKey, "key", "every token signed by a key: its `kid`"},
	{revocation.KindGrant, "grant", "one grant and all derived from it: its `id`"},
}

func (s *selectorFlags) add(f *pflag.FlagSet) {
	s.values = map[revocation.Kind]*[]string{}
	for _, k := range selectorKinds {
		list := new([]string)
		s.values[k.kind] = list
		f.StringArrayVar(list, k.flag, nil, k.help+"; repeatable")
	}
	f.BoolVar(&s.everything, "everything", false, "every token there is")
}

// parse returns the selectors, each once; all that is malformed is said at once.
func (s *selectorFlags) parse() ([]revocation.Selector, error) {
	var (
		out   []revocation.Selector
		wrong []string
	)
	for _, k := range selectorKinds {
		for _, v := range *s.values[k.kind] {
			sel, err := revocation.New(k.kind, v)
			if err != nil {
				wrong = append(wrong, fmt.Sprintf("--%s %q: %s", k.flag, short80(v), strings.TrimPrefix(err.Error(), "selector "+string(k.kind)+": ")))
				continue
			}
			if !slices.Contains(out, sel) {
				out = append(out, sel)
			}
		}
	}
	if s.everything {
		out = append(out, revocation.Everything())
	}
	if len(wrong) > 0 {
		return nil, usagef("nothing was done; --help shows how each is written", "%s", strings.Join(wrong, "; "))
	}
	return out, nil
}

func short80(s string) string {
	const most = 80
	if len(s) > most {
		return s[:8] + "..."
	}
	return s
}

// selectorText writes a selector of a message as KIND:VALUE.
func selectorText(m *dayflyv1.Selector) string {
	s, err := wire.ToSelector(m)
	if err != nil {
		return "(unknown selector)"
	}
	return s.String()
}

func selectorTexts(ms []*dayflyv1.Selector) string {
	out := make([]string, len(ms))
	for i, m := range ms {
		out[i] = selectorText(m)
	}
	return strings.Join(out, ", ")
}

// lockFlags say who gets new credentials after a revocation.
type lockFlags struct {
	mode  string
	last  time.Duration
	until string // RFC 3339
}

// lockModes are what --lock takes.
var lockModes = map[string]dayflyv1.LockMode{
	"":           dayflyv1.LockMode_LOCK_MODE_UNSPECIFIED,
	"quarantine": dayflyv1.LockMode_LOCK_MODE_QUARANTINE,
	"reissue":    dayflyv1.LockMode_LOCK_MODE_REISSUE,
	"none":       dayflyv1.LockMode_LOCK_MODE_NONE,
}

// parse checks the lock against what it would be on.
func (l *lockFlags) parse(selectors []revocation.Selector, now time.Time) (dayflyv1.LockMode, error) {
	mode, ok := lockModes[l.mode]
	if !ok {
		return 0, usagef("one of quarantine, reissue, none", "unknown --lock %q", l.mode)
	}
	switch {
	case l.last < 0:
		return 0, usagef("write a duration such as 30m", "--lock-for is negative")
	case l.last > 0 && l.until != "":
		return 0, usagef("give one of the two", "both --lock-for and --lock-until are given")
	}
	if _, err := l.end(now); err != nil {
		return 0, err
	}
	ends := l.last > 0 || l.until != ""
	lockable := slices.ContainsFunc(selectors, revocation.Selector.Lockable)
	asked := mode == dayflyv1.LockMode_LOCK_MODE_QUARANTINE || mode == dayflyv1.LockMode_LOCK_MODE_REISSUE
	switch {
	case asked && !lockable:
		return 0, usagef("leave --lock out, or revoke the identity as well", "only an identity, a subtree, a trust domain or an SVID can be locked")
	case ends && (mode == dayflyv1.LockMode_LOCK_MODE_NONE || !lockable):
		return 0, usagef("leave it out", "an end of the lock without a lock")
	case ends && !slices.ContainsFunc(selectors, endable):
		return 0, usagef("leave the end out", "a lock on an SVID ends when that SVID has expired")
	}
	return mode, nil
}

func endable(s revocation.Selector) bool {
	return s.Lockable() && s.Kind() != revocation.KindSVID
}

// end is when the lock ends by itself, to the second, so that it can be given again;
// nil: when it is lifted.
func (l *lockFlags) end(now time.Time) (*timestamppb.Timestamp, error) {
	switch {
	case l.last > 0:
		return timestamppb.New(now.Add(l.last).Truncate(time.Second).Add(time.Second)), nil
	case l.until == "":
		return nil, nil
	}
	t, err := time.Parse(time.RFC3339, l.until)
	if err != nil {
		return nil, usagef("write a time such as 2026-11-23T15:00:00Z", "--lock-until %q is no time", short(l.until))
	}
	if !t.After(now) {
		return nil, usagef("it would end before it begins", "--lock-until %s is past", t.UTC().Format(time.RFC3339))
	}
	return timestamppb.New(t), nil
}

// lockName is the mode as --lock takes it.
func lockName(m dayflyv1.LockMode) string {
	for name, mode := range lockModes {
		if mode == m && name != "" {
			return name
		}
	}
	return "-"
}
