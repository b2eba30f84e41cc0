package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/dayflyhq/dayfly/policy"
	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func (a *app) policyCmd() *cobra.Command {
	return group("policy", "Write, check and try out policy", `Policy is a folder of Rego rules and of data that anyone can edit, or an OPA bundle made
of one. These verbs work on that alone and call no broker. docs/policy.md describes its format.`, `  dayfly policy init ./policy
  dayfly policy check ./policy
  dayfly policy explain --dir ./policy --as spiffe://example.org/payments --audience orders --scope orders.read
  dayfly policy replay ./policy --audit /var/log/dayfly/audit.jsonl`,
		a.policyInitCmd(), a.policyCheckCmd(), a.policyTestCmd(), a.policyExplainCmd(), a.policyReplayCmd())
}

func (a *app) policyInitCmd() *cobra.Command {
	var demo bool
	cmd := &cobra.Command{
		Use:   "init DIR",
		Short: "Write the default policy into a folder, to start from",
		Long: `Write the default rules, their tests and commented data into a folder. The data
allows nothing yet. Nothing that exists is overwritten.`,
		Example: "  dayfly policy init ./policy\n  dayfly policy init ./policy --demo",
		Args:    oneArg("the folder"),
		RunE: func(_ *cobra.Command, args []string) error {
			write := policy.WriteDefault
			if demo {
				write = policy.WriteDemo
			}
			if err := write(args[0]); err != nil {
				return failf(exitFailure, "name a folder that is empty or new", "%w", err)
			}
			return a.printValue(map[string]string{"dir": args[0]}, func(w io.Writer) {
				fmt.Fprintf(w, "Wrote the policy to %s. Edit data.yaml, then: dayfly policy check %s\n", clean(args[0]), clean(args[0]))
			})
		},
	}
	cmd.Flags().BoolVar(&demo, "demo", false, "with the data of dayfly demo, to see how entries look")
	return cmd
}

func (a *app) policyCheckCmd() *cobra.Command {
	return &cobra.Command{
		Use:     "check DIR",
		Short:   "Say everything that is wrong with a policy folder",
		Example: "  dayfly policy check /etc/dayfly/policy\n  dayfly policy check ./policy --output json",
		Args:    oneArg("the folder"),
		RunE: func(_ *cobra.Command, args []string) error {
			err := policy.Check(args[0])
			problems := policy.Problems{}
			if err != nil && !errors.As(err, &problems) {
				return err
			}
			if err := a.printValue(map[string]policy.Problems{"problems": problems}, func(w io.Writer) {
				for _, p := range problems {
					fmt.Fprintln(w, clean(p.String()))
				}
				if len(problems) == 0 {
					fmt.Fprintf(w, "%s is good.\n", clean(args[0]))
				}
			}); err != nil {
				return err
			}
			if len(problems) > 0 {
				return failf(exitFailure, "a broker that runs keeps the last good policy until this is mended", "%s can't be loaded: %s", args[0], count(uint64(len(problems)), "problem", "problems"))
			}
			return nil
		},
	}
}

func (a *app) policyTestCmd() *cobra.Command {
	return &cobra.Command{
		Use:     "test DIR",
		Short:   "Run the Rego tests of a policy folder",
		Example: "  dayfly policy test /etc/dayfly/policy\n  dayfly policy test ./policy --output json",
		Args:    oneArg("the folder"),
		RunE:    func(cmd *cobra.Command, args []string) error { return a.policyTest(cmd.Context(), args[0]) },
	}
}

func (a *app) policyTest(ctx context.Context, dir string) error {
	out := a.stdout
	if a.output == outputJSON {
		out = io.Discard
	}
	results, err := policy.Test(ctx, dir, out)
	if a.output == outputJSON && (err == nil || errors.Is(err, policy.ErrTestsFailed)) {
		if err := a.printValue(map[string][]policy.TestResult{"results": append([]policy.TestResult{}, results...)}, nil); err != nil {
			return err
		}
	}
	if err != nil && !errors.Is(err, policy.ErrTestsFailed) {
		return failf(exitFailure, "dayfly policy check says what is wrong with a folder", "%w", err)
	}
	return err
}

// question is what policy explain asks.
type question struct {
	requestFlags
	dir, as, action string
	attestation     string
}

