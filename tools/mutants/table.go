package main

import (
	"regexp"
	"strconv"
)

// A mutant is one mistake, planted in the code for one build of the test that is to find it.
type mutant struct {
	// trap is its number in the list of the design's traps; "" for one of our own.
	trap string
	// mistake says it in a few words.
	mistake string
	// edits plant it. Each old text is there exactly once.
	edits []edit
}

// A hunter is a test that goes through histories.
type hunter struct {
	dir, test string
	flags     func(seeds int) []string
	// found has two groups: which history failed (or how many had passed, from which its
	// number is one more), and, where the test alone doesn't say, what it broke.
	found *regexp.Regexp
}

var simulation = hunter{
	dir: "broker", test: "TestSimulation",
	flags: func(seeds int) []string { return []string{"-sim.seeds", strconv.Itoa(seeds), "-sim.noshrink"} },
	found: regexp.MustCompile(`seed (?P<history>\d+): (?P<broken>[A-Z]\d): `),
}

// twins are a verifier that remembers signed tokens and one that doesn't, peers the same
// for chains of certificates.
var (
	twins = sameAs("TestSameAnswers")
	peers = sameAs("TestSamePeers")
)

func sameAs(test string) hunter {
	return hunter{
		dir: "sdk/verify", test: test,
		flags: func(seeds int) []string {
			return []string{"-rapid.checks", strconv.Itoa(seeds), "-rapid.nofailfile", "-rapid.shrinktime", "1ms"}
		},
		found: regexp.MustCompile(`\[rapid\] (?:failed|panic) after (?P<passed>\d+) tests`),
	}
}

type edit struct{ file, old, new string }

// hunts is who is to find what.
var hunts = []struct {
	hunter
	mutants []mutant
}{{simulation, mutants}, {twins, remembering}, {peers, rememberingPeers}}

// Where the mistakes are made: the real code, or, for what a verifier's or an agent's
// streams do with it, the simulation's follower, which does the same in the same order.
const (
	exchange  = "broker/exchange.go"
	follow    = "broker/follow.go"
	issue     = "broker/issue.go"
	prune     = "broker/prune.go"
	relayedGo = "broker/relayed.go"
	restore   = "broker/restore.go"
	revoke    = "broker/revoke.go"
	second    = "broker/second.go"
	signed    = "broker/signed.go"
	stateGo   = "broker/state.go"
	uses      = "broker/uses.go"
	feedSign  = "proto/feed/signed.go"
	memory    = "proto/token/memory.go"
	verifier  = "sdk/verify/verifier.go"
	peerGo    = "sdk/verify/peer.go"
	screen    = "proto/feed/screen.go"
	freshness = "proto/feed/freshness.go"
	logGo     = "proto/feed/log.go"
	relay     = "proto/feed/relay.go"
	roster    = "proto/feed/roster.go"
	view      = "proto/feed/view.go"
	selector  = "proto/revocation/selector.go"
	set       = "proto/revocation/set.go"
	distrust  = "broker/sim_signed_test.go"
	follower  = "broker/sim_fleet_test.go"
	machine   = "broker/sim_test.go"
)

func one(file, old, new string) []edit { return []edit{{file, old, new}} }

