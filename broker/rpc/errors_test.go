package rpc_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/rpc"
	"github.com/dayflyhq/dayfly/sdk"
	"google.golang.org/grpc/codes"
)

var update = flag.Bool("update", false, "write docs/errors.md anew")

// A reason is one row of docs/errors.md.
type reason struct{ name, code, when, what string }

var kinds = map[string]broker.Kind{
	"Invalid": broker.Invalid, "Unauthenticated": broker.Unauthenticated, "Denied": broker.Denied, "NotFound": broker.NotFound,
	"Conflict": broker.Conflict, "Exhausted": broker.Exhausted, "Unavailable": broker.Unavailable,
}

// files parses the Go files of a room, without its tests.
func files(t *testing.T, room string) map[string]*ast.File {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(room, "*.go"))
	if err != nil || len(paths) == 0 {
		t.Fatalf("no files in %s: %v", room, err)
	}
	out := map[string]*ast.File{}
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		out[path] = f
	}
	return out
}

// text is the value of a string literal.
func text(e ast.Expr) string {
	lit, ok := e.(*ast.BasicLit)
	if !ok || lit.Kind != token.STRING {
		return ""
	}
	s, _ := strconv.Unquote(lit.Value)
	return s
}

// brokerRefusals reads every Refusal that the core, the adapters and what they share declare.
func brokerRefusals(t *testing.T) []*broker.Refusal {
	t.Helper()
	var out []*broker.Refusal
	for _, room := range []string{"..", "../attest", "../web", "."} {
		for path, f := range files(t, room) {
			ast.Inspect(f, func(n ast.Node) bool {
				lit, ok := n.(*ast.CompositeLit)
				if !ok || len(lit.Elts) == 0 {
					return true
				}
				switch typ := lit.Type.(type) {
				case *ast.Ident:
					ok = typ.Name == "Refusal"
				case *ast.SelectorExpr:
					ok = typ.Sel.Name == "Refusal"
				default:
					ok = false
				}
				if !ok {
					return true
				}
				fields := map[string]ast.Expr{}
				for i, e := range lit.Elts {
					if kv, keyed := e.(*ast.KeyValueExpr); keyed {
						fields[kv.Key.(*ast.Ident).Name] = kv.Value
					} else {
						fields[[]string{"Kind", "Reason", "Message", "Hint", "Metadata"}[i]] = e
					}
				}
				kind, _ := fields["Kind"].(*ast.Ident)
				if sel, qualified := fields["Kind"].(*ast.SelectorExpr); qualified {
					kind = sel.Sel
				}
				r := &broker.Refusal{Reason: text(fields["Reason"]), Message: text(fields["Message"]), Hint: text(fields["Hint"])}
				if kind != nil {
					r.Kind = kinds[kind.Name]
				}
				if r.Kind == 0 || !regexp.MustCompile(`^[A-Z]+(_[A-Z]+)*$`).MatchString(r.Reason) || r.Message == "" || r.Hint == "" {
					t.Errorf("%s: a refusal without kind, reason, message or hint: %+v", path, r)
				}
				out = append(out, r)
				return true
			})
		}
	}
	return out
}

