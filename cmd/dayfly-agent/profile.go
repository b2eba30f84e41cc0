//go:build profile

package main

import (
	"fmt"
	"os"

	"github.com/dayflyhq/dayfly/cmd/internal/profile"
)

// For make profile alone: see the package.
func init() {
	if err := profile.Start("agent"); err != nil {
		fmt.Fprintf(os.Stderr, "dayfly-agent: %v\n", err)
		os.Exit(1)
	}
}