// Of the traps' mistakes these are missing. E2 and E3 (a lower head taken for a fork, a
// snapshot that replaces) need an upstream that lags behind who follows it, and a relay
// welcomes nobody before it has caught up with what the broker had then: unit tests of
// proto/feed hold them (TestNoFalseFork, TestSnapshotNeverReplaces). G1 (numbers compared
// across eras) changes nothing by itself: an older era's token is below the horizon that an
// era begins with, or has another hash; TestPositions holds it. C3 (lifting deletes the
// revocation) has no code that could do it.
var mutants = []mutant{
	{"", "a credential is released before its grant is recorded", one(issue,
		"err := b.cfg.Store.Issue(ctx, g, func(newer []Record) error { return admit(g, parent, newer) })",
		"var err error\n\t_ = admit")},
	{"A1", "issuing is not conditional on the head", one(issue,
		"for _, rec := range newer {", "for _, rec := range newer[:0] {")},
	{"B3", "the parent is not read in the moment of the position", one(issue,
		"if err := s.checkParent(parent, now); err != nil {", "if err := s.checkParent(parent, now); err != nil && !now.Before(parent.Expires) {")},
	{"Z0b", "a grant of an old head commits however late", one(issue,
		"if rec.Era != nil || g.Expires.After(rec.Details.Time.Add(token.MaxTTL+token.Leeway)) {", "if rec.Era != nil {")},
	{"A3", "'>=' where '>' belongs", one(set,
		"if seq := s.newestMatch(sub); seq > rev {", "if seq := s.newestMatch(sub); seq >= rev && seq > 0 {")},
	{"A5", "fresh as of receipt", one(follower,
		"asOf, err := v.fresh.Answered(", "v.fresh.Reconnected()\n\t\tv.fresh.Sent(a.Nonce, now)\n\tasOf, err := v.fresh.Answered(")},
	{"A6", "an answer's head is not compared", one(freshness,
		"if p.head.Compare(applied) > 0 {", "if false {")},
	{"A7", "acknowledged on receipt", one(follower,
		"deliveries := []feed.Delivery{*m.delivery}\n",
		"deliveries := []feed.Delivery{*m.delivery}\n\t\tif m.delivery.Snapshot {\n\t\t\tv.acknowledge(m.delivery.Position)\n\t\t}\n")},
	{"A7", "acknowledged by the relay for others", one(relay,
		"entry := l.Relayed\n", "entry := l.Relayed\n\t\t\tentry.Acked = r.View.Position()\n")},
	{"A8", "staleness by a clock that stops in suspend", one(machine,
		"m.boot + s.now + time.Duration(float64(s.now)*m.drift)", "m.boot + s.now - m.slept + time.Duration(float64(s.now)*m.drift)")},
	{"E1", "a relay answers with age 0", one(relay,
		"r.View.Log().Horizon(), age", "r.View.Log().Horizon(), 0*age")},
	{"E4", "a receipt survives the verifier's restart", one(follower,
		`fmt.Sprintf("%s-%d-start", f.name, f.starts)`, `fmt.Sprintf("%s-start", f.name)`)},
	{"K1", "the roster is in memory only", one(follow,
		"copy(v.Acked.Sum[:], s.Sum)\n\t\tb.roster.feed.Join(v, now)", "copy(v.Acked.Sum[:], s.Sum)")},
	{"K3", "'contained' before the largest bound", one(roster,
		"largest = max(largest, v.Bound)", "largest = max(largest, v.Bound/8)")},
	{"F3", "a raised bound holds before it is recorded", one(follower,
		"!v.fresh.Fresh(v.Boot(s), v.live)", "!v.fresh.Fresh(v.Boot(s), max(v.live, v.bound))")},
	{"B1", "a presented token's life is not checked", []edit{
		{exchange, "err = b.state.checkParent(t, now)", "err = nil"},
		{issue, "if err := s.checkParent(parent, now); err != nil {", "if err := s.checkParent(parent, now); err != nil && !now.Before(parent.Expires) {"},
	}},
	{"B2", "only the own member of a lineage is matched", one(set,
		"for _, m := range sub.Lineage {\n\t\tnewest", "for _, m := range sub.Lineage[len(sub.Lineage)-1:] {\n\t\tnewest")},
	{"B4", "a derived token lives longer", one(issue,
		"if g.Expires.After(parent.Expires) {", "if false {")},
	{"B4", "a derived token has more scopes", one(exchange,
		"if want.scopes, err = narrowScopes(req.Scopes, want.scopes, parent.Scopes); err != nil {", "if _, err = narrowScopes(nil, want.scopes, parent.Scopes); err != nil {")},
	{"B5", "no SVID in the lineage", one(issue,
		"Key: key.Public.ID, SVID: c.thumbprint()}", "Key: key.Public.ID}")},
	{"B6", "a derived token hangs on its own key only", one(set,
		"for _, m := range sub.Lineage {\n\t\tif seq, ok := s.keys[m.Key]; ok {", "for _, m := range sub.Lineage[len(sub.Lineage)-1:] {\n\t\tif seq, ok := s.keys[m.Key]; ok {")},
	{"B7", "a revoked key is judged by number", one(set,
		"if seq, ok := s.keys[m.Key]; ok {", "if seq, ok := s.keys[m.Key]; ok && seq > sub.Position.Rev {")},
	{"B8", "a presented token is not looked up in the records", one(exchange,
		"if errors.Is(err, ErrNotFound) || err == nil && g.Fingerprint != t.Fingerprint {", "if errors.Is(err, ErrNotFound) {\n\t\tg, err = &Grant{Lineage: t.Lineage, Expires: t.Expires}, nil\n\t}\n\tif g == nil {")},
	{"B9", "a position above the head is accepted", one(set,
		"case rev > s.head:\n\t\treturn Verdict{Reason: Ahead}", "case rev > s.head:\n\t\treturn Verdict{Reason: Alive}")},
	{"C1", "a lift ends every lock on the same selectors", one(stateGo,
		"delete(s.locks, rec.Lift.Lock)",
		"if lifted := s.locks[rec.Lift.Lock]; lifted != nil {\n\t\t\tfor n, l := range s.locks {\n\t\t\t\tif slices.Equal(l.Selectors, lifted.Selectors) {\n\t\t\t\t\tdelete(s.locks, n)\n\t\t\t\t}\n\t\t\t}\n\t\t}")},
	{"C2", "the last lock wins", one(stateGo,
		"if (refusing == nil || l.Number > refusing.Number) && !l.admits(id, svid, notBefore, now) {\n\t\t\trefusing = l\n\t\t}\n\t}\n\treturn refusing",
		"if refusing == nil || l.Number > refusing.Number {\n\t\t\trefusing = l\n\t\t}\n\t}\n\tif refusing != nil && refusing.admits(id, svid, notBefore, now) {\n\t\treturn nil\n\t}\n\treturn refusing")},
	{"C4", "pruning drops a standing lock", one(prune,
		"if l.standing(b.cfg.Now()) || now.Sub(s.known[n]) < l.End().Sub(l.Time) {", "if l == nil {")},
	{"C6", "the cut has no margin for skew", one(revoke,
		"return latest.Add(ClockSkew).UTC()", "return now.UTC()")},
	{"D0b", "a cursor skips a hole", one(logGo,
		"if uint64(len(news)) != l.head.Seq-c.at.Seq {", "if false {")},
	{"D1", "no rule of the horizon", one(set,
		"case rev < s.horizon:", "case false:")},
	{"D2", "'<=' at the horizon", one(set,
		"case rev < s.horizon:", "case rev <= s.horizon && s.horizon > 1:")},
	{"D3", "pruning by the wall clock", one(prune,
		"if now.Sub(s.known[e.Seq]) <= forgetAfter {", "if b.cfg.Now().Sub(s.records[e.Seq].Details.Time) <= forgetAfter {")},
	{"D4", "forgotten before the highest life of a token", one(prune,
		"if now.Sub(s.known[e.Seq]) <= forgetAfter {", "if now.Sub(s.known[e.Seq]) <= forgetAfter/3 {")},
	{"G2", "the old era's set is kept", one(view,
		"v.set = revocation.NewSet(era)", "if v.set == nil {\n\t\tv.set = revocation.NewSet(era)\n\t}")},
	{"G4c", "a position has no hash", []edit{
		{logGo, "if known, ok := l.At(c.at.Seq); !ok || known.Sum != c.at.Sum {", "if _, ok := l.At(c.at.Seq); !ok {"},
		{view, "if at, ok := v.log.At(p.Seq); ok && at.Sum != p.Sum {", "if false {"},
		{view, "if sum, ok := v.set.SumAt(p.Seq); ok && sum != p.Sum.Short() {", "if false {"},
		{logGo, "if e.Chain(l.head.Sum) != e.Sum {", "if false {"},
		{logGo, "if e.Seq == l.head.Seq+1 && e.Chain(l.head.Sum) != e.Sum {", "if false {"},
		{view, "if before, ok := v.log.At(e.Seq - 1); ok && e.Era == nil && e.Chain(before.Sum) != e.Sum {", "if false {"},
		{set, "if sum, ok := s.sums[rev]; ok && sum != sub.Position.Sum {", "if false {"},
	}},
	{"G3", "locks made since the backup are not carried over", one(restore,
		"if lock := theirs[seq]; ours[seq].Sum != lock.Sum {", "if lock := theirs[seq]; false {")},
	{"G3", "locks are lost without consent", one(restore,
		"if !p.AcceptLost {", "if false {")},
	{"", "revoked keys are not carried over", one(restore,
		"slices.Chunk(keys, MaxSelectors)", "slices.Chunk(keys[:0], MaxSelectors)")},
	{"", "a restored store lacks the verifiers of the last one", one(restore,
		"p.out.Verifiers = append(p.out.Verifiers, v.observation())", "_ = v")},
	{"", "nobody stands for the verifiers that no copy names", one(restore,
		"if c == nil || !c.Made.IsZero() || len(p.lost) > 0 {", "if false {")},
	{"G4d", "a broker that is shown a signed head that it lacks goes on", one(signed,
		"if !b.silence.CompareAndSwap(nil, silence) {", "if silence != nil {")},
	{"G4d", "a silent broker answers pings", one(signed,
		"if err := b.checkSilence(); err != nil {\n\t\treturn Proof{}, err\n\t}\n\tp, err", "p, err")},
	{"", "what nobody signed silences a broker", one(signed,
		"s, err := b.cfg.VerifyHead(h)", "s, err := claimed, error(nil)")},
	{"", "a signed head answers any ping", one(feedSign,
		"if root != s.NonceRoot {", "if _ = root; false {")},
	{"", "a relay's word counts beside the signature", one(distrust,
		"a.Head, a.Age = signed.Head, signed.Age", "_ = signed.Head")},
	{"", "what comes through a relay on another host counts at once", one(follower,
		"if v.distrusts {\n\t\t\tvar err error", "if false {\n\t\t\tvar err error")},
	{"", "records are not compared with the signed head", one(screen,
		"if at != h.Head {", "if false {")},
	{"", "keys are not compared with the signed set", one(screen,
		"set, ok := matchKeySet(all, h.KeySet)\n", "set, ok := matchKeySet(all, h.KeySet)\n\tif !ok {\n\t\tset, ok = all, true\n\t}\n")},
	{"", "a use of what was never recorded is no alarm", one(uses,
		`b.unrecorded(ctx, found, r, use, "no record holds this grant", quiet)`, "")},
	{"", "a use's fingerprint is not compared with the record's", one(uses,
		"case len(use.Fingerprint) > 0 && string(use.Fingerprint) != string(g.Fingerprint[:]):", "case false:")},
	{"", "a report that comes again counts twice", one(uses,
		"if known, err := b.reported(ctx, place, now); known || err != nil {", "if _, err := b.reported(ctx, place, now); err != nil {")},
	{"", "uses after a revocation are kept in memory only", one(uses,
		"u.after[afterKey{seq, a.Verifier, a.Claimed}] = a", "_ = u")},
	{"", "who proposed may confirm", one(second,
		"case found != nil && found.Actor != want.Actor:", "case found != nil:")},
	{"", "a proposal is confirmed however late", one(second,
		"|| now.Before(p.Time) || !now.Before(p.Ends) {", "|| now.Before(p.Time) {")},
	{"", "a proposal is confirmed more than once", []edit{
		{second, "return &p, !b.confirmed(&p)", "return &p, true"},
		{second, "if err := b.cfg.Store.Observe(context.WithoutCancel(ctx), Observation{Key: p.key()}); err != nil {", "if err := error(nil); err != nil {"},
		{revoke, "if confirms != nil && b.confirmed(confirms) {", "if false {"},
	}},
	{"", "everything takes one person", one(revoke,
		`if action != ActionRevokeEverything || c.Local != "" {`, "if true {")},
	{"", "a key that no broker vouches for is published", []edit{
		{stateGo, "if err := verify(rec, s.unchecked[seq]); err == nil {", "if err := verify(rec, s.unchecked[seq]); err == nil || true {"},
	}},
	{"", "a relay answers whom the broker doesn't have on its roster", one(relay,
		"if len(d.nonces)+len(d.proven) == 0 || d.need > r.confirmed || !known {", "if len(d.nonces)+len(d.proven) == 0 || !known {\n\t\td.need = 0")},
	{"", "a relay answers from before one below was on the roster", one(relay,
		"\t\tif c.head.Compare(r.View.Position()) > 0 {\n\t\t\treturn false\n\t\t}\n\t\tr.confirmed", "\t\tr.confirmed")},
	{"", "one behind a relay closes by its own last answer", one(roster,
		"answered = max(answered, relay.Answered)", "_ = relay")},
	{"", "a relay's gone verifier is dropped from the roster at once", one(relayedGo,
		"if f.b.enrolled(v.ID) {\n\t\t\t\tbelow", "v.Answered = 0\n\t\t\tif f.b.enrolled(v.ID) {\n\t\t\t\tbelow")},
	{"", "the smaller of two bounds stands", one(roster,
		"v.Bound = max(v.Bound, old.Bound)", "v.Bound = min(v.Bound, old.Bound)")},
	{"", "a silent one that accepts when stale leaves the list", one(roster,
		"return now.Sub(closes) > keep && (!v.AcceptsStale || closes < keys)", "return now.Sub(closes) > keep")},
	{"", "a subtree matches by prefix of text", one(selector,
		`return strings.HasPrefix(id.String(), s.value+"/")`, `return strings.HasPrefix(id.String(), s.value)`)},
	{"", "a lock on an SVID admits it where the mode is reissue", one(stateGo,
		"if sel.Kind() == revocation.KindSVID || l.Mode", "if l.Mode")},
	{"", "keys are forgotten while tokens that they signed live", one(prune,
		"if seq >= oldest {\n\t\t\tkeep[seq] = true", "if seq > oldest && false {\n\t\t\tkeep[seq] = true")},
}

