package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/cmd/internal/brokerd"
	"github.com/dayflyhq/dayfly/policy"
	"github.com/spf13/cobra"
)

const (
	// maxAuditLine bounds a line of the audit, in bytes: requests are at most 64 KiB, and
	// what isn't an audit has longer ones.
	maxAuditLine = 1 << 20
	// rotatedAt is how the broker's rotation names old files: audit-<time>.jsonl.
	rotatedAt = "2006-01-02T15-04-05.000"
	// progressEvery is how often a terminal is told.
	progressEvery = 200 * time.Millisecond
)

// replayAnswer is what policy replay prints as JSON.
type replayAnswer struct {
	policy.Replayed
	Since time.Time `json:"since,omitzero"`
	Files []string  `json:"files"`
	// Revisions counts the questions by the policy that answered them.
	Revisions map[string]int `json:"revisions"`
	Skipped   skipped        `json:"skipped"`
}

// skipped counts what can't be asked again.
type skipped struct {
	// Older records lack the question: the broker that wrote them was of an older version.
	Older int `json:"older_version"`
	// NotAsked are decided before policy, or without it: malformed, no SVID, break-glass.
	NotAsked int `json:"not_asked"`
	// NoAnswer are those that policy had no answer to: none was in force, or it failed.
	NoAnswer int `json:"no_answer"`
	// Unreadable lines are no records of an audit.
	Unreadable int `json:"unreadable"`
}

func (a *app) policyReplayCmd() *cobra.Command {
	var files []string
	since := 24 * time.Hour
	cmd := &cobra.Command{
		Use:   "replay DIR",
		Short: "Put recorded decisions to a candidate policy, and say what would change",
		Long: `Put the questions that a broker's audit recorded to a candidate policy, a folder or an
OPA bundle, and say who would newly be denied or allowed, and what would be shortened.
Each file of the audit is read with the rotated ones beside it. Locks, caps and the
lineage of a presented token come on top, in the broker, as they did then.

Exit code 0 says that nothing would change, 7 that something would, 4 that something
would newly be denied.`,
		Example: `  dayfly policy replay ./policy --audit /var/log/dayfly/audit.jsonl
  dayfly policy replay bundle.tar.gz --audit a/audit.jsonl --audit b/audit.jsonl --since 1h --output json
  journalctl -o cat -u dayfly-broker | dayfly policy replay ./policy --audit -`,
		Args: oneArg("the candidate: a folder or a bundle"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.policyReplay(cmd.Context(), args[0], files, since)
		},
	}
	cmd.Flags().StringArrayVar(&files, "audit", nil, "`file` of a broker's audit, or - for standard input; may be given several times (required)")
	cmd.Flags().DurationVar(&since, "since", since, "how far back to go; 0: all that is recorded")
	return cmd
}

func (a *app) policyReplay(ctx context.Context, candidate string, files []string, since time.Duration) error {
	if len(files) == 0 {
		return usagef("name the broker's audit: --audit /var/log/dayfly/audit.jsonl", "--audit is missing")
	}
	if since < 0 {
		return usagef("such as --since 24h; 0 for all", "--since is negative")
	}
	// As patient as it takes: a machine with other work must not look like a broken policy.
	p, err := a.loadPolicy(ctx, candidate, time.Minute)
	if err != nil {
		return failf(exitFailure, "dayfly policy check says what is wrong with a candidate", "%w", err)
	}
	r := &auditReader{stdin: a.stdin, revisions: map[string]int{}}
	if since > 0 {
		r.since = a.now().Add(-since).UTC()
	}
	if err := r.find(files); err != nil {
		return failf(exitFailure, "name a file of the broker's audit; its configuration says where that is", "%w", err)
	}
	if isTerminal(a.stderr) {
		r.progress = a.stderr
	}
	got, err := p.Replay(ctx, r.records())
	if err = errors.Join(err, r.err); err != nil {
		return fmt.Errorf("reading the audit: %w", err)
	}
	answer := replayAnswer{Replayed: got, Since: r.since, Files: r.files, Revisions: r.revisions, Skipped: r.skipped}
	if err := a.printValue(answer, answer.text); err != nil {
		return err
	}
	denied := got.Count(policy.NewlyDenied)
	switch {
	case got.Asked == 0:
		return failf(exitFailure, "is it the audit of a broker, and was anything asked since? --since 0 takes all", "no decision to replay")
	case denied > 0:
		return failf(exitRefused, "", "%s would newly be denied", count(uint64(denied), "decision", "decisions"))
	case len(got.Changes) > 0:
		return failf(exitChanged, "", "%s would change, and none newly be denied", count(uint64(got.Asked-got.Same), "decision", "decisions"))
	}
	return nil
}

