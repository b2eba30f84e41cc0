// Command mutants plants mistakes in the code, one at a time, and lets the simulation, or
// another test that goes through histories, find each: it shows that these have teeth.
// make mutants runs it; the table that it prints is in docs/simulation.md.
//
// A mistake is planted by go build's -overlay, so that the code holds no switch for it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, out, progress io.Writer) error {
	flags := flag.NewFlagSet("mutants", flag.ContinueOnError)
	root := flags.String("C", ".", "root of the repository")
	seeds := flags.Int("seeds", 3000, "how many histories to try for one mistake")
	only := flags.String("run", "", "only those whose trap or mistake matches")
	if err := flags.Parse(args); err != nil {
		return err
	}
	match, err := regexp.Compile(*only)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "dayfly-mutants-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	fmt.Fprintf(out, "| trap | mistake | found by | histories until found | seconds |\n| --- | --- | --- | --- | --- |\n")
	survivors, planted := 0, 0
	for _, h := range hunts {
		for _, m := range h.mutants {
			if !match.MatchString(m.trap + " " + m.mistake) {
				continue
			}
			planted++
			fmt.Fprintf(progress, "%d: %s\n", planted, m.mistake)
			f, err := h.hunt(ctx, m, *root, filepath.Join(dir, strconv.Itoa(planted)), *seeds)
			if err != nil {
				return fmt.Errorf("%s: %w", m.mistake, err)
			}
			if f.invariant == "" {
				survivors++
				f.invariant = "**nothing**"
			}
			fmt.Fprintf(out, "| %s | %s | %s | %d | %.0f |\n", m.trap, m.mistake, f.invariant, f.histories, f.elapsed.Seconds())
		}
	}
	if survivors > 0 {
		return fmt.Errorf("%d mistakes were not found", survivors)
	}
	return nil
}

// A finding is which invariant broke, or which test failed, after how many histories.
type finding struct {
	invariant string
	histories int
	elapsed   time.Duration
}

// hunt builds the test with the mistake and runs it until it fails.
func (h hunter) hunt(ctx context.Context, m mutant, root, dir string, seeds int) (finding, error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return finding{}, err
	}
	overlay, err := m.plant(root, dir)
	if err != nil {
		return finding{}, err
	}
	binary := filepath.Join(dir, "hunter.test")
	build := exec.CommandContext(ctx, "go", "test", "-c", "-vet=off", "-overlay", overlay, "-o", binary, "./"+h.dir)
	build.Dir = root
	if b, err := build.CombinedOutput(); err != nil {
		return finding{}, fmt.Errorf("building: %w\n%s", err, b)
	}
	began := time.Now()
	test := exec.CommandContext(ctx, binary, append([]string{"-test.run", "^" + h.test + "$", "-test.timeout", "30m"}, h.flags(seeds)...)...)
	test.Dir = filepath.Join(root, h.dir)
	b, err := test.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return finding{"", seeds, time.Since(began)}, nil
	case !errors.As(err, &exit) || ctx.Err() != nil:
		return finding{}, errors.Join(err, ctx.Err())
	}
	found := h.found.FindSubmatch(b)
	if found == nil {
		return finding{}, fmt.Errorf("%s ended in another way:\n%.2000s", h.test, b)
	}
	f := finding{invariant: h.test, elapsed: time.Since(began)}
	for i, group := range h.found.SubexpNames() {
		switch group {
		case "broken":
			f.invariant = string(found[i])
		case "history", "passed":
			if f.histories, err = strconv.Atoi(string(found[i])); err != nil {
				return finding{}, err
			}
			if group == "passed" {
				f.histories++
			}
		}
	}
	return f, nil
}

// plant writes the changed files and the overlay that puts them in place.
func (m mutant) plant(root, dir string) (string, error) {
	changed := map[string]string{}
	for _, e := range m.edits {
		path, err := filepath.Abs(filepath.Join(root, e.file))
		if err != nil {
			return "", err
		}
		text, ok := changed[path]
		if !ok {
			b, err := os.ReadFile(path)
			if err != nil {
				return "", err
			}
			text = string(b)
		}
		if n := strings.Count(text, e.old); n != 1 {
			return "", fmt.Errorf("%s has the text to change %d times, not once: %q", e.file, n, e.old)
		}
		changed[path] = strings.Replace(text, e.old, e.new, 1)
	}
	replace := map[string]string{}
	for path, text := range changed {
		replace[path] = filepath.Join(dir, strconv.Itoa(len(replace))+"_"+filepath.Base(path))
		if err := os.WriteFile(replace[path], []byte(text), 0o600); err != nil {
			return "", err
		}
	}
	b, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	overlay := filepath.Join(dir, "overlay.json")
	return overlay, os.WriteFile(overlay, b, 0o600)
}
