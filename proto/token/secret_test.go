package token_test

import (
	"bytes"
	"encoding/gob"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/dayflyhq/dayfly/proto/token"
	jsonv2 "github.com/go-json-experiment/json"
)

const hidden = "eyJ-the-whole-token"

// TestSecretShowsNothing prints, logs and marshals a secret in every place that a
// caller may keep one, unexported fields included, where fmt calls no methods.
func TestSecretShowsNothing(t *testing.T) {
	s := token.NewSecret(hidden)
	type exported struct{ Token token.Secret }
	type unexported struct{ token token.Secret }
	type embedded struct{ token.Secret }
	values := map[string]any{
		"itself": s, "pointer": &s, "struct": exported{s}, "unexported": unexported{s},
		"pointer to unexported": &unexported{s}, "embedded": embedded{s},
		"map": map[string]token.Secret{"k": s}, "slice": []token.Secret{s}, "array": [1]token.Secret{s},
		"any": []any{s}, "map of unexported": map[string]unexported{"k": {s}}, "error": fmt.Errorf("sending %v", s),
		"joined": errors.Join(fmt.Errorf("%s", s), fmt.Errorf("%d", s)),
	}
	for name, v := range values {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "% x", "%d", "%t", "%c", "%U", "%e", "%p", "%w", "%z", "%30v", "%.3s"} {
			hides(t, name+" as "+verb, fmt.Sprintf(verb, v))
		}
		hides(t, name+" by Sprint", fmt.Sprint(v), fmt.Sprintln(v))
		var text, js bytes.Buffer
		slog.New(slog.NewTextHandler(&text, nil)).Info("msg", "v", v, slog.Group("g", "v", v))
		slog.New(slog.NewJSONHandler(&js, nil)).With("v", v).Info("msg", slog.Any("w", v))
		hides(t, name+" by slog", text.String(), js.String())
		for encoder, marshal := range map[string]func(any) ([]byte, error){
			"encoding/json": json.Marshal, "json v2": func(v any) ([]byte, error) { return jsonv2.Marshal(v) }, "encoding/xml": xml.Marshal, "gob": marshalGob,
		} {
			b, err := marshal(v)
			hides(t, name+" by "+encoder, string(b), fmt.Sprint(err))
		}
	}
	if s.Reveal() != hidden || s.IsZero() {
		t.Errorf("Reveal = %q, IsZero = %t", s.Reveal(), s.IsZero())
	}
	if got := fmt.Sprintf("%v %s %d %q", s, s, s, s); strings.Count(got, "[redacted token]") != 4 {
		t.Errorf("printed as %q, want it to say that it is redacted", got)
	}
	if b, err := json.Marshal(s); err != nil || string(b) != `"[redacted token]"` {
		t.Errorf("json.Marshal = %s, %v", b, err)
	}
}

func marshalGob(v any) ([]byte, error) {
	var b bytes.Buffer
	err := gob.NewEncoder(&b).Encode(v)
	return b.Bytes(), err
}

func hides(t *testing.T, name string, texts ...string) {
	t.Helper()
	for _, text := range texts {
		for _, form := range []string{hidden, "whole-token", fmt.Sprintf("%x", hidden), fmt.Sprintf("%X", hidden), fmt.Sprintf("% x", hidden), "101 121 74"} {
			if strings.Contains(text, form) {
				t.Errorf("%s shows the secret: %s", name, text)
			}
		}
	}
}

func TestSecretZero(t *testing.T) {
	for _, s := range []token.Secret{{}, token.NewSecret("")} {
		if !s.IsZero() || s.Reveal() != "" {
			t.Errorf("%#v: IsZero = %t, Reveal = %q", s, s.IsZero(), s.Reveal())
		}
	}
}