// What a verifier could do wrong with the signed tokens that it remembers.
var remembering = []mutant{
	{"", "a verifier remembers its verdict", one(verifier,
		"if j, ok := v.judge(s, peer); ok {", "if j := (judgement{now: v.cfg.Now()}); true {")},
	{"", "what is remembered is accepted while the feed is stale", one(verifier,
		"if j.refusal = v.closedLocked(); j.refusal != nil {", "if v.view.Err() != nil {\n\t\tj.refusal = v.closedLocked()")},
	{"", "the rule isn't asked about what is remembered", one(verifier,
		"if j, ok := v.judge(s, peer); ok {", "s.Lineage = s.Lineage[len(s.Lineage):]\n\t\tif j, ok := v.judge(s, peer); ok {")},
	{"", "a remembered token is anybody's", one(verifier,
		"if j, ok := v.judge(s, peer); ok {", "if j, ok := v.judge(s, Peer{ID: s.Presenter(), Certificate: peer.Certificate}); ok {")},
	{"", "a remembered token's key may have left", one(verifier,
		"!ok || !key.Equal(s.key)", "ok && !key.Equal(s.key)")},
	{"", "a remembered token's key is compared by its ID", one(verifier,
		"!ok || !key.Equal(s.key)", "!ok || key.ID != s.key.ID")},
	{"", "a token is remembered without its signature", []edit{
		{memory, "\t\"sync/atomic\"", "\t\"strings\"\n\t\"sync/atomic\""},
		{memory, "return maphash.String(t.seed, raw)", "return maphash.String(t.seed, raw[:strings.LastIndexByte(raw, '.')+1])"},
		{memory, "r.hash == hash && r.raw.Reveal() == raw", "r.hash == hash"},
	}},
	{"", "a token is remembered by its signature alone", []edit{
		{memory, "\t\"sync/atomic\"", "\t\"strings\"\n\t\"sync/atomic\""},
		{memory, "return maphash.String(t.seed, raw)", "return maphash.String(t.seed, raw[strings.LastIndexByte(raw, '.')+1:])"},
		{memory, "r.hash == hash && r.raw.Reveal() == raw", "r.hash == hash"},
	}},
	{"", "callers share what is remembered", one(verifier,
		"Claims: s.Claims.Clone()", "Claims: s.Claims")},
	{"", "what is refused is remembered", one(verifier,
		"if j.refusal == nil {\n\t\tv.seen.Put", "if true {\n\t\tv.seen.Put")},
}

// And with the chains of certificates.
var rememberingPeers = []mutant{
	{"", "a chain is believed whatever becomes of the bundle", one(peerGo,
		" && slices.EqualFunc(c.authorities, authorities, same)", "")},
	{"", "a chain is believed by its leaf", one(peerGo,
		"slices.EqualFunc(c.certs, certs, same) &&", "len(certs) > 0 &&")},
	{"", "only the leaf of a chain expires", one(peerGo,
		"if cert.NotAfter.Before(c.until) {", "if false {")},
	{"", "a chain is believed before it is valid", one(peerGo,
		"!now.Before(c.from) && ", "")},
	{"", "a chain is believed of a trust domain that has left", one(peerGo,
		"bundle, err := bundles.GetX509BundleForTrustDomain(id.TrustDomain())\n\tif err != nil {",
		"bundle, err := bundles.GetX509BundleForTrustDomain(id.TrustDomain())\n\tif c := p.get(certs[0].Raw); err != nil && c != nil && c.holds(certs, c.authorities, now) {\n\t\treturn id, nil\n\t}\n\tif err != nil {")},
}
