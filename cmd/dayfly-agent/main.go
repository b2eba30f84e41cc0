// Command dayfly-agent is the sidecar; docs/agent.md tells how to run it.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/dayflyhq/dayfly/cmd/internal/agentd"
	"github.com/dayflyhq/dayfly/cmd/internal/config"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := agentd.Run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	if err != nil && err.Error() != "" {
		fmt.Fprintln(os.Stderr, "dayfly-agent:", err)
	}
	os.Exit(config.ExitCode(err))
}
