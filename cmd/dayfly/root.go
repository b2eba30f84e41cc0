package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// app is one run of the command: where it reads and writes, and the flags that
// every verb has.
type app struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	environ        []string
	now            func() time.Time

	// started is set once the command line was understood: what fails before is
	// a mistake in it.
	started bool
	// verb is what runs, for errors: "token get".
	verb string

	conn    connFlags
	output  string
	timeout time.Duration
}

// defaultTimeout is long enough for a broker that restarts, short enough to be told.
const defaultTimeout = 10 * time.Second

// run is the whole command; the number is its exit code.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer, environ []string) int {
	a := &app{stdin: stdin, stdout: stdout, stderr: stderr, environ: environ, now: time.Now}
	root := a.root()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	var of childCode
	if errors.As(err, &of) {
		return int(of)
	}
	if a.verb == "" {
		a.verb = verbOf(root, args)
	}
	if !a.started {
		err = misuse(err, a.verb)
		if wantsJSON(args) { // flags behind the wrong one weren't read
			a.output = outputJSON
		}
	}
	if a.verb == "exec" {
		err = execFailure(err)
	}
	return a.fail(err)
}

const rootLong = `dayfly fetches credentials that live for minutes, and kills them when it must.

Configuration comes from flags, else from the environment:

  --broker          DAYFLY_BROKER           address of the broker, host:port
  --broker-id       DAYFLY_BROKER_ID        SPIFFE ID that the broker must prove
  --agent           DAYFLY_AGENT            socket of the agent, unix:///path (token, exec, helper)
  --svid-socket     SPIFFE_ENDPOINT_SOCKET  Workload API that your SVID comes from
  --svid-cert, --svid-key, --svid-bundle    or the SVID and its bundle in PEM files
  --break-glass     (never)                 root's socket on the broker's host

Exit codes:

  0  done
  1  failed
  2  the command line is wrong
  3  recorded, but not contained everywhere yet
  4  refused: by policy, by a lock, or for want of a valid SVID
  5  unavailable: the broker, the agent or the Workload API could not be reached,
     or has no capacity now
  6  proposed: nothing is done until a second person confirms
  7  policy replay: decisions would change, and none newly be denied

exec has its program's, and others of its own.`

// root builds the tree of verbs. One more verb is one more line here.
func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:           "dayfly",
		Short:         "Credentials that live for minutes",
		Long:          rootLong,
		SilenceErrors: true,
		SilenceUsage:  true,
		Example: `  dayfly token get --audience orders
  dayfly exec --audience orders -- ./job
  dayfly revoke --identity spiffe://example.org/payments --dry-run`,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			a.verb = verbName(cmd)
			if err := a.checkGlobals(); err != nil {
				return err
			}
			a.started = true
			return nil
		},
	}
	a.globalFlags(root)
	root.AddCommand(
		a.tokenCmd(),
		a.execCmd(),
		a.helperCmd(),
		a.revokeCmd(),
		a.liftCmd(),
		a.grantsCmd(),
		a.locksCmd(),
		a.revocationsCmd(),
		a.policyCmd(),
		a.versionCmd(),
		a.devCmd(),
		a.demoCmd(),
	)
	root.AddCommand(a.internalCmds()...)
	return root
}

func (a *app) globalFlags(root *cobra.Command) {
	f := root.PersistentFlags()
	a.conn.add(f)
	f.StringVarP(&a.output, "output", "o", outputText, "what to print: text or json")
	f.DurationVar(&a.timeout, "timeout", defaultTimeout, "how long one call may take, and how long getting the SVID may")
	complete(root, "output", outputText, outputJSON)
}

func (a *app) checkGlobals() error {
	if a.output != outputText && a.output != outputJSON {
		wrong := a.output
		a.output = outputText
		return usagef("write --output text or --output json", "unknown output %q", wrong)
	}
	if a.timeout <= 0 {
		return usagef("write a duration such as 10s", "--timeout must be positive")
	}
	return nil
}

// group is a command that only holds others. Without one of them it says so
// instead of printing help and calling that success.
func group(use, short, long, example string, verbs ...*cobra.Command) *cobra.Command {
	names := make([]string, len(verbs))
	for i, v := range verbs {
		names[i] = v.Name()
	}
	cmd := &cobra.Command{
		Use: use, Short: short, Long: long, Example: example,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			hint := fmt.Sprintf("one of: %s; dayfly %s --help says more", strings.Join(names, ", "), use)
			if len(args) == 0 {
				return usagef(hint, "a verb is missing")
			}
			return usagef(hint, "unknown verb %q", args[0])
		},
	}
	cmd.AddCommand(verbs...)
	return cmd
}

// noArgs and oneArg are cobra's checks with words of ours.
func noArgs(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usagef("everything is said by flags: see --help", "unexpected argument %q", short(args[0]))
	}
	return nil
}

func oneArg(what string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		switch len(args) {
		case 1:
			return nil
		case 0:
			return usagef("see --help for examples", "%s is missing", what)
		}
		return usagef("give one at a time", "one %s is wanted, not %d", what, len(args))
	}
}

// complete offers fixed values for a flag to the shell.
func complete(cmd *cobra.Command, flag string, values ...string) {
	err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
	if err != nil {
		panic("internal error: " + err.Error()) // a flag that doesn't exist
	}
}

func verbName(cmd *cobra.Command) string {
	return strings.TrimSpace(strings.TrimPrefix(cmd.CommandPath(), "dayfly"))
}

// verbOf says which verb a command line that wasn't understood meant.
func verbOf(root *cobra.Command, args []string) string {
	cmd, _, err := root.Find(args)
	if err != nil || cmd == nil {
		return ""
	}
	return verbName(cmd)
}

// misuse turns what cobra says of a command line into a usage error.
func misuse(err error, verb string) error {
	var usage *usageError
	if errors.As(err, &usage) {
		return err
	}
	first, rest, _ := strings.Cut(err.Error(), "\n")
	hint := strings.Join(strings.Fields("dayfly "+verb+" --help"), " ") + " lists what there is"
	if _, names, ok := strings.Cut(rest, "Did you mean this?"); ok {
		hint = "did you mean: " + strings.Join(strings.Fields(names), ", ")
	}
	return usagef(hint, "%s", first)
}

func wantsJSON(args []string) bool {
	for i, arg := range args {
		switch arg {
		case "--":
			return false
		case "--output=" + outputJSON, "-o" + outputJSON, "-o=" + outputJSON:
			return true
		case "--output", "-o":
			return i+1 < len(args) && args[i+1] == outputJSON
		}
	}
	return false
}

// env returns a variable of the environment, "" where it isn't set. As in a shell
// the last one wins.
func (a *app) env(name string) string {
	for _, kv := range slices.Backward(a.environ) {
		if k, v, ok := strings.Cut(kv, "="); ok && k == name {
			return v
		}
	}
	return ""
}
