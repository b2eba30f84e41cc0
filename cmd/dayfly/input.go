package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
)

func inputName(from string) string {
	if from == "-" {
		return "stdin"
	}
	return from
}

// readInput reads a file, or stdin for "-", up to a limit.
func (a *app) readInput(what, from string, limit int64) ([]byte, error) {
	in := a.stdin
	if from != "-" {
		f, err := os.Open(from)
		if err != nil {
			return nil, fileError("the "+what, from, err)
		}
		defer f.Close()
		in = f
	} else if isTerminal(a.stdin) {
		a.notef("reading the %s from the terminal: paste it, then press Ctrl-D on an empty line", what)
	}
	raw, err := io.ReadAll(io.LimitReader(in, limit+1))
	if err != nil {
		return nil, fileError("the "+what, inputName(from), err)
	}
	if int64(len(raw)) > limit {
		return nil, failf(exitFailure, "", "%s is larger than %d bytes: that is no %s", inputName(from), limit, what)
	}
	return raw, nil
}

// confirm asks for words to be typed on the terminal and fails if they aren't.
func (a *app) confirm(ctx context.Context, words string) error {
	fmt.Fprintf(a.stderr, "type %s to go on: ", a.paint(a.stderr, bold, words))
	line, err := readLine(ctx, a.stdin)
	if ctx.Err() != nil {
		fmt.Fprintln(a.stderr)
		return failf(exitFailure, "", "interrupted: nothing was done")
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("reading the confirmation: %w", err)
	}
	if strings.TrimSpace(line) != words {
		return failf(exitFailure, "type exactly the words that are shown", "not confirmed: nothing was done")
	}
	return nil
}

// readLine reads one line, but for an interrupt. The goroutine that waits for a
// line which never comes ends with the process.
func readLine(ctx context.Context, in io.Reader) (string, error) {
	type answer struct {
		line string
		err  error
	}
	got := make(chan answer, 1)
	go func() {
		line, err := bufio.NewReader(in).ReadString('\n')
		got <- answer{line, err}
	}()
	select {
	case r := <-got:
		return r.line, r.err
	case <-ctx.Done():
		return "", ctx.Err()
	}
}
