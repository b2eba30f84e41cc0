package main

import (
	"os"
	"strings"
	"testing"
	"unicode"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"pgregory.net/rapid"
)

// docs/cli.md names every verb and every flag.
func TestEveryVerbIsDocumented(t *testing.T) {
	raw, err := os.ReadFile("../../docs/cli.md")
	if err != nil {
		t.Fatal(err)
	}
	page := string(raw)
	a := &app{}
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		if cmd.Hidden || cmd.Name() == "help" {
			return
		}
		if cmd.Runnable() && !cmd.HasSubCommands() && !strings.Contains(page, cmd.CommandPath()) {
			t.Errorf("docs/cli.md doesn't mention %q", cmd.CommandPath())
		}
		check := func(f *pflag.Flag) {
			if !strings.Contains(page, "--"+f.Name) {
				t.Errorf("docs/cli.md doesn't mention --%s of %q", f.Name, cmd.CommandPath())
			}
		}
		cmd.LocalFlags().VisitAll(check)
		for _, c := range cmd.Commands() {
			walk(c)
		}
	}
	walk(a.root())
}

// Whatever a stranger wrote, a cell of a table is one line of printable text.
func TestNothingATerminalObeysIsShown(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := rapid.String().Draw(t, "text")
		for _, r := range clean(s) {
			if !unicode.IsPrint(r) {
				t.Fatalf("clean(%q) has %U", s, r)
			}
		}
		if got := clean(clean(s)); got != clean(s) {
			t.Fatalf("clean isn't stable: %q", got)
		}
	})
	if got := clean("a\x1b[31mb\nc\u202ed"); got != "a\ufffd[31mb c\ufffdd" {
		t.Errorf("got %q", got)
	}
}
