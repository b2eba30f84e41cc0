package token_test

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"testing"
	"testing/iotest"
	"time"

	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func TestGrantIDsSortByPresenterThenTime(t *testing.T) {
	a, b := spiffeid.RequireFromString("spiffe://example.org/a"), spiffeid.RequireFromString("spiffe://example.org/b")
	random := func(c byte) io.Reader { return bytes.NewReader(bytes.Repeat([]byte{c}, 7)) }
	var ids [][]byte
	for i, at := range []time.Duration{0, time.Millisecond, time.Second, time.Hour, 24 * 365 * time.Hour} {
		id, err := token.NewGrantID(a, issued.Add(at), random(byte(0xff-i))) // later is less random
		if err != nil {
			t.Fatal(err)
		}
		prefix := token.PresenterPrefix(a)
		if !bytes.HasPrefix(id.Bytes(), prefix[:]) {
			t.Errorf("%x doesn't begin with %x", id.Bytes(), prefix)
		}
		ids = append(ids, id.Bytes())
	}
	if !slices.IsSortedFunc(ids, bytes.Compare) {
		t.Errorf("not sorted by time: %x", ids)
	}
	if token.PresenterPrefix(a) == token.PresenterPrefix(b) {
		t.Error("two presenters, one prefix")
	}
	if _, err := token.NewGrantID(a, issued, iotest.ErrReader(io.ErrUnexpectedEOF)); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("without randomness: %v", err)
	}
	one, _ := token.NewGrantID(a, issued, random(1))
	one.Bytes()[0] ^= 0xff
	if prefix := token.PresenterPrefix(a); !bytes.HasPrefix(one.Bytes(), prefix[:]) {
		t.Error("Bytes let its caller change the ID")
	}
	if _, err := token.GrantIDFromBytes(make([]byte, 17)); err == nil {
		t.Error("17 bytes are a grant ID")
	}
}

func TestNextEra(t *testing.T) {
	now := token.Era(issued.Unix())
	for _, tc := range []struct{ previous, want token.Era }{
		{0, now}, {now - 1, now}, {now, now + 1}, {now + 100, now + 101}, // a clock set back still gives a greater era
	} {
		if got := token.NextEra(tc.previous, issued); got != tc.want {
			t.Errorf("NextEra(%s) = %s, want %s", tc.previous, got, tc.want)
		}
	}
}

func TestStricter(t *testing.T) {
	order := []token.Binding{token.BindingNone, token.BindingSPIFFE, token.BindingX5T}
	for i, a := range order {
		for j, b := range order {
			if got, want := a.Stricter(b), order[max(i, j)]; got != want {
				t.Errorf("%s and %s: %s, want %s", a, b, got, want)
			}
		}
	}
	if token.Binding("").Valid() || token.Binding("X5T").Valid() {
		t.Error("an unknown binding is valid")
	}
}

func TestNormalizeScopes(t *testing.T) {
	in := []string{"b", "a", "b"}
	got, err := token.NormalizeScopes(in)
	if err != nil || !slices.Equal(got, []string{"a", "b"}) || !slices.Equal(in, []string{"b", "a", "b"}) {
		t.Errorf("got %q from %q, %v", got, in, err)
	}
	for _, bad := range [][]string{{""}, {"a b"}, {"a\n"}, {`a"`}, {`a\`}, {"é"}, {string(make([]byte, 129))}, manyScopes(33)} {
		if got, err := token.NormalizeScopes(bad); err == nil {
			t.Errorf("%q: %q", bad, got)
		}
	}
}
