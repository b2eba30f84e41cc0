package policy

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
)

// Problem is one thing wrong with a policy folder.
type Problem struct {
	// File is the name within the folder; empty for the folder as a whole.
	File string `json:"file,omitempty"`
	// Line counts from 1; 0 where the file as a whole is meant.
	Line    int    `json:"line,omitempty"`
	Message string `json:"message"`
}

// String is "file:line: message".
func (p Problem) String() string {
	switch {
	case p.File == "":
		return p.Message
	case p.Line == 0:
		return p.File + ": " + p.Message
	}
	return fmt.Sprintf("%s:%d: %s", p.File, p.Line, p.Message)
}

// Problems is everything wrong with a policy folder, in the order of its files
// and lines. [Load], [Check] and a failed reload return it; get at it with
// errors.As.
type Problems []Problem

// Error has one line a problem.
func (ps Problems) Error() string {
	lines := make([]string, len(ps))
	for i, p := range ps {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}

// err sorts ps and returns it, or nil where there is none.
func (ps Problems) err() error {
	if len(ps) == 0 {
		return nil
	}
	slices.SortStableFunc(ps, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line))
	})
	return slices.CompactFunc(ps, func(a, b Problem) bool { return a == b })
}

func (ps *Problems) addf(file string, line int, format string, args ...any) {
	*ps = append(*ps, Problem{File: file, Line: line, Message: fmt.Sprintf(format, args...)})
}

// addRego takes over what OPA's parser or compiler complains about.
func (ps *Problems) addRego(file string, err error) {
	var list ast.Errors
	if !errors.As(err, &list) {
		ps.addf(file, 0, "%v", err)
		return
	}
	for _, e := range list {
		p := Problem{File: file, Message: e.Message}
		if e.Location != nil {
			p.File, p.Line = cmp.Or(e.Location.File, file), e.Location.Row
		}
		if e.Details != nil {
			for _, l := range e.Details.Lines() {
				if l = strings.TrimSpace(l); l != "" && strings.Trim(l, "^") != "" {
					p.Message += ": " + l
				}
			}
		}
		*ps = append(*ps, p)
	}
}
