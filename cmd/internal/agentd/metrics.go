package agentd

import (
	"bytes"
	"io"
	"strings"
)

// workloadLabel tells the metrics of several workloads apart. Its value is the name, which
// may not hold what would have to be escaped.
const workloadLabel = "workload"

// writeMetrics writes those of all workloads: each family once, and where there are
// several workloads with a label that says whose a sample is.
func writeMetrics(w io.Writer, all []*workload, several bool) error {
	if !several {
		return all[0].agent.WriteMetrics(w)
	}
	var joined families
	for _, one := range all {
		var text bytes.Buffer
		if err := one.agent.WriteMetrics(&text); err != nil {
			return err
		}
		joined.add(text.String(), one.name)
	}
	_, err := io.WriteString(w, joined.String())
	return err
}

// families are metrics in Prometheus' text format, by family in the order of their coming.
type families struct {
	order []string
	head  map[string]string // # HELP and # TYPE
	lines map[string][]string
}

// add takes what one agent wrote: its HELP, TYPE and samples are together by family.
func (f *families) add(text, workload string) {
	if f.head == nil {
		f.head, f.lines = map[string]string{}, map[string][]string{}
	}
	family, fresh := "", false
	for line := range strings.Lines(text) {
		if rest, is := strings.CutPrefix(line, "# "); is {
			if _, rest, _ = strings.Cut(rest, " "); !strings.HasPrefix(rest, family+" ") || family == "" {
				family, _, _ = strings.Cut(rest, " ")
				if _, known := f.head[family]; !known {
					f.order = append(f.order, family)
					fresh = true
				} else {
					fresh = false
				}
			}
			if fresh {
				f.head[family] += line
			}
			continue
		}
		f.lines[family] = append(f.lines[family], labelled(line, workload))
	}
}

// labelled puts the label first.
func labelled(sample, workload string) string {
	label := workloadLabel + `="` + workload + `"`
	name := sample[:strings.IndexAny(sample+" ", "{ ")]
	rest := sample[len(name):]
	if inner, has := strings.CutPrefix(rest, "{"); has {
		if strings.HasPrefix(inner, "}") {
			return name + "{" + label + inner
		}
		return name + "{" + label + "," + inner
	}
	return name + "{" + label + "}" + rest
}

func (f *families) String() string {
	var out strings.Builder
	for _, name := range f.order {
		out.WriteString(f.head[name])
		for _, line := range f.lines[name] {
			out.WriteString(line)
		}
	}
	return out.String()
}
