// Command dayfly-broker issues short-lived credentials and revokes them.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/dayflyhq/dayfly/cmd/internal/brokerd"
	"github.com/dayflyhq/dayfly/cmd/internal/config"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := config.Execute(ctx, brokerd.Command("dayfly-broker"))
	if err != nil {
		fmt.Fprintf(os.Stderr, "dayfly-broker: %v\n", err)
	}
	os.Exit(config.ExitCode(err))
}
