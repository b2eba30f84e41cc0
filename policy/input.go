package policy

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Action is what a caller wants to do.
type Action string

// The actions that the default policy knows. Any other is denied by it with the
// reason action_unknown.
const (
	// ActionIssue asks for a credential for Input.Audience.
	ActionIssue Action = "issue"
	// ActionExchange asks for a derived credential; Lineage, ParentScopes and
	// ParentAudience describe the presented one.
	ActionExchange Action = "exchange"
	// ActionFollow opens the feed; Verifier says what the follower promises.
	ActionFollow Action = "follow"
	// ActionRelay passes the feed on to others.
	ActionRelay Action = "relay"
	// ActionReport sends use reports.
	ActionReport Action = "report"
	// ActionRevoke records a revocation of Selectors with the lock mode Lock.
	ActionRevoke Action = "revoke"
	// ActionRevokeEverything is a revocation that matches every token: proposes it,
	// or confirms what another operator proposed.
	ActionRevokeEverything Action = "revoke_everything"
	// ActionLift ends a lock, or proposes to.
	ActionLift Action = "lift"
	// ActionLiftConfirm confirms a lift that another operator proposed.
	ActionLiftConfirm Action = "lift_confirm"
	// ActionList reads grants, revocations, locks and containment.
	ActionList Action = "list"
	// ActionPlan asks what a revocation would kill.
	ActionPlan Action = "plan"
	// ActionGiveBack ends a credential before its time, for its holder; Lineage,
	// ParentScopes and ParentAudience describe it.
	ActionGiveBack Action = "give_back"
	// ActionIntrospect asks whether a credential is good; Lineage, ParentScopes and
	// ParentAudience describe it.
	ActionIntrospect Action = "introspect"
)

// Attestations: how the caller proved its identity.
const (
	AttestationX509 = "x509"
	AttestationJWT  = "jwt"
)

// Bindings, from the laxest to the strictest, as the token's "bnd" spells them.
const (
	BindingNone   = "none"
	BindingSPIFFE = "spiffe"
	BindingX5T    = "x5t"
)

// What a verifier does once its knowledge is older than its bound.
const (
	OnStaleRefuse = "refuse"
	OnStaleAccept = "accept"
)

// Caller is the identity that asks, as proven by its SVID and nothing else.
type Caller struct {
	ID spiffeid.ID
	// SVIDSerial is the certificate's serial number in lower-case hexadecimal;
	// empty for a JWT-SVID.
	SVIDSerial string
	// SVIDAge is the time since NotBefore, SVIDRemaining the time until NotAfter.
	SVIDAge, SVIDRemaining time.Duration
	// Attestation is AttestationX509 or AttestationJWT; empty means x509.
	Attestation string
}

// Member is one link of a presented token's lineage.
type Member struct {
	ID    spiffeid.ID
	Grant string
	KeyID string
}

// Verifier is what a follower of the feed says about itself.
type Verifier struct {
	// Audiences it answers to; may be empty for one that verifies nothing itself.
	Audiences []string
	// MaxStaleness is its bound.
	MaxStaleness time.Duration
	// OnStale is OnStaleRefuse or OnStaleAccept; empty means refuse.
	OnStale string
}

// Input is one question. Fields that an action doesn't use stay zero.
type Input struct {
	Action Action
	Caller Caller

	// Audience, Scopes, TTL and Binding are what issue and exchange ask for. No
	// scopes asks for the policy's default set, a TTL of 0 for the policy's TTL,
	// an empty Binding for the policy's.
	Audience string
	Scopes   []string
	TTL      time.Duration
	Binding  string

	// Lineage (root first), ParentScopes and ParentAudience are those of the
	// presented token. Exchange, give_back and introspect only.
	Lineage        []Member
	ParentScopes   []string
	ParentAudience string

	// Selectors (as the audit spells them) and Lock are those of a revocation.
	Selectors []string
	Lock      string

	// Verifier is set for follow and relay.
	Verifier Verifier

	// PeerAddress is "host:port" of the connection, empty on a unix socket.
	PeerAddress string
	// Time of the request; zero takes Config.Now. It is also what Rego's
	// time.now_ns returns.
	Time time.Time
}

// validate says what no policy should have to deal with. These are the caller's
// mistakes in Go: what a stranger may send is refused before it gets here.
func (in Input) validate() error {
	var errs []error
	if in.Action == "" {
		errs = append(errs, errors.New("no action"))
	}
	if in.Caller.ID.IsZero() {
		errs = append(errs, errors.New("no caller"))
	}
	if in.TTL < 0 {
		errs = append(errs, fmt.Errorf("negative TTL %v", in.TTL))
	}
	switch in.Binding {
	case "", BindingNone, BindingSPIFFE, BindingX5T:
	default:
		errs = append(errs, fmt.Errorf("unknown binding %q", in.Binding))
	}
	switch in.Caller.Attestation {
	case "", AttestationX509, AttestationJWT:
	default:
		errs = append(errs, fmt.Errorf("unknown attestation %q", in.Caller.Attestation))
	}
	switch in.Verifier.OnStale {
	case "", OnStaleRefuse, OnStaleAccept:
	default:
		errs = append(errs, fmt.Errorf("unknown on_stale %q", in.Verifier.OnStale))
	}
	if len(errs) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %w", ErrInput, errors.Join(errs...))
}

