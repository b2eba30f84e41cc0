//go:build profile

package main

import (
	"fmt"
	"os"

	"github.com/dayflyhq/dayfly/cmd/internal/profile"
)

// For make profile alone: see the package.
func init() {
	if err := profile.Start("broker"); err != nil {
		fmt.Fprintf(os.Stderr, "dayfly-broker: %v\n", err)
		os.Exit(1)
	}
}