// auditReader reads the questions out of files of an audit.
type auditReader struct {
	stdin    io.Reader
	since    time.Time
	progress io.Writer // nil: nobody watches

	files        []string
	total, taken int64
	told         time.Time
	revisions    map[string]int
	skipped      skipped
	err          error // that ended the reading
}

// find adds to each file the rotated ones beside it that may hold something young enough.
func (r *auditReader) find(names []string) error {
	for _, name := range names {
		if name == "-" {
			r.files = append(r.files, name)
			continue
		}
		if _, err := os.Stat(name); err != nil {
			return err
		}
		ext := filepath.Ext(name)
		entries, err := os.ReadDir(filepath.Dir(name))
		if err != nil {
			return err
		}
		var old []string
		for _, e := range entries {
			stamp, ok := strings.CutPrefix(e.Name(), strings.TrimSuffix(filepath.Base(name), ext)+"-")
			stamp, is := strings.CutSuffix(stamp, ext)
			// The time is that of the rotation: all in the file is older.
			at, err := time.Parse(rotatedAt, stamp)
			if ok && is && err == nil && !at.Before(r.since) {
				old = append(old, filepath.Join(filepath.Dir(name), e.Name()))
			}
		}
		slices.Sort(old)
		r.files = append(r.files, append(old, name)...)
	}
	r.files = unique(r.files)
	for _, name := range r.files {
		if info, err := os.Stat(name); err == nil {
			r.total += info.Size()
		}
	}
	return nil
}

func unique(names []string) []string {
	var out []string
	for _, n := range names {
		if !slices.Contains(out, n) {
			out = append(out, n)
		}
	}
	return out
}

// records visits the questions; r.err says afterwards whether all were read.
func (r *auditReader) records() iter.Seq[policy.Recorded] {
	return func(yield func(policy.Recorded) bool) {
		defer r.tell(true)
		for _, name := range r.files {
			if r.err = r.file(name, yield); r.err != nil {
				return
			}
		}
	}
}

func (r *auditReader) file(name string, yield func(policy.Recorded) bool) error {
	in := r.stdin
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		in = f
	}
	lines := bufio.NewReaderSize(in, 64<<10)
	for {
		line, err := auditLine(lines)
		r.taken += int64(len(line))
		if len(line) > 0 && !r.line(line, yield) {
			return nil
		}
		r.tell(false)
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("%s: %w", name, err)
		}
	}
}

// auditLine reads a line; of one that is too long, its beginning.
func auditLine(in *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := in.ReadSlice('\n')
		if len(line) < maxAuditLine {
			line = append(line, part...)
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return line, err
		}
	}
}

// line takes the questions of one record, and says whether more are wanted.
func (r *auditReader) line(line []byte, yield func(policy.Recorded) bool) bool {
	var e broker.AuditEntry
	if err := json.Unmarshal(line, &e); err != nil || e.Action == "" || e.Time.IsZero() {
		r.skipped.Unreadable++
		return true
	}
	switch {
	case e.Time.Before(r.since):
		return true
	case len(e.Asked) == 0 && e.Rule != "" && e.Rule != "break-glass":
		r.skipped.Older++
	case len(e.Asked) == 0:
		r.skipped.NotAsked++
	}
	for _, asked := range e.Asked {
		in, err := brokerd.Question(e.Actor, asked)
		switch {
		case err != nil:
			r.skipped.Unreadable++
			continue
		case asked.Answer == nil:
			r.skipped.NoAnswer++
			continue
		}
		r.revisions[e.Revision]++
		q := policy.Recorded{Input: in, Answer: policy.Answer{
			Allow: asked.Answer.Allow, Reason: asked.Answer.Reason, Scopes: asked.Answer.Scopes,
			TTL: asked.Answer.TTL, Binding: string(asked.Answer.Binding),
		}}
		if e.Outcome == "allowed" {
			q.Given = e.TTL
		}
		if !yield(q) {
			return false
		}
	}
	return true
}

