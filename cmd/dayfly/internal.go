package main

import (
	"github.com/dayflyhq/dayfly/cmd/internal/agentd"
	"github.com/dayflyhq/dayfly/cmd/internal/brokerd"
	"github.com/dayflyhq/dayfly/cmd/internal/config"
	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/spf13/cobra"
)

// The daemons are hidden verbs too, so that dev and demo can run real processes of
// this very binary. Such a process ends when its standard input does.
const (
	internalBroker = "internal-broker"
	internalAgent  = "internal-agent"
)

func (a *app) internalCmds() []*cobra.Command {
	return []*cobra.Command{
		a.internalCmd(internalBroker, brokerd.Command),
		a.internalCmd(internalAgent, func(string) *cobra.Command { return agentd.Command() }),
	}
}

func (a *app) internalCmd(name string, daemon func(string) *cobra.Command) *cobra.Command {
	return &cobra.Command{
		Use: name, Hidden: true, DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := sandbox.Lifeline(cmd.Context(), a.stdin)
			defer cancel()
			d := daemon(name)
			d.SetArgs(args)
			d.SetOut(a.stdout)
			d.SetErr(a.stderr)
			err := config.Execute(ctx, d)
			if code := config.ExitCode(err); code == exitUsage {
				return failf(code, "", "%w", err)
			}
			return err
		},
	}
}
