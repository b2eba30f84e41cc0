package agentd

import (
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/dayflyhq/dayfly/cmd/internal/config"
)

const example = "../../../deploy/agent.yaml"

// The example file loads, also with every comment of a key taken away, and names every
// key there is.
func TestExampleFile(t *testing.T) {
	content, err := os.ReadFile(example)
	if err != nil {
		t.Fatal(err)
	}
	cfg := defaults()
	if err := config.Load(example, &cfg); err != nil {
		t.Fatal(err)
	}
	if err := cfg.complete(); err != nil {
		t.Fatal(err)
	}
	all := regexp.MustCompile(`(?m)^( *)#([a-z_]+: )`).ReplaceAllString(string(content), "$1$2")
	all = strings.ReplaceAll(all, "group: payments", `group: "0"`) // a group of any host
	full := defaults()
	if err := config.Parse("example", []byte(all), &full); err != nil {
		t.Fatal(err)
	}
	// Several workloads exclude the keys of one: they are an example of their own.
	_, block, _ := strings.Cut(string(content), "\n# workloads:\n")
	several := regexp.MustCompile(`(?m)^# ?`).ReplaceAllString("# workloads:\n"+block, "")
	more := defaults()
	if err := config.Parse("example", []byte(several), &more); err != nil {
		t.Fatal(err)
	}
	for _, key := range unset(string(content), full, more) {
		t.Errorf("the example says nothing of %s", key)
	}
}

// unset lists the keys that are zero wherever their struct occurs, but for those that are
// rightly so.
func unset(content string, cfgs ...Config) []string {
	all := map[reflect.Type][]reflect.Value{}
	var collect func(reflect.Value)
	collect = func(v reflect.Value) {
		switch {
		case v.Kind() == reflect.Slice:
			for i := range v.Len() {
				collect(v.Index(i))
			}
		case v.Kind() == reflect.Struct && v.Type().PkgPath() == reflect.TypeFor[Config]().PkgPath():
			all[v.Type()] = append(all[v.Type()], v)
			for i := range v.NumField() {
				collect(v.Field(i))
			}
		}
	}
	for _, cfg := range cfgs {
		collect(reflect.ValueOf(cfg))
	}
	var out []string
	for kind, values := range all {
		for i := range kind.NumField() {
			key, _, _ := strings.Cut(kind.Field(i).Tag.Get("yaml"), ",")
			// info is zero; a template in a file excludes the one that the example has.
			named := key == "level" || key == "template_file" && strings.Contains(content, "template_file: ")
			if !named && !slices.ContainsFunc(values, func(v reflect.Value) bool { return !v.Field(i).IsZero() }) {
				out = append(out, kind.Name()+"."+key)
			}
		}
	}
	return out
}