func (a *app) policyExplainCmd() *cobra.Command {
	var q question
	cmd := &cobra.Command{
		Use:   "explain",
		Short: "Say what would be decided, by which rule, on which data",
		Long: `Ask a policy folder one question and say how the answer came about. Locks, caps and
the lineage of a presented token come on top, in the broker. Exit code 0 says that it
would be allowed, 4 that it would be refused.`,
		Example: `  dayfly policy explain --dir ./policy --as spiffe://example.org/payments --audience orders --scope orders.read
  dayfly policy explain --dir ./policy --as spiffe://example.org/ops/ann --action revoke`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.policyExplain(cmd.Context(), &q) },
	}
	q.add(cmd)
	f := cmd.Flags()
	f.Lookup("audience").Usage = "`whom` the token would be for (required for issue and exchange), or is, for introspect"
	f.StringVar(&q.dir, "dir", ".", "the policy `folder`, or a bundle")
	f.StringVar(&q.as, "as", "", "SPIFFE `ID` that would ask (required)")
	f.StringVar(&q.action, "action", string(policy.ActionIssue), "what it would ask for: issue, exchange, follow, relay, report, revoke, revoke_everything, lift, lift_confirm, list, plan, give_back or introspect")
	f.StringVar(&q.attestation, "attestation", policy.AttestationX509, "how it would prove its identity: x509 or jwt")
	complete(cmd, "action", actions()...)
	complete(cmd, "attestation", policy.AttestationX509, policy.AttestationJWT)
	return cmd
}

func actions() []string {
	list := []policy.Action{
		policy.ActionIssue, policy.ActionExchange, policy.ActionFollow, policy.ActionRelay, policy.ActionReport, policy.ActionRevoke,
		policy.ActionRevokeEverything, policy.ActionLift, policy.ActionLiftConfirm, policy.ActionList, policy.ActionPlan,
		policy.ActionGiveBack, policy.ActionIntrospect,
	}
	out := make([]string, len(list))
	for i, x := range list {
		out[i] = string(x)
	}
	return out
}

// input makes the typed question.
func (q *question) input(now time.Time) (policy.Input, error) {
	if q.as == "" {
		return policy.Input{}, usagef("name who would ask: --as spiffe://example.org/payments", "--as is missing")
	}
	id, err := spiffeid.FromString(q.as)
	if err != nil {
		return policy.Input{}, usagef("it looks like spiffe://example.org/payments", "--as %q: %v", q.as, err)
	}
	in := policy.Input{
		Action: policy.Action(q.action),
		Caller: policy.Caller{ID: id, Attestation: q.attestation},
		Time:   now,
	}
	switch in.Action {
	case policy.ActionGiveBack: // as of a token of its own
		in.Lineage = []policy.Member{{ID: id}}
		return in, nil
	case policy.ActionIssue, policy.ActionExchange, policy.ActionIntrospect:
	default:
		return in, nil
	}
	req, err := q.request()
	if err != nil {
		return policy.Input{}, err
	}
	if in.Action == policy.ActionIntrospect { // about a token for the audience
		in.ParentAudience = req.Audience
		return in, nil
	}
	in.Audience, in.Scopes, in.TTL, in.Binding = req.Audience, req.Scopes, req.TTL, string(req.Binding)
	if in.Action == policy.ActionExchange {
		// As if it had been given, by itself, a token that it may exchange.
		in.Lineage = []policy.Member{{ID: id}}
		in.ParentScopes, in.ParentAudience = req.Scopes, id.String()
	}
	return in, nil
}

// loadPolicy loads a folder, or a bundle whose signature nobody looks at.
func (a *app) loadPolicy(ctx context.Context, path string, timeout time.Duration) (*policy.Policy, error) {
	cfg := policy.Config{Dir: path, Now: a.now, Timeout: timeout}
	if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
		cfg.Dir, cfg.File = "", path
	}
	return policy.Load(ctx, cfg)
}

func (a *app) policyExplain(ctx context.Context, q *question) error {
	in, err := q.input(a.now())
	if err != nil {
		return err
	}
	p, err := a.loadPolicy(ctx, q.dir, 0)
	if err != nil {
		return failf(exitFailure, "name the folder with --dir; dayfly policy check says what is wrong with it", "%w", err)
	}
	e, err := p.Explain(ctx, in)
	if err != nil {
		return err
	}
	if err := a.printValue(e, func(w io.Writer) { fmt.Fprint(w, cleanLines(e.String())) }); err != nil {
		return err
	}
	if !e.Decision.Allow {
		reason, hint := "deny by default", ""
		if d := e.Decision.Denials; len(d) > 0 {
			reason, hint = d[0].Message, d[0].Hint
		}
		return failf(exitRefused, hint, "it would be refused: %s", reason)
	}
	return nil
}