// Every refusal reaches the client of the SDK as what it was: the same reason, code,
// message, hint and metadata.
func TestRoundTrip(t *testing.T) {
	all := brokerRefusals(t)
	if len(all) < 30 {
		t.Fatalf("only %d refusals were found", len(all))
	}
	seen := map[string]bool{}
	for _, r := range all {
		if seen[r.Reason] {
			t.Errorf("%s is declared twice", r.Reason)
		}
		seen[r.Reason] = true
		r.Metadata = map[string]string{"field": "x"}
		for _, err := range []error{r, fmt.Errorf("doing: %w", r)} {
			status := rpc.ToStatus(context.Background(), slog.New(slog.DiscardHandler), "m", err)
			var got *sdk.Error
			if !errors.As(sdk.FromRPC(status), &got) {
				t.Fatalf("%s: got %v", r.Reason, status)
			}
			if got.Reason != r.Reason || got.Code != rpc.CodeOf[r.Kind] || got.Message != r.Message || got.Hint != r.Hint || len(got.Metadata) != 1 || got.Metadata["field"] != "x" {
				t.Errorf("sent %+v, got %+v", r, got)
			}
		}
		if rpc.CodeOf[r.Kind] == codes.OK {
			t.Errorf("%s has no code", r.Reason)
		}
	}
	for _, r := range []*broker.Refusal{broker.ErrInvalidRequest, broker.ErrTooManyStreams, rpc.ErrNoSVID} {
		if !seen[r.Reason] {
			t.Errorf("%s was not walked", r.Reason)
		}
	}
	for _, e := range []*sdk.Error{
		sdk.ErrInvalidRequest, sdk.ErrRequestTooLarge, sdk.ErrTokenTooLarge, sdk.ErrSVIDExpired, sdk.ErrPolicyDenied, sdk.ErrIdentityLocked, sdk.ErrSubjectMalformed,
		sdk.ErrSubjectExpired, sdk.ErrSubjectRevoked, sdk.ErrSubjectNotAddressed, sdk.ErrSubjectUnknown,
	} {
		i := slices.IndexFunc(all, func(r *broker.Refusal) bool { return r.Reason == e.Reason })
		if i < 0 || rpc.CodeOf[all[i].Kind] != e.Code {
			t.Errorf("the SDK's %s is none of the broker's", e.Reason)
		}
	}
	for kind, code := range rpc.CodeOf {
		for other, same := range rpc.CodeOf {
			if kind != other && code == same {
				t.Errorf("kinds %d and %d share %s", kind, other, code)
			}
		}
	}
}

// What isn't a refusal goes out as a fixed text and is logged whole.
func TestUnknownErrors(t *testing.T) {
	var log bytes.Buffer
	err := rpc.ToStatus(context.Background(), slog.New(slog.NewTextHandler(&log, nil)), "/dayfly.v1.X/Y", &fs.PathError{Op: "open", Path: "/secret", Err: fs.ErrNotExist})
	var got *sdk.Error
	if !errors.As(sdk.FromRPC(err), &got) || got.Code != codes.Internal || strings.Contains(got.Message, "secret") {
		t.Errorf("got %v", err)
	}
	if !strings.Contains(log.String(), "/secret") || !strings.Contains(log.String(), "/dayfly.v1.X/Y") {
		t.Errorf("log: %s", log.String())
	}
	for err, code := range map[error]codes.Code{
		context.Canceled: codes.Canceled, context.DeadlineExceeded: codes.DeadlineExceeded,
	} {
		if !errors.As(sdk.FromRPC(rpc.ToStatus(context.Background(), slog.New(slog.DiscardHandler), "m", fmt.Errorf("x: %w", err))), &got) || got.Code != code {
			t.Errorf("%v becomes %v", err, got)
		}
	}
}

// agentReasons reads what the agent refuses by itself.
func agentReasons(t *testing.T) []reason {
	t.Helper()
	byName := map[string]reason{}
	for _, f := range inOrder(files(t, "../../agent")) {
		ast.Inspect(f, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || len(call.Args) < 4 {
				return true
			}
			if fn, ok := call.Fun.(*ast.Ident); !ok || fn.Name != "refuse" {
				return true
			}
			code, ok := call.Args[0].(*ast.SelectorExpr)
			name := text(call.Args[1])
			if !ok || name == "" {
				return true
			}
			r := reason{name, code.Sel.Name, text(call.Args[2]), text(call.Args[3])}
			if old, ok := byName[name]; !ok || score(r) > score(old) || score(r) == score(old) && r.when < old.when {
				byName[name] = r
			}
			return true
		})
	}
	return sorted(byName)
}

// score prefers, of several texts for one reason, one that says what to do.
func score(r reason) int {
	n := 0
	if r.what != "" {
		n += 2
	}
	if r.when != "" {
		n++
	}
	return n
}

// verifierReasons reads the reasons of sdk/verify with their comments.
func verifierReasons(t *testing.T) []reason {
	t.Helper()
	byName := map[string]reason{}
	for _, f := range inOrder(files(t, "../../sdk/verify")) {
		ast.Inspect(f, func(n ast.Node) bool {
			v, ok := n.(*ast.ValueSpec)
			if !ok || len(v.Values) != 1 {
				return true
			}
			if typ, ok := v.Type.(*ast.Ident); !ok || typ.Name != "Reason" {
				return true
			}
			doc := strings.Join(strings.Fields(v.Doc.Text()+v.Comment.Text()), " ")
			_, doc, _ = strings.Cut(doc, ": ")
			name := text(v.Values[0])
			byName[name] = reason{name: name, when: strings.TrimSuffix(doc, ".")}
			return true
		})
	}
	return sorted(byName)
}

