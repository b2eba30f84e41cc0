package main

import (
	"context"
	"errors"
	"io/fs"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
)

// Exit codes of exec beside dayfly's own, as env(1) has them.
const (
	exitNotExecutable = 126
	exitNotFound      = 127
)

const defaultVariable = "DAYFLY_TOKEN"

func (a *app) execCmd() *cobra.Command {
	var (
		flags    requestFlags
		variable string
	)
	cmd := &cobra.Command{
		Use:   "exec [flags] -- CMD [ARG...]",
		Short: "Run a command with a fresh token in its environment",
		Long: `Get a token and run a command with it in its environment, in ` + defaultVariable + ` or in the
variable that --env names. The command takes the place of dayfly: signals and exit
codes are its own, and nothing stays behind. Codes 126 and 127 say that it can't be
run or isn't there; what else fails before it runs has dayfly's exit codes.

The token isn't renewed: a command that runs longer than it lives asks the agent.`,
		Example: `  dayfly exec --audience orders -- ./nightly-job --full
  dayfly exec -a registry --binding none --env REGISTRY_TOKEN -- sh -c 'push "$REGISTRY_TOKEN"'`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef("dayfly exec --audience orders -- CMD", "the command is missing")
			}
			if cmd.ArgsLenAtDash() != 0 {
				return usagef("dayfly exec --audience orders -- CMD", "put -- before the command")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error { return a.exec(cmd.Context(), &flags, variable, args) },
	}
	flags.add(cmd)
	cmd.Flags().StringVar(&variable, "env", defaultVariable, "`name` of the variable that holds the token")
	return cmd
}

var variableName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

func (a *app) exec(ctx context.Context, flags *requestFlags, variable string, args []string) error {
	if !variableName.MatchString(variable) {
		return usagef("letters, digits and underscores", "--env %q is no name of a variable", variable)
	}
	// First, so that no token is issued for nothing.
	path, err := exec.LookPath(args[0])
	if err != nil {
		return notRunnable(args[0], err)
	}
	cred, err := a.issue(ctx, flags)
	if err != nil {
		return err
	}
	environ := slices.DeleteFunc(slices.Clone(a.environ), func(kv string) bool { return strings.HasPrefix(kv, variable+"=") })
	err = syscall.Exec(path, args, append(environ, variable+"="+cred.Token.Reveal()))
	return notRunnable(args[0], err)
}

func notRunnable(name string, err error) error {
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
		return failf(exitNotFound, "is it in PATH?", "there is no command %q", short(name))
	}
	return failf(exitNotExecutable, "is it executable?", "running %q: %w", short(name), err)
}
