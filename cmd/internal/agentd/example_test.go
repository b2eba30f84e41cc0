package agentd

import (
	"os"
	"reflect"
	"regexp"
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
	for _, key := range unset(reflect.ValueOf(full), "") {
		t.Errorf("the example says nothing of %s", key)
	}
}

// unset lists the keys that are zero, but for those that are rightly so.
func unset(v reflect.Value, path string) []string {
	var out []string
	for i := range v.NumField() {
		key := v.Type().Field(i).Tag.Get("yaml")
		key, _, _ = strings.Cut(key, ",")
		field, at := v.Field(i), strings.TrimPrefix(path+"."+key, ".")
		switch {
		case key == "level": // info is zero
		case field.Kind() == reflect.Struct && strings.HasPrefix(field.Type().PkgPath(), "github.com/dayflyhq/dayfly/cmd/internal/agentd"):
			out = append(out, unset(field, at)...)
		case field.Kind() == reflect.Slice && field.Len() > 0 && field.Index(0).Kind() == reflect.Struct:
			out = append(out, unset(field.Index(0), at+"[0]")...)
		case field.IsZero():
			out = append(out, at)
		}
	}
	return out
}
