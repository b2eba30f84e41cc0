package incoming

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

const (
	// maxPath is the longest path that is looked at, in bytes.
	maxPath = 8 << 10
	// maxDecodings is how often a path may be percent-encoded over and over.
	maxDecodings = 3
)

// readings returns the paths that programs may take raw for: first the one that it is, with
// its escapes decoded once; then those of who doesn't decode what needed no escape, who
// decodes again, and who takes parameters off. Its error says why a path is refused
// whatever the routes are: programs disagree about which folder it is in.
func readings(raw string) ([]string, error) {
	switch {
	case len(raw) > maxPath:
		return nil, fmt.Errorf("it has more than %d bytes", maxPath)
	case !strings.HasPrefix(raw, "/"):
		return nil, errors.New("it doesn't begin with a slash")
	}
	for _, c := range []byte(raw) {
		if c <= ' ' || c >= 0x7f || strings.IndexByte(`"#<>?\`, c) >= 0 {
			return nil, errors.New("it has a character that must be percent-encoded")
		}
	}
	out, err := decodings(raw)
	if err != nil {
		return nil, err
	}
	for _, p := range out {
		if err := checkSegments(p); err != nil {
			return nil, err
		}
		if b := bare(p); !slices.Contains(out, b) {
			out = append(out, b)
		}
	}
	return out, nil
}

func decodings(raw string) ([]string, error) {
	p, err := decode(raw, func(byte) bool { return true }, true)
	if err != nil {
		return nil, err
	}
	out := []string{p}
	half, err := decode(raw, func(c byte) bool { return !plain(c) }, true)
	if err != nil {
		return nil, err
	}
	if half != p {
		out = append(out, half)
	}
	for range maxDecodings {
		next, err := decode(p, func(byte) bool { return true }, false)
		if err != nil {
			return nil, err
		}
		if next == p {
			return out, nil
		}
		p = next
		out = append(out, p)
	}
	return nil, errors.New("it is percent-encoded many times over")
}

// plain reports whether a character may stand in a segment as it is (RFC 3986: pchar).
func plain(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("-._~!$&'()*+,;=:@", c) >= 0
}

// fold is a path for those to whom case is nothing.
func fold(p string) string { return strings.ToLower(strings.ToUpper(p)) }

// bare is a path without what some programs take off a segment: its parameters, and dots
// and spaces at its end.
func bare(p string) string {
	if !strings.ContainsAny(p, ";?#. ") {
		return p
	}
	segments := strings.Split(p, "/")
	for i, s := range segments {
		segments[i] = bareSegment(s)
	}
	return strings.Join(segments, "/")
}

func bareSegment(s string) string {
	if i := strings.IndexAny(s, ";?#"); i >= 0 {
		s = s[:i]
	}
	return strings.TrimRight(s, ". ")
}

// checkSegments refuses empty segments and those of dots, also where they are so only to
// a program that takes something off.
func checkSegments(p string) error {
	if !utf8.ValidString(p) {
		return errors.New("it is no UTF-8")
	}
	segments := strings.Split(p[1:], "/")
	for i, s := range segments {
		switch {
		case s == "" && i < len(segments)-1:
			return errors.New("it has an empty segment")
		case s != "" && bareSegment(s) == "":
			return errors.New("it has a segment of dots or of parameters alone")
		}
	}
	return nil
}

// decode takes one layer of percent-encoding off the characters that it is for. Strictly,
// an escape must be one; otherwise what is none stays, as a lenient decoder leaves it.
func decode(p string, these func(byte) bool, strict bool) (string, error) {
	if strings.IndexByte(p, '%') < 0 {
		return p, nil
	}
	var b strings.Builder
	for i := 0; i < len(p); i++ {
		if p[i] != '%' {
			b.WriteByte(p[i])
			continue
		}
		if i+2 >= len(p) || !isHex(p[i+1]) || !isHex(p[i+2]) {
			if strict {
				return "", errors.New("it has a broken escape")
			}
			b.WriteByte('%')
			continue
		}
		c := unhex(p[i+1])<<4 | unhex(p[i+2])
		if c == '/' || c == '\\' || c < ' ' || c == 0x7f {
			return "", errors.New("it has an encoded slash, backslash or control character")
		}
		if !these(c) {
			b.WriteByte('%')
			continue
		}
		b.WriteByte(c)
		i += 2
	}
	return b.String(), nil
}

func isHex(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F'
}

func unhex(c byte) byte {
	switch {
	case c <= '9':
		return c - '0'
	case c <= 'F':
		return c - 'A' + 10
	}
	return c - 'a' + 10
}
