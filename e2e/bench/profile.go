package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/pprof"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
)

// profileDir is the daemons' environment variable (cmd/internal/profile).
const profileDir = "DAYFLY_PROFILE_DIR"

// kinds of profiles. Of a daemon they are those of the run alone, but for the heap, which is
// what is in use towards its end.
var kinds = []string{"cpu", "allocs", "block", "mutex", "heap"}

// beforeEnd is when the heap is looked at, which collects garbage first: without a
// collection the runtime wouldn't know what the run has allocated.
const beforeEnd = 500 * time.Millisecond

func profileCommand() *cobra.Command {
	var (
		o      options
		out    string
		length time.Duration
	)
	cmd := &cobra.Command{
		Use: "profile", Short: "Write profiles of broker, agent and load for each row", Args: cobra.NoArgs,
		Long: "profile runs our side of each row alone, with daemons that are built to show profiles, and writes\n" +
			"OUT/ROW/PROCESS.KIND.pprof: CPU, allocations, blocking, contended locks and the heap. The load is this process:\n" +
			"its profiles are those of the SDK, of verifying and of policy.",
		Example: "  bench profile --row '^issue/64'\n  go tool pprof -http : profiles/issue-64-callers/broker.cpu.pprof",
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, rows, err := o.rows()
			if err != nil {
				return err
			}
			if o.bin != "" {
				return usageError{errors.New("--bin: profiles are of commands built for them")}
			}
			l, clean, err := o.lab(cmd.Context(), s, "profile")
			if err != nil {
				return err
			}
			defer clean()
			l.profiling = true
			p := &profiler{lab: l, sockets: filepath.Join(l.dir, "profile"), out: out, length: length, stdout: cmd.OutOrStdout()}
			if err := os.MkdirAll(p.sockets, 0o700); err != nil {
				return err
			}
			if err := os.Setenv(profileDir, p.sockets); err != nil {
				return err
			}
			return p.all(cmd.Context(), rows)
		},
	}
	o.add(cmd)
	cmd.Flags().StringVar(&out, "out", "profiles", "folder for the profiles")
	cmd.Flags().DurationVar(&length, "time", 5*time.Second, "how long to run each row")
	return cmd
}

type profiler struct {
	lab          *lab
	sockets, out string
	length       time.Duration
	stdout       io.Writer
}

func (p *profiler) all(ctx context.Context, rows []row) error {
	runtime.SetBlockProfileRate(100_000)
	runtime.SetMutexProfileFraction(50)
	for _, r := range rows {
		p.lab.use(r.fixture)
		if err := p.one(ctx, r); err != nil {
			return fmt.Errorf("%s: %w", r.id(), err)
		}
	}
	return nil
}

var separators = regexp.MustCompile(`[^A-Za-z0-9]+`)

// one runs our side of a row for a while, and fetches the profiles of that time.
func (p *profiler) one(ctx context.Context, r row) error {
	pair, err := r.setup(ctx, p.lab)
	if err != nil {
		return fmt.Errorf("preparing: %w", err)
	}
	if _, err := pair.ours(ctx); err != nil { // once, to be warm
		return err
	}
	dir := filepath.Join(p.out, strings.Trim(separators.ReplaceAllString(r.id(), "-"), "-"))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	sockets, err := filepath.Glob(filepath.Join(p.sockets, "*.sock"))
	if err != nil {
		return err
	}
	started := time.Now()
	var group errgroup.Group
	for _, socket := range sockets {
		for _, kind := range kinds {
			group.Go(func() error { return p.fetch(ctx, socket, kind, dir) })
		}
	}
	stopOwn, err := ownProfile(dir)
	if err != nil {
		return err
	}
	for time.Since(started) < p.length && err == nil {
		_, err = pair.ours(ctx)
	}
	if err := errors.Join(err, stopOwn(), group.Wait()); err != nil {
		return err
	}
	return p.summary(ctx, r, dir)
}

// fetch writes one profile of a daemon; none of one that has ended.
func (p *profiler) fetch(ctx context.Context, socket, kind, dir string) error {
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}
	defer transport.CloseIdleConnections()
	seconds := max(1, int(p.length/time.Second))
	at := fmt.Sprintf("%s?seconds=%d", kind, seconds)
	switch kind {
	case "cpu":
		at = fmt.Sprintf("profile?seconds=%d", seconds)
	case "heap":
		at = "heap?gc=1"
		settle(ctx, time.Duration(seconds)*time.Second-beforeEnd)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://daemon/debug/pprof/"+at, nil)
	if err != nil {
		return err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return nil // it was killed: its socket is still there
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil // as above, meanwhile
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s profile: %s: %s", kind, resp.Status, raw)
	}
	name := strings.TrimSuffix(filepath.Base(socket), ".sock")
	return os.WriteFile(filepath.Join(dir, name+"."+kind+".pprof"), raw, 0o644)
}

// ownProfile profiles this process until the function it returns is called.
func ownProfile(dir string) (stop func() error, err error) {
	f, err := os.Create(filepath.Join(dir, "load.cpu.pprof"))
	if err != nil {
		return nil, err
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() error {
		pprof.StopCPUProfile()
		errs := []error{f.Close()}
		runtime.GC() // as beforeEnd says
		for _, kind := range kinds[1:] {
			var b bytes.Buffer
			errs = append(errs, pprof.Lookup(kind).WriteTo(&b, 0), os.WriteFile(filepath.Join(dir, "load."+kind+".pprof"), b.Bytes(), 0o644))
		}
		return errors.Join(errs...)
	}, nil
}

// topLines of each CPU profile are printed, of what a change could be about: not the
// runtime's and gRPC's own frames.
const (
	topLines = 25
	telling  = `dayfly/|opa/v1/(rego|topdown\.\(\*Query)|bbolt\.|ecdsa\.|crypto/tls\.\(\*Conn|encoding/json\.(M|U)|log/slog\.\(\*Logger|runtime\.(gcBgMarkWorker|mallocgc|futex)$|unix\.|syscall\.(Syscall|write|read|Fdatasync)$`
)

// summary prints where the CPU went.
func (p *profiler) summary(ctx context.Context, r row, dir string) error {
	profiles, err := filepath.Glob(filepath.Join(dir, "*.cpu.pprof"))
	if err != nil {
		return err
	}
	for _, path := range profiles {
		fmt.Fprintf(p.stdout, "\n%s, %s\n", r.id(), path)
		cmd := exec.CommandContext(ctx, "go", "tool", "pprof", "-top", "-cum", "-show="+telling, fmt.Sprintf("-nodecount=%d", topLines), path)
		cmd.Stdout, cmd.Stderr = p.stdout, io.Discard
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("go tool pprof: %w", err)
		}
	}
	return nil
}
