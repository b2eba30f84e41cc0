// Command dayfly-broker issues short-lived credentials and revokes them.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/dayflyhq/dayfly/cmd/internal/brokerd"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := brokerd.Command("dayfly-broker").ExecuteContext(ctx)
	if err != nil {
		fmt.Fprintf(os.Stderr, "dayfly-broker: %v\n", err)
	}
	os.Exit(brokerd.ExitCode(err))
}