// tell shows a terminal how far it is, in one line that it wipes at the end.
func (r *auditReader) tell(done bool) {
	switch now := time.Now(); {
	case r.progress == nil:
	case done:
		fmt.Fprint(r.progress, "\r\x1b[K")
	case now.Sub(r.told) >= progressEvery:
		r.told = now
		if r.total > 0 {
			fmt.Fprintf(r.progress, "\r\x1b[Kreplaying: %d %%", min(100, 100*r.taken/r.total))
		} else {
			fmt.Fprintf(r.progress, "\r\x1b[Kreplaying: %d bytes", r.taken)
		}
	}
}

// titles are how changes are called, the gravest first.
var titles = map[policy.ChangeKind]string{
	policy.NewlyDenied: "newly denied", policy.Shortened: "shortened", policy.FewerScopes: "fewer scopes", policy.StricterBound: "bound more strictly",
	policy.NewlyAllowed: "newly allowed", policy.Lengthened: "longer", policy.MoreScopes: "more scopes", policy.LaxerBound: "bound more laxly",
}

func (r replayAnswer) text(w io.Writer) {
	fmt.Fprintf(w, "%s replayed against %s: %d the same\n", count(uint64(r.Asked), "decision", "decisions"), clean(r.Revision), r.Same)
	for _, kind := range policy.ChangeKinds {
		if n := r.Count(kind); n > 0 {
			fmt.Fprintf(w, "\n%s: %d\n", titles[kind], n)
			for _, c := range r.Changes {
				if c.Has(kind) {
					row(w, "  "+timesAsked(c.Count), asksFor(c), difference(kind, c), "last "+c.Last.Format(time.RFC3339))
				}
			}
		}
	}
	skip := func(n int, one, many, why string) {
		if n > 0 {
			fmt.Fprintf(w, "\nnot replayed: %s %s\n", count(uint64(n), one, many), why)
		}
	}
	skip(r.Skipped.Older, "record", "records", "without its question: written by an older version of the broker")
	skip(r.Skipped.NotAsked, "record", "records", "that policy wasn't asked about")
	skip(r.Skipped.NoAnswer, "record", "records", "that policy had no answer to, then")
	skip(r.Skipped.Unreadable, "line", "lines", "not of an audit")
}

func timesAsked(n int) string { return fmt.Sprintf("%d x", n) }

// asksFor is a question in one line.
func asksFor(c policy.Change) string {
	words := []string{c.Caller, string(c.Action)}
	if c.ParentAudience != "" {
		words = append(words, c.ParentAudience, "->")
	}
	words = append(words, c.Audience)
	words = append(words, c.Scopes...)
	if c.TTL > 0 {
		words = append(words, "for "+c.TTL.String())
	}
	if c.Binding != "" {
		words = append(words, "bound "+c.Binding)
	}
	words = append(words, c.Selectors...)
	if c.Verifier != nil {
		words = append(words, c.Verifier.Audiences...)
	}
	return strings.Join(slices.DeleteFunc(words, func(s string) bool { return s == "" }), " ")
}

func difference(kind policy.ChangeKind, c policy.Change) string {
	switch kind {
	case policy.NewlyDenied:
		return c.After.Reason + ": " + c.Message
	case policy.NewlyAllowed:
		return "was " + c.Before.Reason
	case policy.Shortened, policy.Lengthened:
		return c.Before.TTL.String() + " -> " + c.After.TTL.String()
	case policy.FewerScopes, policy.MoreScopes:
		return "[" + strings.Join(c.Before.Scopes, " ") + "] -> [" + strings.Join(c.After.Scopes, " ") + "]"
	}
	return c.Before.Binding + " -> " + c.After.Binding
}
