package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// Exit codes.
const (
	exitFailure = 1
	exitUsage   = 2
	exitMissed  = 3 // with --judge: a target was missed
)

func main() {
	// A reader that has gone ("bench run | head") is an error of writing, after which the
	// processes that were started are ended as ever.
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// usageError is a command line that makes no sense.
type usageError struct{ error }

var errMissed = errors.New("a target was missed")

func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := &cobra.Command{
		Use: "bench", Short: "Measure dayfly against its floors", SilenceUsage: true, SilenceErrors: true,
		Long: "bench measures the built commands beside floors: the least that the same job can cost.\n\n" +
			"Exit codes: 0 done, 1 it failed, 2 the command line is wrong, 3 a target was missed (with --judge).",
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(runCommand(), rowsCommand(), profileCommand(), reportCommand(), floorCommand(stdin))
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintln(stderr, "bench:", err)
	var usage usageError
	switch {
	case errors.As(err, &usage):
		return exitUsage
	case errors.Is(err, errMissed):
		return exitMissed
	}
	return exitFailure
}

// options are what run and profile share.
type options struct {
	size, row, bin, dir string
}

func (o *options) add(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.StringVar(&o.size, "size", "normal", "tiny, normal or large")
	fs.StringVar(&o.row, "row", "", "only the rows whose \"row/case\" this regular expression matches")
	fs.StringVar(&o.bin, "bin", "", "folder of commands that are built already (default: they are built now)")
	fs.StringVar(&o.dir, "dir", "", "folder on the disk to be measured (default: that for temporary files)")
}

// rows are those that were asked for.
func (o *options) rows() (size, []row, error) {
	s, ok := sizes[o.size]
	if !ok {
		return size{}, nil, usageError{fmt.Errorf("--size: %q is not tiny, normal or large", o.size)}
	}
	s.name = o.size
	rows, err := matching(rowsOf(s), o.row)
	if err != nil {
		return size{}, nil, usageError{err}
	}
	return s, rows, nil
}

// lab prepares for measuring: the returned function cleans up.
func (o *options) lab(ctx context.Context, s size, tags ...string) (*lab, func(), error) {
	dir, err := os.MkdirTemp(o.dir, "dayfly-bench-")
	if err != nil {
		return nil, nil, err
	}
	l := &lab{size: s, dir: dir, bin: o.bin, made: map[string]any{}}
	clean := func() { l.end(); os.RemoveAll(dir) }
	if l.exe, err = os.Executable(); err == nil && l.bin == "" {
		l.bin = filepath.Join(dir, "bin")
		err = build(ctx, l.bin, tags...)
	}
	if err != nil {
		clean()
		return nil, nil, err
	}
	return l, clean, nil
}

// build makes the commands as make build does, and hello as anybody would, without its tag.
func build(ctx context.Context, into string, tags ...string) error {
	const module = "github.com/dayflyhq/dayfly/"
	for _, args := range [][]string{
		{"-tags", strings.Join(append([]string{"grpcnotrace"}, tags...), ","), module + "cmd/dayfly-broker", module + "cmd/dayfly-agent"},
		{module + "e2e/bench/hello"},
	} {
		cmd := exec.CommandContext(ctx, "go", append([]string{"build", "-trimpath", "-ldflags=-s -w", "-o", into + "/"}, args...)...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("building the commands: %w: %s", err, out)
		}
	}
	return nil
}

func runCommand() *cobra.Command {
	var (
		o            options
		output, save string
		judge        bool
	)
	cmd := &cobra.Command{
		Use: "run", Short: "Measure and print the table", Args: cobra.NoArgs,
		Example: "  bench run\n  bench run --row '^(issue|exchange)' --output json\n  bench run --size large --save docs",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "table" && output != "json" {
				return usageError{fmt.Errorf("--output: %q is not table or json", output)}
			}
			s, rows, err := o.rows()
			if err != nil {
				return err
			}
			ctx, out := cmd.Context(), cmd.OutOrStdout()
			l, clean, err := o.lab(ctx, s)
			if err != nil {
				return err
			}
			defer clean()
			r := &Report{Machine: machine(dirOf(o.dir)), Command: "bench run --size " + s.name}
			// What was measured before a failure is shown and kept all the same.
			err = l.all(ctx, rows, r, progressTo(cmd.ErrOrStderr()))
			if err != nil && len(r.Figures) == 0 {
				return err
			}
			if output == "json" {
				enc := json.NewEncoder(out)
				enc.SetIndent("", "  ")
				err = errors.Join(err, enc.Encode(r))
			} else {
				err = errors.Join(err, r.table(out))
			}
			if save != "" {
				err = errors.Join(err, r.save(save))
			}
			if err == nil && judge && r.missed() > 0 {
				err = fmt.Errorf("%w: %d of %d", errMissed, r.missed(), r.judged())
			}
			return err
		},
	}
	o.add(cmd)
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	cmd.Flags().StringVar(&save, "save", "", "folder whose performance.json, performance.md and plots take the figures")
	cmd.Flags().BoolVar(&judge, "judge", false, "exit with 3 when a target is missed")
	return cmd
}

func dirOf(dir string) string {
	if dir == "" {
		return os.TempDir()
	}
	return dir
}

// all measures rows, one after the other. One that fails ends it: a figure that is
// silently missing would look like a table that is whole.
func (l *lab) all(ctx context.Context, rows []row, r *Report, progress func(string)) error {
	for i, row := range rows {
		progress(fmt.Sprintf("%d of %d: %s", i+1, len(rows), row.id()))
		l.use(row.fixture)
		f, err := l.measure(ctx, row)
		if err != nil {
			return fmt.Errorf("%s: %w", row.id(), err)
		}
		r.Figures = append(r.Figures, f)
	}
	progress("")
	return nil
}

// progressTo shows on a terminal what is being measured, and nowhere else.
func progressTo(w io.Writer) func(string) {
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return func(string) {}
	}
	return func(what string) { fmt.Fprintf(f, "\r\x1b[K%s", what) }
}

func rowsCommand() *cobra.Command {
	var o options
	cmd := &cobra.Command{
		Use: "rows", Short: "List the rows of a size", Args: cobra.NoArgs, Example: "  bench rows --size large",
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, rows, err := o.rows()
			for _, r := range rows {
				fmt.Fprintln(cmd.OutOrStdout(), r.id())
			}
			return err
		},
	}
	o.add(cmd)
	return cmd
}

func reportCommand() *cobra.Command {
	return &cobra.Command{
		Use: "report FOLDER", Short: "Write performance.md and the plots anew from performance.json", Args: cobra.ExactArgs(1), Example: "  bench report docs",
		RunE: func(_ *cobra.Command, args []string) error { return (&Report{}).save(args[0]) },
	}
}
