package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"golang.org/x/term"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// What --output takes.
const (
	outputText = "text"
	outputJSON = "json"
)

// print writes a message: as proto JSON, or by text.
func (a *app) print(m proto.Message, text func(io.Writer)) error {
	if a.output == outputText {
		return a.table(text)
	}
	return a.printJSON(m)
}

// printJSON writes proto JSON, always in the same layout: protojson varies its
// white space on purpose.
func (a *app) printJSON(m proto.Message) error {
	raw, err := protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(m)
	if err != nil {
		return fmt.Errorf("writing JSON: %w", err)
	}
	var out bytes.Buffer
	if err := json.Indent(&out, raw, "", "  "); err != nil {
		return fmt.Errorf("writing JSON: %w", err)
	}
	out.WriteByte('\n')
	_, err = a.stdout.Write(out.Bytes())
	return err
}

// printValue is print for what isn't a message; its JSON is documented in
// docs/cli.md.
func (a *app) printValue(v any, text func(io.Writer)) error {
	if a.output == outputText {
		return a.table(text)
	}
	enc := json.NewEncoder(a.stdout)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// table aligns what text writes at its tabs and prints it at once.
func (a *app) table(text func(io.Writer)) error { return tableTo(a.stdout, text) }

func tableTo(stream io.Writer, text func(io.Writer)) error {
	var out bytes.Buffer
	w := tabwriter.NewWriter(&out, 0, 8, 2, ' ', 0)
	text(w)
	_ = w.Flush() // writing to a buffer
	_, err := stream.Write(out.Bytes())
	return err
}

// notef says something beside the result, on stderr.
func (a *app) notef(format string, args ...any) {
	fmt.Fprintf(a.stderr, format+"\n", args...)
}

// row writes cells with tabs between them. Cells come from servers, tokens and
// other people: nothing in them reaches the terminal but printable text.
func row(w io.Writer, cells ...string) {
	for i, c := range cells {
		cells[i] = clean(c)
	}
	fmt.Fprintln(w, strings.Join(cells, "\t"))
}

// clean replaces what a terminal could take for a command, and line breaks that
// would let a text look like lines of ours.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		if r == '\n' || r == '\t' || r == '\r' {
			return ' '
		}
		return unicode.ReplacementChar
	}, s)
}

// cleanLines is clean for a text of ours that has lines.
func cleanLines(s string) string {
	lines := strings.Split(s, "\n")
	for i, l := range lines {
		lines[i] = clean(l)
	}
	return strings.Join(lines, "\n")
}

// short cuts a text from the command line for an error: it may be a credential in
// the wrong place.
func short(s string) string {
	const most = 32
	if len(s) <= most {
		return s
	}
	return s[:8] + "..."
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// at writes a moment in UTC, with seconds; "-" for none.
func at(ts *timestamppb.Timestamp) string {
	if ts == nil {
		return "-"
	}
	return ts.AsTime().UTC().Format(time.RFC3339)
}

// span writes a duration for people: whole seconds above ten of them.
func span(d time.Duration) string {
	switch {
	case d >= 10*time.Second:
		return d.Round(time.Second).String()
	case d >= time.Second:
		return d.Round(100 * time.Millisecond).String()
	}
	return d.Round(time.Millisecond).String()
}

func count(n uint64, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// isTerminal reports whether a stream of the command's is one.
func isTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// paint colours a text for a stream: on a terminal, and if NO_COLOR isn't set.
func (a *app) paint(stream io.Writer, colour, s string) string {
	if !isTerminal(stream) || a.env("NO_COLOR") != "" || a.env("TERM") == "dumb" {
		return s
	}
	return "\x1b[" + colour + "m" + s + "\x1b[0m"
}

// Colours of paint.
const (
	red    = "31"
	green  = "32"
	yellow = "33"
	bold   = "1"
)
