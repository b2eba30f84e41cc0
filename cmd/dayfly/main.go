// Command dayfly is what people use of dayfly: it fetches and shows credentials,
// revokes them and proves it, reads the records, and tries out policy.
//
// Every verb has a file of its own and is listed in root.go; docs/cli.md describes
// them all, docs/incident.md is the page for an emergency.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, calledAs(os.Args[0], os.Args[1:]), os.Stdin, os.Stdout, os.Stderr, os.Environ())
	stop()
	os.Exit(code)
}