// inOrder returns the files by name: a reason that is given in two of them must come out
// the same in every run.
func inOrder(byPath map[string]*ast.File) []*ast.File {
	var out []*ast.File
	for _, path := range slices.Sorted(maps.Keys(byPath)) {
		out = append(out, byPath[path])
	}
	return out
}

func sorted(byName map[string]reason) []reason {
	var out []reason
	for _, r := range byName {
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b reason) int { return strings.Compare(a.name, b.name) })
	return out
}

// docs/errors.md lists every reason; go test ./broker/rpc -run TestErrorsPage -update
// writes it.
func TestErrorsPage(t *testing.T) {
	byName := map[string]reason{}
	for _, r := range brokerRefusals(t) {
		byName[r.Reason] = reason{r.Reason, rpc.CodeOf[r.Kind].String(), r.Message, r.Hint}
	}
	var page strings.Builder
	page.WriteString(`# Errors

Every refusal is a gRPC status code with a google.rpc.ErrorInfo: domain "dayfly", a stable reason, and metadata
whose entry "hint" says what to do. The agent's HTTP/JSON socket gives the same reasons. Messages may be more
precise than those below; programs compare reasons and nothing else.

A code of Unavailable, ResourceExhausted, Aborted or DeadlineExceeded is worth another try, with backoff; the
others stay until somebody changes something. What has no reason comes from the transport: no connection at all
(Unavailable) for who proves no identity, ResourceExhausted for a message above 256 KiB, which is refused before it is
read (above 64 KiB it is REQUEST_TOO_LARGE; the SDK gives that reason for any size), and Internal, with a fixed text and
a line in its log, for a fault of the broker. What becomes of each kind of bad input, and which test holds it:
[bad-input.md](bad-input.md).

This page is generated from the code; a test keeps it so.

## The broker

| reason | code | when | what to do |
| --- | --- | --- | --- |
`)
	rows(&page, sorted(byName))
	page.WriteString(`
Metadata: "field" names the field of an INVALID_REQUEST; "policy_reason" is the policy's own reason of a POLICY_DENIED;
"retry_after" is how long an ISSUE_RATE_LIMITED, a LIVE_GRANTS_LIMITED, a KEY_NOT_SPREAD_YET or a GIVE_BACK_... stands at least, as a Go
duration ("1.5s"), and "limit" is what policy says; "lock", "mode" and "cut" describe the lock of an IDENTITY_LOCKED; "max_ttl" is the longest life that would be granted;
"expires_at" and "confirmers" say until when a SECOND_PERSON_REQUIRED waits, and for whom.

## The agent

The agent passes the broker's refusals on as they are, and adds its own.

| reason | code | when | what to do |
| --- | --- | --- | --- |
`)
	rows(&page, agentReasons(t))
	page.WriteString(`
## A verifier

What sdk/verify refuses a presented token for. Its middleware answers with 401 or Unauthenticated; a missing scope is
403 or PermissionDenied; an invalid request is 400 or InvalidArgument; a verifier that is itself closed says 503 or Unavailable.

| reason | when |
| --- | --- |
`)
	for _, r := range verifierReasons(t) {
		fmt.Fprintf(&page, "| %s | %s |\n", r.name, cell(r.when))
	}
	const path = "../../docs/errors.md"
	if *update {
		if err := os.WriteFile(path, []byte(page.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != page.String() {
		t.Error("docs/errors.md is not what the code says; write it anew with: go test ./broker/rpc -run TestErrorsPage -update")
	}
}

func rows(page *strings.Builder, all []reason) {
	for _, r := range all {
		fmt.Fprintf(page, "| %s | %s | %s | %s |\n", r.name, r.code, cell(r.when), cell(r.what))
	}
}

func cell(s string) string {
	if s == "" {
		return "see the message"
	}
	return strings.ReplaceAll(s, "|", "\\|")
}