// Patterns returns everything in policy data that matches id, the most specific
// first: the identity itself, then the subtree of each ancestor, then its whole
// trust domain.
//
//	spiffe://td/a/b  ->  spiffe://td/a/b  spiffe://td/a/*  spiffe://td/*
//
// A subtree doesn't contain the identity it is named after.
func Patterns(id spiffeid.ID) []string {
	s := id.String()
	root := len("spiffe://") + len(id.TrustDomain().Name())
	out := make([]string, 1, 1+strings.Count(s[root:], "/"))
	out[0] = s
	for i := len(s) - 1; i >= root; i-- {
		if s[i] == '/' {
			out = append(out, s[:i]+"/*")
		}
	}
	return out
}

// facts are what policy data says about a question before any rule is asked.
type facts struct {
	patterns []string // that match the caller, most specific first
	names    []string // audience names that the caller answers to
	match    string   // the pattern whose entry decides; empty if there is none
	target   string   // what the audience stands under: its name, or a template
}

// The words of the input document are made once: half of what building one allocated.
func init() {
	ast.InternStringTerm(
		"action", "caller", "match", "time_ns", "peer_address", "audience", "target", "scopes", "ttl_ns", "binding",
		"parent", "selectors", "lock", "verifier", "id", "trust_domain", "path", "patterns", "names", "attestation",
		"svid", "serial", "age_ns", "remaining_ns", "grant", "key_id", "lineage", "audiences", "max_staleness_ns", "on_stale",
		string(ActionIssue), string(ActionExchange), string(ActionFollow), string(ActionRelay), string(ActionReport),
		string(ActionRevoke), string(ActionRevokeEverything), string(ActionLift), string(ActionLiftConfirm), string(ActionList),
		string(ActionPlan), string(ActionGiveBack), string(ActionIntrospect),
		AttestationX509, AttestationJWT, BindingNone, BindingSPIFFE, BindingX5T, OnStaleRefuse, OnStaleAccept,
	)
}

// value is the input document. It is built as AST values, because converting a Go
// map costs more than the whole evaluation. docs/policy.md has its schema.
func (in Input) value(f facts) ast.Value {
	items := make([][2]*ast.Term, 0, 16)
	add := func(key string, v *ast.Term) { items = append(items, item(key, v)) }

	add("action", ast.InternedTerm(string(in.Action)))
	add("caller", in.Caller.term(f))
	add("match", ast.StringTerm(f.match))
	add("time_ns", int64Term(in.Time.UnixNano()))
	add("peer_address", ast.StringTerm(in.PeerAddress))
	switch in.Action {
	case ActionIssue, ActionExchange:
		add("audience", ast.StringTerm(in.Audience))
		add("target", ast.StringTerm(f.target))
		if len(in.Scopes) > 0 {
			add("scopes", stringsTerm(in.Scopes))
		}
		if in.TTL > 0 {
			add("ttl_ns", int64Term(int64(in.TTL)))
		}
		if in.Binding != "" {
			add("binding", ast.InternedTerm(in.Binding))
		}
	}
	if in.Action == ActionExchange || in.Action == ActionGiveBack || in.Action == ActionIntrospect {
		add("parent", in.parentTerm())
	}
	if in.Action == ActionRevoke || in.Action == ActionRevokeEverything || in.Action == ActionPlan {
		add("selectors", stringsTerm(in.Selectors))
		add("lock", ast.StringTerm(in.Lock))
	}
	if in.Action == ActionFollow || in.Action == ActionRelay {
		add("verifier", in.Verifier.term())
	}
	return ast.NewObject(items...)
}

func (c Caller) term(f facts) *ast.Term {
	attestation := c.Attestation
	if attestation == "" {
		attestation = AttestationX509
	}
	return ast.ObjectTerm(
		item("id", ast.StringTerm(c.ID.String())),
		item("trust_domain", ast.StringTerm(c.ID.TrustDomain().Name())),
		item("path", ast.StringTerm(c.ID.Path())),
		item("patterns", stringsTerm(f.patterns)),
		item("names", stringsTerm(f.names)),
		item("attestation", ast.InternedTerm(attestation)),
		item("svid", ast.ObjectTerm(
			item("serial", ast.StringTerm(c.SVIDSerial)),
			item("age_ns", int64Term(int64(c.SVIDAge))),
			item("remaining_ns", int64Term(int64(c.SVIDRemaining))),
		)),
	)
}

func (in Input) parentTerm() *ast.Term {
	lineage := make([]*ast.Term, len(in.Lineage))
	for i, m := range in.Lineage {
		lineage[i] = ast.ObjectTerm(
			item("id", ast.StringTerm(m.ID.String())),
			item("grant", ast.StringTerm(m.Grant)),
			item("key_id", ast.StringTerm(m.KeyID)),
		)
	}
	return ast.ObjectTerm(
		item("audience", ast.StringTerm(in.ParentAudience)),
		item("scopes", stringsTerm(in.ParentScopes)),
		item("lineage", ast.ArrayTerm(lineage...)),
	)
}

func (v Verifier) term() *ast.Term {
	onStale := v.OnStale
	if onStale == "" {
		onStale = OnStaleRefuse
	}
	return ast.ObjectTerm(
		item("audiences", stringsTerm(v.Audiences)),
		item("max_staleness_ns", int64Term(int64(v.MaxStaleness))),
		item("on_stale", ast.InternedTerm(onStale)),
	)
}

func item(key string, v *ast.Term) [2]*ast.Term { return ast.Item(ast.InternedTerm(key), v) }

func stringsTerm(list []string) *ast.Term {
	terms := make([]*ast.Term, len(list))
	for i, s := range list {
		terms[i] = ast.StringTerm(s)
	}
	return ast.ArrayTerm(terms...)
}
