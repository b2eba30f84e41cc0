package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// A lab holds what rows share.
type lab struct {
	size size
	dir  string // of everything that is made, on the disk that is measured
	bin  string // of the commands
	exe  string // this binary, for floors
	// profiling: only our side runs, and its processes must live on.
	profiling bool

	fixture string
	made    map[string]any
	closers []func()
}

// use ends what rows of another fixture shared.
func (l *lab) use(fixture string) {
	if fixture != l.fixture {
		l.end()
		l.fixture = fixture
	}
}

func (l *lab) end() {
	for i := len(l.closers) - 1; i >= 0; i-- {
		l.closers[i]()
	}
	l.made, l.closers = map[string]any{}, nil
}

func (l *lab) onEnd(f func()) { l.closers = append(l.closers, f) }

// shared makes something once for the rows of a fixture.
func shared[T any](l *lab, key string, make func() (T, error)) (T, error) {
	if made, ok := l.made[key]; ok {
		return made.(T), nil
	}
	t, err := make()
	if err != nil {
		var none T
		return none, err
	}
	l.made[key] = t
	return t, nil
}

// The identities of the bench: what w0 is issued is for w1, who exchanges it for w2, and
// so on, up to the full depth.
var (
	gateway  = benchID("gateway")
	verifier = benchID("v/0")
	floorID  = benchID("floor")
)

const everybody = "spiffe://dayfly.test/bench/"

func benchID(name string) spiffeid.ID {
	return spiffeid.RequireFromPath(sandbox.TrustDomain, "/bench/"+name)
}

func hop(n int) spiffeid.ID { return benchID(fmt.Sprintf("w%d", n)) }

// audience is whom a token of a depth is for.
func audience(depth int) string { return fmt.Sprintf("h%d", depth) }

// benchPolicy is data beside the demo's: the default rules, and no limit in the way.
func benchPolicy() string {
	var b strings.Builder
	b.WriteString("audiences:\n")
	for d := 1; d <= 6; d++ {
		fmt.Fprintf(&b, "  %s: {owner: bench, identities: [%s]}\n", audience(d), hop(d))
	}
	const terms = "{scopes: [a.read, a.write], ttl: 1h}"
	fmt.Fprintf(&b, "entitlements:\n  %s: {%s: %s}\n  %s: {%s: %s}\nexchange:\n", hop(0), audience(1), terms, everybody+"jwt/*", audience(1), terms)
	for d := 1; d < 6; d++ {
		fmt.Fprintf(&b, "  %s: {%s: {%s: %s}}\n", hop(d), audience(d), audience(d+1), terms)
	}
	fmt.Fprintf(&b, "verifiers:\n  %s: {follow: [\"*\"], relay: true}\nintrospectors:\n  %s: [\"*\"]\n", everybody+"*", gateway)
	fmt.Fprintf(&b, "limits:\n  %s: {issue_per_second: 1000000000, live_grants: 1000000000}\n", everybody+"*")
	return b.String()
}

// A box is a dayfly of its own.
type box struct {
	*sandbox.Sandbox
	lab *lab
}

// box makes a dayfly and doesn't start its broker.
func (l *lab) box(key string) (*box, error) {
	return shared(l, "box "+key, func() (*box, error) {
		s, err := sandbox.New(sandbox.Config{
			Broker: []string{filepath.Join(l.bin, "dayfly-broker")}, Agent: []string{filepath.Join(l.bin, "dayfly-agent")},
			Dir: l.newDir(key), Listen: "  grpc_jwt: 127.0.0.1:0\n", BrokerConfig: "grpc_jwt_trust_domains: [" + sandbox.TrustDomain.Name() + "]\n",
		})
		if err != nil {
			return nil, err
		}
		l.onEnd(s.Close)
		return &box{s, l}, os.WriteFile(filepath.Join(s.PolicyDir(), "bench.yaml"), []byte(benchPolicy()), 0o600)
	})
}

// started is box, with its broker.
func (l *lab) started(ctx context.Context, key string) (*box, error) {
	b, err := l.box(key)
	if err != nil {
		return nil, err
	}
	if b.Info.GRPC == "" {
		if err := b.StartBroker(ctx); err != nil {
			return nil, fmt.Errorf("starting the broker: %w", err)
		}
	}
	return b, nil
}

// newDir is a folder that goes with the fixture.
func (l *lab) newDir(key string) string {
	dir := filepath.Join(l.dir, strings.ReplaceAll(key, " ", "-"))
	_ = os.MkdirAll(dir, 0o700) // whoever uses it finds out
	l.onEnd(func() { os.RemoveAll(dir) })
	return dir
}

