package main

import (
	"context"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"
)

func TestMain(m *testing.M) {
	dayfly := func() {
		os.Args = append(os.Args[:1:1], patient(os.Args[1:])...)
		main()
	}
	testscript.Main(m, map[string]func(){"dayfly": dayfly, "git-credential-dayfly": dayfly, "docker-credential-dayfly": dayfly})
}

// patient gives calls more time than they have by default, for slow machines; what
// a script says overrides it.
func patient(args []string) []string {
	if len(args) == 0 || strings.HasPrefix(args[0], "__") {
		return args
	}
	return append([]string{"--timeout", "60s"}, args...)
}

type fakeKey struct{}

// Each script has a fake broker, agent and break-glass socket of its own, and looks
// at what they were asked with "saw".
func TestScripts(t *testing.T) {
	t.Parallel()
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(e *testscript.Env) error {
			f, err := newFake()
			if err != nil {
				return err
			}
			e.Defer(f.Close)
			env, err := f.start(e.WorkDir)
			for k, v := range env {
				e.Setenv(k, v)
			}
			e.Values[fakeKey{}] = f
			return err
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"saw": saw, "status": exitStatus,
		},
	})
}

// saw REGEXP: a request has come that matches "METHOD {json}", or comes soon; with !
// none has come.
func saw(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: saw REGEXP")
	}
	wait := 30 * time.Second
	if neg {
		wait = 0
	}
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	f := ts.Value(fakeKey{}).(*fake)
	if f.await(ctx, regexp.MustCompile(args[0])) == neg {
		ts.Fatalf("saw %q is %v; got:\n%s", args[0], neg, f.seen)
	}
}

// status CODE CMD...: the command ends with exactly this exit code.
func exitStatus(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: status CODE CMD [ARG...]")
	}
	// A shell tells, on its stderr's last line.
	err := ts.Exec("sh", append([]string{"-c", `want=$1; shift; "$@"; got=$?; [ "$got" = "$want" ] || { echo "exit status $got" >&2; exit 99; }`, "sh"}, args...)...)
	if err != nil {
		ts.Fatalf("want exit status %s: %v", args[0], err)
	}
}

// Every verb says what it is, how it is used, and takes no undescribed flag.
func TestEveryVerbHasHelp(t *testing.T) {
	a := &app{}
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		if cmd.Hidden {
			return
		}
		if cmd.Short == "" || cmd.Example == "" {
			t.Errorf("%s has no description or no example", cmd.CommandPath())
		}
		for _, c := range cmd.Commands() {
			walk(c)
		}
	}
	walk(a.root())
}
