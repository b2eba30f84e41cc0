package policy

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
)

// decisionRef is the rule that answers every question.
const decisionRef = "data.policy.decision"

// generation is one state of a policy source, compiled. It never changes.
type generation struct {
	number   uint64
	loadedAt time.Time
	revision string
	query    rego.PreparedEvalQuery
	data     *dataset
}

// capabilities are OPA's without what reaches the network, the environment, files
// or the engine itself. A policy that uses one of them doesn't compile.
func capabilities() *ast.Capabilities {
	denied := []string{
		"http.send",          // network
		"net.lookup_ip_addr", // network
		"opa.runtime",        // environment variables, configuration
		"rego.parse_module",  // reflection
		"trace",              // side channel into explanations
		"json.match_schema",  // resolves $ref from files and the network
		"json.verify_schema", // likewise
	}
	caps := ast.CapabilitiesForThisVersion()
	caps.Builtins = slices.DeleteFunc(caps.Builtins, func(b *ast.Builtin) bool {
		return slices.Contains(denied, b.Name)
	})
	caps.AllowNet = []string{} // empty: no host; nil would mean any
	return caps
}

// source is a folder that was parsed: its modules, its data and its problems.
type source struct {
	modules  map[string]*ast.Module
	data     *dataset
	problems Problems
}

// parse reads the modules, the tests among them only where asked for, and the
// data of a folder.
func parse(f *folder, tests bool) *source {
	s := &source{modules: map[string]*ast.Module{}}
	opts := ast.ParserOptions{RegoVersion: ast.RegoV1, Capabilities: capabilities(), ProcessAnnotation: true}
	var dataFiles []string
	rules := false
	for _, name := range f.names {
		// It has been truncated and not yet written, or was lost on a full disk.
		// Read as "nothing is allowed" it would take the place of what is.
		if len(f.files[name]) == 0 {
			s.problems.addf(name, 0, "the file is empty: remove it, or leave a comment in it")
			continue
		}
		switch {
		case isData(name):
			dataFiles = append(dataFiles, name)
			continue
		case isTest(name) && !tests:
			continue
		}
		rules = rules || !isTest(name)
		m, err := ast.ParseModuleWithOpts(name, string(f.files[name]), opts)
		if err != nil {
			s.problems.addRego(name, err)
		} else if m != nil {
			s.modules[name] = m
		}
	}
	if !rules {
		s.problems.addf("", 0, "the folder has no policy: it needs a .rego file with %s", decisionRef)
	}
	s.data = parseData(dataFiles, f.files, &s.problems)
	return s
}

// compile compiles the modules and adds to the problems. The compiler is nil
// where a module didn't parse: what it would say then is mostly about that.
func (s *source) compile(prints bool) *ast.Compiler {
	if len(s.modules) == 0 || slices.ContainsFunc(s.problems, func(p Problem) bool { return isRego(p.File) }) {
		return nil
	}
	c := ast.NewCompiler().
		WithCapabilities(capabilities()).
		WithStrict(true).
		WithEnablePrintStatements(prints).
		WithPathConflictsCheck(func(path []string) (bool, error) {
			return len(path) > 0 && path[0] == "dayfly", nil
		}).
		SetErrorLimit(0)
	c.Compile(s.modules)
	if c.Failed() {
		s.problems.addRego("", c.Errors)
		return nil
	}
	if len(c.GetRulesExact(ast.MustParseRef(decisionRef))) == 0 {
		s.problems.addf("", 0, "no file defines %s: package policy needs a rule named decision", decisionRef)
		return nil
	}
	return c
}

func (s *source) store() storage.Store {
	return inmem.NewFromASTObject(ast.NewObject(item("dayfly", ast.NewTerm(s.data.value))))
}

// build makes a generation out of a folder, or says everything that is wrong
// with it.
func build(ctx context.Context, f *folder, now time.Time) (*generation, error) {
	s := parse(f, false)
	c := s.compile(false)
	if err := s.problems.err(); err != nil {
		return nil, err
	}
	query, err := rego.New(
		rego.Query("x = "+decisionRef),
		rego.Compiler(c),
		rego.Store(s.store()),
		rego.Capabilities(capabilities()),
		rego.StrictBuiltinErrors(true),
		rego.GenerateJSON(func(t *ast.Term, _ *rego.EvalContext) (any, error) { return t.Value, nil }),
	).PrepareForEval(ctx)
	if err != nil {
		return nil, fmt.Errorf("preparing policy: %w", err)
	}
	return &generation{loadedAt: now, revision: f.revision, query: query, data: s.data}, nil
}