// client is an SDK's.
func (b *box) client(id spiffeid.ID) (*sdk.Client, error) {
	return shared(b.lab, fmt.Sprintf("client %s of %s", id, b.Dir), func() (*sdk.Client, error) {
		c, err := sdk.New(sdk.Config{Address: b.Info.GRPC, Source: b.TD.Source(id), BrokerID: sandbox.Broker})
		if err == nil {
			b.lab.onEnd(func() { c.Close() })
		}
		return c, err
	})
}

// conns are bare connections with mTLS, for as many callers: 16 share one. Both sides of a
// row have as many, of the same kind.
func (b *box) conns(callers int, id spiffeid.ID, address string, server spiffeid.ID) ([]*grpc.ClientConn, error) {
	src := b.TD.Source(id)
	return b.lab.dial((callers+15)/16, address, credentials.NewTLS(tlsconfig.MTLSClientConfig(src, src, tlsconfig.AuthorizeID(server))))
}

func (l *lab) dial(n int, address string, creds credentials.TransportCredentials) ([]*grpc.ClientConn, error) {
	var out []*grpc.ClientConn
	for range n {
		c, err := grpc.NewClient(address, grpc.WithTransportCredentials(creds))
		if err != nil {
			return nil, err
		}
		l.onEnd(func() { c.Close() })
		out = append(out, c)
	}
	return out, nil
}

func (l *lab) dialUnix(callers int, path string) ([]*grpc.ClientConn, error) {
	return l.dial((callers+15)/16, "unix://"+path, insecure.NewCredentials())
}

// of is the connection of a caller.
func of(conns []*grpc.ClientConn, caller int) *grpc.ClientConn { return conns[caller%len(conns)] }

// A server is a process that serves a floor.
type server struct {
	lab  *lab
	args []string
	p    *child
	GRPC string
	Unix string
}

// floor starts one in a box's trust domain. Its tokens are about as long as was said.
func (b *box) floor(ctx context.Context, tokenBytes int, more ...string) (*server, error) {
	key := strings.Join(append([]string{"floor", fmt.Sprint(tokenBytes)}, more...), " ")
	return shared(b.lab, key+" of "+b.Dir, func() (*server, error) {
		socket, err := b.TD.Workload(floorID)
		if err != nil {
			return nil, err
		}
		dir := b.lab.newDir(key)
		s := &server{lab: b.lab, Unix: filepath.Join(dir, "floor.sock"), args: []string{
			"floor", "--workload-api", socket, "--unix", filepath.Join(dir, "floor.sock"),
			"--journal", filepath.Join(dir, "journal"), "--token-bytes", fmt.Sprint(tokenBytes),
		}}
		s.args = append(s.args, more...)
		if err := s.start(ctx); err != nil {
			return nil, err
		}
		b.lab.onEnd(func() { s.p.kill() })
		return s, nil
	})
}

// start also starts it again, at its address.
func (s *server) start(ctx context.Context) (err error) {
	args := s.args
	if s.GRPC != "" {
		args = append(args, "--listen", s.GRPC)
	}
	if s.p, err = startChild(s.lab.exe, args...); err != nil {
		return err
	}
	var at floorAnnouncement
	if err := s.p.announced(ctx, &at); err != nil {
		return err
	}
	s.GRPC = at.GRPC
	return nil
}

// A child is a process that ends when we do.
type child struct {
	cmd   *exec.Cmd
	stdin io.Closer
	out   *bufio.Reader
}

func startChild(exe string, args ...string) (*child, error) {
	c := &child{cmd: exec.Command(exe, args...)}
	c.cmd.Stderr = os.Stderr
	stdin, err := c.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	c.stdin, c.out = stdin, bufio.NewReader(stdout)
	return c, c.cmd.Start()
}

// announced reads the one line that it prints when it serves.
func (c *child) announced(ctx context.Context, into any) error {
	stop := context.AfterFunc(ctx, func() { c.cmd.Process.Kill() })
	defer stop()
	line, err := c.out.ReadBytes('\n')
	if err != nil {
		c.kill()
		return fmt.Errorf("%s ended instead of serving: %w", filepath.Base(c.cmd.Path), errors.Join(err, ctx.Err()))
	}
	return json.Unmarshal(line, into)
}

func (c *child) kill() {
	c.cmd.Process.Kill()
	c.cmd.Wait()
	c.stdin.Close()
}

func (c *child) pid() int { return c.cmd.Process.Pid }

// stopwatch is for what is measured once.
func stopwatch(at time.Time) sample {
	d := time.Since(at)
	return sample{value: d.Seconds(), p50: d, p99: d}
}
