package web

import (
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"strings"
	"unicode/utf8"
)

const formType = "application/x-www-form-urlencoded"

// form is the body of a request, read as RFC 6749 section 3.2 has it: a parameter
// without a value is one that wasn't sent, and nothing is there twice but what may be.
type form struct{ values url.Values }

// repeatable are the parameters that RFC 8707 and RFC 8693 let a client repeat.
var repeatable = map[string]bool{"resource": true, "audience": true}

// readForm reads a request's body. Parameters in the URL are refused: URLs are logged.
func readForm(r *http.Request) (form, error) {
	if r.URL.RawQuery != "" {
		return form{}, invalidRequest("parameters belong in the body, never in the URL: revoke what you sent there")
	}
	if t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || t != formType {
		return form{}, invalidRequest("the body must be " + formType)
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, maxBodyBytes+1))
	if err != nil || len(body) > maxBodyBytes {
		return form{}, invalidRequest("the body could not be read, or is larger than 64 KiB")
	}
	return parseForm(string(body))
}

func parseForm(body string) (form, error) {
	values, err := url.ParseQuery(body)
	if err != nil {
		return form{}, invalidRequest("the body is not well-formed " + formType) // the error quotes it
	}
	f := form{url.Values{}}
	for name, all := range values {
		for _, v := range all {
			if !utf8.ValidString(name) || !utf8.ValidString(v) {
				return form{}, invalidRequest("the body is not UTF-8")
			}
			if v != "" {
				f.values.Add(name, v)
			}
		}
		if len(f.values[name]) > 1 && !repeatable[name] {
			return form{}, invalidRequest(fmt.Sprintf("%s is there more than once", named(name)))
		}
	}
	return f, nil
}

// named is a parameter's name in a message: never one that may be somebody's secret.
func named(name string) string {
	if len(name) > 40 || strings.ContainsFunc(name, func(r rune) bool { return r != '_' && (r < 'a' || r > 'z') }) {
		return "a parameter"
	}
	return name
}

// get returns a parameter, "" if it wasn't sent.
func (f form) get(name string) string { return f.values.Get(name) }

// all returns a parameter that may be repeated.
func (f form) all(name string) []string { return f.values[name] }
