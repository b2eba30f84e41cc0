package policy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/metrics"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/topdown"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// ErrEvaluation wraps every failure to decide: a timeout, an error of a builtin,
// an answer of the wrong shape. Whoever meets it refuses the request.
var ErrEvaluation = errors.New("policy evaluation failed")

// ErrNone is why Decide fails before any policy is in force: see [Open]. It wraps
// ErrEvaluation.
var ErrNone = fmt.Errorf("%w: no policy is in force", ErrEvaluation)

// ErrInput says that the question itself was malformed, by a mistake in Go code.
// Whoever meets it refuses the request.
var ErrInput = errors.New("malformed policy input")

// defaultTimeout bounds one evaluation: a thousand times what it should take.
const defaultTimeout = 250 * time.Millisecond

// Config says where policy comes from: exactly one of Dir, FS, File and Bundle.
type Config struct {
	// Dir is a folder on disk, which Run follows.
	Dir string
	// FS is a folder that never changes, such as Default() or Demo().
	FS fs.FS
	// File is a bundle on disk, read once. Nobody looks at its signature: it is for
	// trying a bundle out, and never for deciding in earnest.
	File string
	// Bundle is where signed bundles are fetched from, which Run does.
	Bundle *Bundle
	// Timeout bounds one decision; 0 means 250 ms.
	Timeout time.Duration
	// Rescan is how often Run reads Dir again in case the file system told it of
	// no change (network file systems, links to elsewhere); 0 means 30 s.
	Rescan time.Duration
	// Log gets a line for each reload; nil discards.
	Log *slog.Logger
	// OnReload, if set, is called after each reload: with nil when a new generation
	// is in force, with an error when the last good one was kept. It may be called
	// by Run and by Reload at once.
	OnReload func(error)
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

func (c Config) withDefaults() (Config, error) {
	sources := 0
	for _, given := range []bool{c.Dir != "", c.FS != nil, c.File != "", c.Bundle != nil} {
		if given {
			sources++
		}
	}
	if sources != 1 {
		return c, errors.New("policy needs exactly one source: a folder (Dir), a file system (FS), a bundle's File or a Bundle")
	}
	if c.Timeout < 0 || c.Rescan < 0 {
		return c, errors.New("policy: Timeout and Rescan can't be negative")
	}
	c.Timeout = cmp.Or(c.Timeout, defaultTimeout)
	c.Rescan = cmp.Or(c.Rescan, 30*time.Second)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.OnReload == nil {
		c.OnReload = func(error) {}
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return c, nil
}

// origin makes the one that is configured.
func (c *Config) origin() (origin, error) {
	switch {
	case c.Bundle != nil:
		return newBundleOrigin(*c.Bundle, c.Log, c.Now)
	case c.File != "":
		return fixedOrigin(func() (*folder, error) { return readBundleFile(c.File) }), nil
	case c.FS != nil:
		return fixedOrigin(func() (*folder, error) { return readFolder(c.FS) }), nil
	}
	dir, err := filepath.Abs(c.Dir)
	if err != nil {
		return nil, fmt.Errorf("finding policy folder: %w", err)
	}
	return &folderOrigin{dir: dir, rescan: c.Rescan, log: c.Log}, nil
}

// Policy decides. All its methods may be called at once.
type Policy struct {
	cfg     Config
	from    origin
	current atomic.Pointer[generation]

	ready chan struct{} // closed when the first generation is in force

	turn    sync.Mutex // held by a reload, which may wait for the network
	lastBad string     // what lastErr is about: a folder's hash, or how reading failed

	mu      sync.Mutex // guards lastErr; nobody waits while holding it
	lastErr error
}

// Status is the state of the policy in force.
type Status struct {
	// Generation counts from 1 and goes up with each reload that took effect; 0 while
	// none is in force.
	Generation uint64
	// Revision names what is in force: see [Decision].
	Revision string
	// LoadedAt is when this generation came into force.
	LoadedAt time.Time
	// Err is what is wrong with the source as it is now, while an older generation
	// stays in force, or none is; nil if the source holds what is in force.
	Err error
}

// Load reads and compiles a policy folder. It fails with [Problems] on one that
// is empty, has no policy, doesn't compile or has invalid data.
func Load(ctx context.Context, cfg Config) (*Policy, error) {
	p, err := open(ctx, cfg)
	if err != nil {
		return nil, err
	}
	if p.lastErr != nil {
		return nil, p.lastErr
	}
	return p, nil
}

// Open is Load for one who can wait: with a folder that Load would refuse it returns a
// Policy that decides nothing (ErrNone) and knows no audience until Run, or Reload, has
// found one that is good. It is said as loudly as a reload that failed; Status says what
// is wrong until then, and Ready when it is over.
func Open(ctx context.Context, cfg Config) (*Policy, error) {
	p, err := open(ctx, cfg)
	if err == nil && p.lastErr != nil {
		p.complain(ctx, p.lastErr)
	}
	return p, err
}

func open(ctx context.Context, cfg Config) (*Policy, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	from, err := cfg.origin()
	if err != nil {
		return nil, err
	}
	p := &Policy{cfg: cfg, from: from, ready: make(chan struct{})}
	f, err := from.first()
	if err != nil {
		p.fail(err, err.Error())
		return p, nil
	}
	g, err := build(ctx, f, cfg.Now())
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if err != nil {
		p.fail(fmt.Errorf("loading policy: %w", err), f.revision)
		return p, nil
	}
	p.install(g, 1)
	return p, nil
}

// install puts a generation in force.
func (p *Policy) install(g *generation, number uint64) {
	g.number = number
	p.current.Store(g)
	if number == 1 {
		close(p.ready)
	}
}

// Ready returns a channel that is closed once a policy is in force.
func (p *Policy) Ready() <-chan struct{} { return p.ready }

// Decide answers one question, from one generation of the policy, within
// Config.Timeout. On an error, which wraps [ErrEvaluation] or [ErrInput], the
// decision is the zero one, which denies.
func (p *Policy) Decide(ctx context.Context, in Input) (Decision, error) {
	g := p.current.Load()
	if g == nil {
		return Decision{}, ErrNone
	}
	return g.decide(ctx, p.cfg, in)
}

func (g *generation) decide(ctx context.Context, cfg Config, in Input, opts ...rego.EvalOption) (Decision, error) {
	if err := in.validate(); err != nil {
		return Decision{}, err
	}
	if isTemplate(in.Audience) { // a name that data holds, and no one may have
		d := denied("audience_unknown", fmt.Sprintf("no audience %q is declared", in.Audience), "check the spelling, or ask the policy's owner to declare it")
		d.Rule, d.Generation, d.Revision = string(in.Action), g.number, g.revision
		return d, nil
	}
	f := g.data.facts(in)
	if in.Time.IsZero() {
		in.Time = cfg.Now()
	}
	// OPA would start a goroutine per evaluation to watch ctx; this costs less.
	cancel := topdown.NewCancel()
	defer context.AfterFunc(ctx, cancel.Cancel)()
	defer time.AfterFunc(cfg.Timeout, cancel.Cancel).Stop()
	rs, err := g.query.Eval(ctx, append(opts,
		rego.EvalParsedInput(in.value(f)),
		rego.EvalTime(in.Time),
		rego.EvalExternalCancel(cancel),
		rego.EvalMetrics(metrics.NoOp()),
	)...)
	if err != nil {
		return Decision{}, fmt.Errorf("%w: %w", ErrEvaluation, err)
	}
	d, err := answer(rs, in)
	if err != nil {
		return Decision{}, fmt.Errorf("%w: %w", ErrEvaluation, err)
	}
	d.Names = f.names
	if isTemplate(f.target) {
		d.Template = f.target
	}
	if in.Action == ActionIssue || in.Action == ActionExchange || in.Action == ActionGiveBack {
		d.Limits = g.data.limitsOf(f.patterns).stricter(d.Limits)
	} else {
		d.Limits = Limits{}
	}
	d.SecondPerson = g.data.secondPerson(in)
	d.Generation, d.Revision = g.number, g.revision
	return d, nil
}

func answer(rs rego.ResultSet, in Input) (Decision, error) {
	if len(rs) == 0 {
		return denied("undefined", "policy has no answer to this request", "its rules leave "+decisionRef+" undefined"), nil
	}
	v, ok := rs[0].Bindings["x"].(ast.Value)
	if !ok || len(rs) > 1 {
		return Decision{}, errors.New("policy gave more than one answer")
	}
	d, err := decodeDecision(v)
	if err != nil {
		return Decision{}, err
	}
	if err := d.check(in); err != nil {
		return Decision{}, err
	}
	return d, nil
}

// Audience returns what the policy in force declares about name, itself or as what a
// template can give.
func (p *Policy) Audience(name string) (Audience, bool) {
	g := p.current.Load()
	if g == nil {
		return Audience{}, false
	}
	a, ok := g.data.declaration(name)
	a.Identities = slices.Clone(a.Identities)
	return a, ok
}

// declared holds the audiences of the policy in force.
func (p *Policy) declared() map[string]Audience {
	if g := p.current.Load(); g != nil {
		return g.data.audiences
	}
	return nil
}

// Fallback returns what is documented for a caller that has no credentials for an
// audience: that of the entitlement by which it gets them, or of the exchange (the first
// by the name of what is exchanged), where the most specific pattern counts; else the
// audience's.
func (p *Policy) Fallback(caller spiffeid.ID, audience string) Fallback {
	g := p.current.Load()
	if g == nil {
		return Fallback{}
	}
	data := g.data
	patterns := Patterns(caller)
	own, target := data.match(Input{Action: ActionIssue, Caller: Caller{ID: caller}, Audience: audience}, patterns)
	if f := data.entitlements[own][target].fallback; f != (Fallback{}) {
		return f
	}
	for _, pattern := range patterns {
		for _, from := range slices.Sorted(maps.Keys(data.exchange[pattern])) {
			for _, key := range data.keys(caller, audience) {
				if f := data.exchange[pattern][from][key].fallback; f != (Fallback{}) {
					return f
				}
			}
		}
	}
	return data.audiences[target].Fallback
}

// Audiences lists all that are declared, by name.
func (p *Policy) Audiences() []Audience {
	declared := p.declared()
	out := make([]Audience, 0, len(declared))
	for _, name := range slices.Sorted(maps.Keys(declared)) {
		a := declared[name]
		a.Identities = slices.Clone(a.Identities)
		out = append(out, a)
	}
	return out
}

// AnswersTo says whether a token for audience aud is addressed to id: aud is id
// itself, or a name that policy data assigns to it.
func (p *Policy) AnswersTo(id spiffeid.ID, aud string) bool {
	if id.IsZero() || aud == "" {
		return false
	}
	if aud == id.String() {
		return true
	}
	a, ok := p.declared()[aud]
	if !ok {
		return false
	}
	return slices.ContainsFunc(Patterns(id), func(pattern string) bool {
		return slices.Contains(a.Identities, pattern)
	})
}

// Status says which generation is in force and what is wrong with a newer one.
func (p *Policy) Status() Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := Status{Err: p.lastErr}
	if g := p.current.Load(); g != nil {
		st.Generation, st.Revision, st.LoadedAt = g.number, g.revision, g.loadedAt
	}
	return st
}
