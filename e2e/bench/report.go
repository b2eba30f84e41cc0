package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

// A Report is figures and where they are from. Kept in a folder, newer figures replace
// older ones of the same row and case.
type Report struct {
	Machine Machine   `json:"machine"`
	Command string    `json:"command"`
	Figures []*Figure `json:"figures"`
}

// A Machine is what the figures were measured on. Nothing in it names the host.
type Machine struct {
	CPU        string  `json:"cpu"`
	Cores      int     `json:"cores"`
	MemoryGiB  float64 `json:"memory_gib"`
	FileSystem string  `json:"file_system"`
	Kernel     string  `json:"kernel"`
	Go         string  `json:"go"`
	// Load is how many processes wanted to run, on average, in the minute before.
	Load float64 `json:"load_before"`
}

func machine(dir string) Machine {
	m := Machine{CPU: "unknown", Cores: runtime.NumCPU(), Go: runtime.Version(), FileSystem: "unknown"}
	if raw, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(raw)) {
			if rest, ok := strings.CutPrefix(line, "model name"); ok {
				m.CPU = strings.Trim(rest, "\t: \n")
				break
			}
		}
	}
	var sys unix.Sysinfo_t
	if unix.Sysinfo(&sys) == nil {
		m.MemoryGiB = math.Round(float64(sys.Totalram)*float64(sys.Unit)/(1<<30)*10) / 10
		m.Load = math.Round(float64(sys.Loads[0])/65536*100) / 100
	}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		m.Kernel = unix.ByteSliceToString(uts.Sysname[:]) + " " + unix.ByteSliceToString(uts.Release[:])
	}
	var on unix.Statfs_t
	if unix.Statfs(dir, &on) == nil {
		m.FileSystem = map[int64]string{unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs", unix.TMPFS_MAGIC: "tmpfs: no disk", unix.OVERLAYFS_SUPER_MAGIC: "overlayfs"}[int64(on.Type)]
	}
	return m
}

func (r *Report) judged() (n int) {
	for _, f := range r.Figures {
		if f.Pass != nil {
			n++
		}
	}
	return n
}

func (r *Report) missed() (n int) {
	for _, f := range r.Figures {
		if f.Pass != nil && !*f.Pass {
			n++
		}
	}
	return n
}

// columns are those of the table, in both forms.
var columns = []string{"figure", "ours", "floor", "ratio (spread)", "target", "pass"}

func (f *Figure) cells() []string {
	cells := []string{f.Row + ": " + f.Case, f.Ours.text(f.Unit), f.Floor.text(f.Unit), "", "", ""}
	if f.Ratio != nil {
		cells[3] = fmt.Sprintf("%s (%s to %s)", ratio(f.Ratio.Median), ratio(f.Ratio.Min), ratio(f.Ratio.Max))
	}
	if f.Target != nil {
		cells[4] = "at most " + ratio(f.Target.Ratio)
		if f.Target.AtLeast {
			cells[4] = "at least " + ratio(f.Target.Ratio)
		}
	} else {
		cells[4] = "reported"
	}
	if f.Pass != nil {
		cells[5] = map[bool]string{true: "yes", false: "NO"}[*f.Pass]
	}
	return cells
}

func ratio(x float64) string {
	if x < 0.1 {
		return fmt.Sprintf("%.3f", x)
	}
	return fmt.Sprintf("%.2f", x)
}

// text is a reading with its unit, and what else was seen.
func (r *Reading) text(u unit) string {
	if r == nil {
		return ""
	}
	s := quantity(r.Median, u)
	switch {
	case r.Rate > 0 && u == perSecond:
		s += fmt.Sprintf(", p50 %s, p99 %s", quantity(r.P50, inSeconds), quantity(r.P99, inSeconds))
	case r.Rate > 0:
		s += fmt.Sprintf(", p99 %s, %s", quantity(r.P99, inSeconds), quantity(r.Rate, perSecond))
	case r.Allocs > 0:
		s += fmt.Sprintf(", p99 %s, %.0f allocations", quantity(r.P99, inSeconds), r.Allocs)
	}
	if r.Refused > 0 {
		s += fmt.Sprintf(", %.0f refused", r.Refused)
	}
	return s
}

