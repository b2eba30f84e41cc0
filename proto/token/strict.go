package token

import (
	"bytes"
	"errors"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// claimNames are the top-level claims that a token of ours has.
var claimNames = [...]string{
	"iss", "sub", "aud", "exp", "nbf", "iat", "jti", "client_id", "scope", "act", "cnf", "txn", "dfy",
}

// jsonError names the field where that is one of ours, and quotes nothing else.
func jsonError(err error) error {
	if errors.Is(err, jsontext.ErrDuplicateName) {
		return malformed("payload", "has a name twice")
	}
	var semantic *json.SemanticError
	if errors.As(err, &semantic) {
		first, _, _ := strings.Cut(strings.TrimPrefix(string(semantic.JSONPointer), "/"), "/")
		if slices.Contains(claimNames[:], first) {
			if errors.Is(err, json.ErrUnknownName) {
				return malformed(first, "has an unknown field")
			}
			return malformed(first, "has a value of the wrong type")
		}
	}
	return malformed("payload", "is not a JSON object")
}

// hasNull reports whether valid JSON has a null anywhere. To some readers a null is
// an absent claim, to others a present one.
func hasNull(b []byte) bool {
	if !bytes.Contains(b, []byte("null")) {
		return false
	}
	dec := jsontext.NewDecoder(bytes.NewReader(b))
	for {
		tok, err := dec.ReadToken()
		if err != nil {
			return false
		}
		if tok.Kind() == 'n' {
			return true
		}
	}
}

// checkOthers reads past the claims of others (RFC 9068 section 2.2), but not past
// one that differs from ours in case only: many readers of JSON take them for ours.
func checkOthers(others jsontext.Value) error {
	if others == nil {
		return nil
	}
	dec := jsontext.NewDecoder(bytes.NewReader(others))
	if _, err := dec.ReadToken(); err != nil {
		return malformed("payload", "is not a JSON object")
	}
	for dec.PeekKind() == '"' {
		name, err := dec.ReadToken()
		if err != nil {
			return malformed("payload", "is not a JSON object")
		}
		for _, ours := range claimNames {
			if strings.EqualFold(name.String(), ours) {
				return malformed(ours, "is spelt in another case")
			}
		}
		if err := dec.SkipValue(); err != nil {
			return malformed("payload", "is not a JSON object")
		}
	}
	return nil
}
