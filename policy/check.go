package policy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/tester"
)

// testTimeout bounds one Rego test.
const testTimeout = 10 * time.Second

// Check reads everything in a folder, or in a bundle whose signature nobody looks at, the Rego tests included, and returns all that is
// wrong with it as [Problems], or nil. A folder that passes can be loaded.
func Check(path string) error {
	f, err := readAny(path)
	if err != nil {
		return err
	}
	s := parse(f, true)
	s.compile(true)
	// What the tests define doesn't count: a folder whose rules need its tests
	// compiles with them and can't be loaded.
	rules := parse(f, false)
	rules.compile(false)
	return append(s.problems, rules.problems...).err()
}

// TestResult is what came of one Rego test.
type TestResult struct {
	// Name is the test's full name: data.policy_test.test_x.
	Name string `json:"name"`
	// File and Line are where it stands.
	File string `json:"file"`
	Line int    `json:"line"`
	// Passed, or Skipped (its name starts with todo_test_), or neither.
	Passed  bool `json:"passed"`
	Skipped bool `json:"skipped,omitempty"`
	// Error says why it couldn't run to its end, empty where it merely failed.
	Error string `json:"error,omitempty"`
	// Output is what it printed.
	Output   string        `json:"output,omitempty"`
	Duration time.Duration `json:"duration_ns"`
}

// ErrTestsFailed says that at least one Rego test didn't pass.
var ErrTestsFailed = errors.New("policy tests failed")

// Test runs the Rego tests in a folder or a bundle (rules named test_* in files named *_test.rego)
// on its rules and data, and writes one line a test and a summary to w. It
// returns all results; the error is [Problems] for a folder that Check refuses,
// and wraps [ErrTestsFailed] where a test didn't pass. No tests at all isn't an
// error, and is said.
func Test(ctx context.Context, path string, w io.Writer) ([]TestResult, error) {
	if err := Check(path); err != nil {
		return nil, err
	}
	f, err := readAny(path)
	if err != nil {
		return nil, err
	}
	s := parse(f, true)
	if err := s.problems.err(); err != nil {
		return nil, err
	}
	results, err := s.runTests(ctx)
	if err != nil {
		return nil, fmt.Errorf("running policy tests: %w", err)
	}
	return results, summarize(w, results)
}

func (s *source) runTests(ctx context.Context) (results []TestResult, err error) {
	store := s.store()
	err = storage.Txn(ctx, store, storage.WriteParams, func(txn storage.Transaction) error {
		// Not strict: the tester rewrites the modules while they compile.
		c := ast.NewCompiler().WithCapabilities(capabilities()).WithEnablePrintStatements(true)
		ch, err := tester.NewRunner().
			SetCompiler(c).
			SetStore(store).
			SetModules(s.modules).
			CapturePrintOutput(true).
			RaiseBuiltinErrors(true).
			SetTimeout(testTimeout).
			SetDefaultRegoVersion(ast.RegoV1).
			RunTests(ctx, txn)
		if err != nil {
			return err
		}
		for r := range ch {
			results = append(results, testResult(r))
		}
		return ctx.Err()
	})
	return results, err
}

func testResult(r *tester.Result) TestResult {
	out := TestResult{
		Name:     r.Package + "." + r.Name,
		Passed:   r.Pass(),
		Skipped:  r.Skip,
		Output:   string(r.Output),
		Duration: r.Duration,
	}
	if r.Location != nil {
		out.File, out.Line = r.Location.File, r.Location.Row
	}
	if r.Error != nil {
		out.Error = r.Error.Error()
	}
	return out
}

func summarize(w io.Writer, results []TestResult) error {
	var passed, skipped, failed int
	for _, r := range results {
		verdict := "FAIL"
		switch {
		case r.Skipped:
			verdict = "SKIP"
			skipped++
		case r.Passed:
			verdict = "pass"
			passed++
		default:
			failed++
		}
		fmt.Fprintf(w, "%s  %s (%v)\n", verdict, r.Name, r.Duration.Round(time.Microsecond))
		if verdict != "FAIL" {
			continue
		}
		fmt.Fprintf(w, "      at %s:%d\n", r.File, r.Line)
		if r.Error != "" {
			fmt.Fprintf(w, "      %s\n", r.Error)
		}
		if r.Output != "" {
			fmt.Fprintf(w, "      printed: %s\n", r.Output)
		}
	}
	if len(results) == 0 {
		fmt.Fprintln(w, "no tests: they are rules named test_* in files named *_test.rego")
		return nil
	}
	fmt.Fprintf(w, "%d passed, %d failed, %d skipped\n", passed, failed, skipped)
	if failed > 0 {
		return fmt.Errorf("%w: %d of %d", ErrTestsFailed, failed, len(results))
	}
	return nil
}