func quantity(x float64, u unit) string {
	switch u {
	case perSecond:
		return groups(int(math.Round(x))) + "/s"
	case inSeconds:
		for _, of := range []struct {
			least float64
			name  string
		}{{1, "s"}, {1e-3, "ms"}, {1e-6, "µs"}} {
			if x >= of.least {
				return significant(x/of.least) + " " + of.name
			}
		}
		return significant(x*1e9) + " ns"
	case inBytes:
		for _, of := range []struct {
			least float64
			name  string
		}{{1 << 30, "GiB"}, {1 << 20, "MiB"}, {1 << 10, "KiB"}} {
			if x >= of.least {
				return significant(x/of.least) + " " + of.name
			}
		}
		return significant(x) + " B"
	}
	return significant(x) + " " + string(u)
}

// significant is three digits.
func significant(x float64) string {
	switch {
	case x >= 100:
		return fmt.Sprintf("%.0f", x)
	case x >= 10:
		return fmt.Sprintf("%.1f", x)
	}
	return fmt.Sprintf("%.2f", x)
}

func (r *Report) table(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, strings.Join(columns, "\t"))
	for _, f := range r.Figures {
		fmt.Fprintln(tw, strings.Join(f.cells(), "\t"))
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "\n%d figures; of %d targets %d are missed. %s\n", len(r.Figures), r.judged(), r.missed(), r.Machine)
	return err
}

func (m Machine) String() string {
	return fmt.Sprintf("%s, %d cores, %.0f GiB, %s, %s, %s, load before: %.2f.", m.CPU, m.Cores, m.MemoryGiB, m.FileSystem, m.Kernel, m.Go, m.Load)
}

// Files of a folder that keeps a report.
const (
	reportFile = "performance.json"
	pageFile   = "performance.md"
	// The page has the table between these.
	tableBegin = "<!-- table: written by bench, don't edit -->"
	tableEnd   = "<!-- end of table -->"
)

// save puts the figures into a folder's report, and writes its page and plots anew.
func (r *Report) save(dir string) error {
	kept := &Report{}
	raw, err := os.ReadFile(filepath.Join(dir, reportFile))
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	default:
		if err := json.Unmarshal(raw, kept); err != nil {
			return fmt.Errorf("reading %s: %w", reportFile, err)
		}
	}
	kept.merge(r)
	if raw, err = json.MarshalIndent(kept, "", " "); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, reportFile), append(raw, '\n'), 0o644); err != nil {
		return err
	}
	if err := kept.writePage(filepath.Join(dir, pageFile)); err != nil {
		return err
	}
	return kept.writePlots(dir)
}

// merge takes newer figures over.
func (r *Report) merge(newer *Report) {
	if len(newer.Figures) == 0 {
		return
	}
	r.Machine, r.Command = newer.Machine, newer.Command
	for _, f := range newer.Figures {
		i := slices.IndexFunc(r.Figures, func(old *Figure) bool { return old.id() == f.id() })
		if i < 0 {
			r.Figures = append(r.Figures, f)
		} else {
			r.Figures[i] = f
		}
	}
	// In the order of the table, and without rows that it no longer has.
	rows, ids := map[string]int{}, map[string]bool{}
	for _, name := range []string{"tiny", "normal", "large"} {
		s := sizes[name]
		s.name = name
		for _, row := range rowsOf(s) {
			ids[row.id()] = true
			if _, known := rows[row.row]; !known {
				rows[row.row] = len(rows)
			}
		}
	}
	r.Figures = slices.DeleteFunc(r.Figures, func(f *Figure) bool { return !ids[f.id()] })
	slices.SortStableFunc(r.Figures, func(a, b *Figure) int { return rows[a.Row] - rows[b.Row] })
}

// writePage replaces the table of a page.
func (r *Report) writePage(path string) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, rest, ok := bytes.Cut(raw, []byte(tableBegin))
	_, after, closed := bytes.Cut(rest, []byte(tableEnd))
	if !ok || !closed {
		return fmt.Errorf("%s has no place for the table: %q and %q", path, tableBegin, tableEnd)
	}
	var b bytes.Buffer
	b.Write(before)
	fmt.Fprintf(&b, "%s\n\nLast run: `%s`, %s. %s\n\n", tableBegin, r.Command, r.last().Format(time.DateOnly), r.Machine)
	fmt.Fprintf(&b, "| %s | measured |\n|%s\n", strings.Join(columns, " | "), strings.Repeat(" --- |", len(columns)+1))
	for _, f := range r.Figures {
		fmt.Fprintf(&b, "| %s | %s |\n", strings.Join(f.cells(), " | "), f.At.Format(time.DateOnly))
	}
	fmt.Fprintf(&b, "\n%s", tableEnd)
	b.Write(after)
	return os.WriteFile(path, b.Bytes(), 0o644)
}

func (r *Report) last() (t time.Time) {
	for _, f := range r.Figures {
		if f.At.After(t) {
			t = f.At
		}
	}
	return t
}
