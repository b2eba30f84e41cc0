// Package sandbox is a whole dayfly on one machine, for "dayfly dev", "dayfly demo" and
// the end-to-end tests: a throwaway trust domain with a real Workload API, a broker and
// agents as processes of their own, and services, all talking over real sockets with
// real mTLS. It needs no root, uses no fixed port and leaves nothing behind.
package sandbox

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/dayflyhq/dayfly/policy"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// The identities of the demo's policy data.
var (
	TrustDomain = spiffeid.RequireTrustDomainFromString("dayfly.test")
	Broker      = identity("/dayfly/broker")
	Payments    = identity("/ns/shop/payments")
	Orders      = identity("/ns/shop/orders")
	Ledger      = identity("/ns/shop/ledger")
	Web         = identity("/ns/shop/web")
	Reports     = identity("/ns/other/reports")
	Host        = identity("/host") // without rights of its own
	Alice       = identity("/ops/alice")
	Bob         = identity("/ops/bob")
)

func identity(path string) spiffeid.ID { return spiffeid.RequireFromPath(TrustDomain, path) }

// Config says how to run the processes.
type Config struct {
	// Broker and Agent are the commands of the two daemons. Required.
	Broker, Agent []string
	// Dir is where everything is kept; empty: a temporary folder, removed at the end.
	Dir string
	// Store is the broker's store; empty: a file in Dir.
	Store string
	// Host is the address that the broker serves on; empty: loopback.
	Host string
	// BrokerConfig is more of the broker's configuration file: whole lines of YAML. Without
	// jwks_max_age it is 1s, so that external audiences soon get tokens.
	BrokerConfig string
	// Listen is more of its section "listen": whole lines, indented by two spaces.
	Listen string
}

// An Announcement is what a broker prints once it serves.
type Announcement struct {
	ID         string `json:"id"`
	GRPC       string `json:"grpc"`
	GRPCJWT    string `json:"grpc_jwt"`
	Public     string `json:"public"`
	HTTPSSVID  string `json:"https_svid"`
	HTTPS      string `json:"https"`
	Admin      string `json:"admin"`
	BreakGlass string `json:"break_glass"`
}

// A Sandbox is one such dayfly. Close ends it.
type Sandbox struct {
	Dir  string
	TD   *spiffetest.TrustDomain
	Info Announcement // of the broker, once it was started
	// Issuer is the iss of every token: a URL at which the broker answers, once started.
	Issuer string

	cfg     Config
	broker  *process
	agents  map[spiffeid.ID]*process
	sources map[spiffeid.ID]*workloadapi.X509Source
	closers []func()
	once    sync.Once
}

// New makes the trust domain, the policy folder, the store and the configuration. It
// starts no process.
func New(cfg Config) (_ *Sandbox, err error) {
	s := &Sandbox{cfg: cfg, Dir: cfg.Dir, agents: map[spiffeid.ID]*process{}, sources: map[spiffeid.ID]*workloadapi.X509Source{}}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if s.Dir == "" {
		if s.Dir, err = os.MkdirTemp("", "dayfly"); err != nil {
			return nil, fmt.Errorf("making a temporary folder: %w", err)
		}
		dir := s.Dir
		s.closers = append(s.closers, func() { os.RemoveAll(dir) })
	}
	if s.TD, err = spiffetest.New(spiffetest.Config{TrustDomain: TrustDomain, Dir: filepath.Join(s.Dir, "spiffe")}); err != nil {
		return nil, err
	}
	s.closers = append(s.closers, func() { s.TD.Close() })
	if err := policy.WriteDemo(s.PolicyDir()); err != nil {
		return nil, fmt.Errorf("writing the demo's policy: %w", err)
	}
	init := exec.Command(cfg.Broker[0], append(append([]string{}, cfg.Broker[1:]...), "init", s.StorePath())...)
	// Without a lifeline it would take the end of its input for ours.
	lifeline, err := init.StdinPipe()
	if err != nil {
		return nil, err
	}
	defer lifeline.Close()
	if out, err := init.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("making a store: %w: %s", err, out)
	}
	https, err := freePort()
	if err != nil {
		return nil, err
	}
	if err := s.makeWebCertificate(); err != nil {
		return nil, fmt.Errorf("making a web certificate: %w", err)
	}
	s.Issuer = "https://" + https
	return s, s.writeBrokerConfig(Announcement{
		GRPC: net.JoinHostPort(cmp.Or(cfg.Host, "127.0.0.1"), "0"), HTTPS: https, HTTPSSVID: "127.0.0.1:0", Public: "127.0.0.1:0", Admin: "127.0.0.1:0",
	})
}

// PolicyDir is the folder that the broker's policy is read from. As on a real host, the
// folder it is in has no store and no audit: the broker is told of every write there.
func (s *Sandbox) PolicyDir() string { return filepath.Join(s.Dir, "config", "policy") }

// StorePath is the broker's store.
func (s *Sandbox) StorePath() string { return cmp.Or(s.cfg.Store, filepath.Join(s.Dir, "dayfly.db")) }

// AuditPath is the broker's audit file.
func (s *Sandbox) AuditPath() string { return filepath.Join(s.Dir, "audit.log") }

func (s *Sandbox) brokerConfig() string { return filepath.Join(s.Dir, "broker.yaml") }

func (s *Sandbox) writeBrokerConfig(at Announcement) error {
	socket, err := s.TD.Workload(Broker)
	if err != nil {
		return err
	}
	cert, key := s.webCertificate()
	more := s.cfg.BrokerConfig
	if !strings.Contains(more, "jwks_max_age:") {
		more += "jwks_max_age: 1s\n"
	}
	yaml := fmt.Sprintf(`issuer: %s
store: %q
policy: %q
audit: %q
workload_api: %q
listen:
  grpc: %s
  public: %s
  https_svid: %s
  https: %s
  https_certificate: %q
  https_key: %q
  admin: %s
  break_glass: %q
%sshutdown_grace: 5s
%s`, s.Issuer, s.StorePath(), s.PolicyDir(), s.AuditPath(), socket, at.GRPC, at.Public, at.HTTPSSVID, at.HTTPS, cert, key, at.Admin, filepath.Join(s.Dir, "break-glass.sock"), s.cfg.Listen, more)
	return os.WriteFile(s.brokerConfig(), []byte(yaml), 0o600)
}

// Log returns the end of what a process wrote to standard error: "broker", or "agent-"
// and the last segment of its identity.
func (s *Sandbox) Log(name string) string { return tail(filepath.Join(s.Dir, name+".log")) }

// StartBroker starts the broker's process, with more flags of "serve" if need be, and
// returns once it serves. After the first start it keeps its addresses.
func (s *Sandbox) StartBroker(ctx context.Context, flags ...string) error {
	if err := s.SpawnBroker(flags...); err != nil {
		return err
	}
	return s.AwaitBroker(ctx)
}

// SpawnBroker starts the broker's process and doesn't wait until it serves.
func (s *Sandbox) SpawnBroker(flags ...string) (err error) {
	s.broker, err = s.spawn("broker", s.cfg.Broker, append([]string{"serve", "--config", s.brokerConfig(), "--announce"}, flags...)...)
	return err
}

// AwaitBroker returns once a broker that was spawned serves.
func (s *Sandbox) AwaitBroker(ctx context.Context) error {
	line, err := s.broker.announced(ctx)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(line, &s.Info); err != nil {
		return fmt.Errorf("reading the broker's announcement: %w", err)
	}
	return s.writeBrokerConfig(s.Info)
}

// AwaitSpread returns once external audiences get tokens: when the signing key is in
// every copy of the JWK set that may be in use.
func (s *Sandbox) AwaitSpread(ctx context.Context) error {
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.Info.Admin+"/readyz", nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || !bytes.Contains(body, []byte("KEY_NOT_SPREAD_YET")) {
			return err
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// TakeOver starts a process that takes over from the broker's, and returns once it serves
// and the other has ended: with the exit error of that one.
func (s *Sandbox) TakeOver(ctx context.Context) (err error) {
	old := s.broker
	s.closers = append(s.closers, old.kill)
	if s.broker, err = s.spawn("broker", s.cfg.Broker, "serve", "--config", s.brokerConfig(), "--announce", "--take-over"); err != nil {
		return err
	}
	if err := s.AwaitBroker(ctx); err != nil {
		return err
	}
	select {
	case <-old.done:
		return old.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// SetBrokerConfig is Config.BrokerConfig for the next start.
func (s *Sandbox) SetBrokerConfig(more string) error {
	s.cfg.BrokerConfig = more
	return s.writeBrokerConfig(s.Info)
}

// BrokerEnded is closed when the broker's process has ended, however it did.
func (s *Sandbox) BrokerEnded() <-chan struct{} { return s.broker.done }

// BrokerPID is the broker's process.
func (s *Sandbox) BrokerPID() int { return s.broker.cmd.Process.Pid }

// KillBroker ends the broker with SIGKILL.
func (s *Sandbox) KillBroker() { s.broker.kill() }

// StopBroker ends the broker with SIGTERM and returns its exit error.
func (s *Sandbox) StopBroker() error { return s.broker.stop() }

// Source returns the identity's own SVID source, from its Workload API socket.
func (s *Sandbox) Source(ctx context.Context, id spiffeid.ID) (*workloadapi.X509Source, error) {
	if src, ok := s.sources[id]; ok {
		return src, nil
	}
	addr, err := s.TD.Workload(id)
	if err != nil {
		return nil, err
	}
	src, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(addr)))
	if err != nil {
		return nil, fmt.Errorf("getting an SVID for %s: %w", id, err)
	}
	s.sources[id] = src
	s.closers = append(s.closers, func() { src.Close() })
	return src, nil
}

// Client returns a client of the broker with an identity, at an address: the broker's
// own, or that of a link to it.
func (s *Sandbox) Client(ctx context.Context, id spiffeid.ID, address string) (*sdk.Client, error) {
	src, err := s.Source(ctx, id)
	if err != nil {
		return nil, err
	}
	c, err := sdk.New(sdk.Config{Address: address, Source: src, BrokerID: Broker})
	if err != nil {
		return nil, err
	}
	s.closers = append(s.closers, func() { c.Close() })
	return c, nil
}

// AgentPID is the process of the agent of an identity.
func (s *Sandbox) AgentPID(id spiffeid.ID) int { return s.agents[id].cmd.Process.Pid }

// AgentHTTP returns the path of the socket on which the agent of an identity speaks HTTP.
func (s *Sandbox) AgentHTTP(id spiffeid.ID) string {
	return filepath.Join(s.Dir, filepath.Base(id.Path())+"-http.sock")
}

// StartAgent starts the agent of an identity and returns the address of its socket once
// it is ready to serve.
func (s *Sandbox) StartAgent(ctx context.Context, id spiffeid.ID, flags ...string) (string, error) {
	address, err := s.SpawnAgent(id, flags...)
	if err != nil {
		return "", err
	}
	return address, s.awaitAgent(ctx, address, s.agents[id])
}

// SpawnAgent is StartAgent without the waiting.
func (s *Sandbox) SpawnAgent(id spiffeid.ID, flags ...string) (string, error) {
	workloadAPI, err := s.TD.Workload(id)
	if err != nil {
		return "", err
	}
	name := filepath.Base(id.Path())
	socket := filepath.Join(s.Dir, name+".sock")
	s.agents[id], err = s.spawn("agent-"+name, s.cfg.Agent, append([]string{
		"--broker", s.Info.GRPC, "--broker-id", Broker.String(), "--workload-api", workloadAPI,
		"--grpc-socket", socket, "--http-socket", s.AgentHTTP(id),
		"--max-staleness", Staleness.String()}, flags...)...)
	return "unix://" + socket, err
}

// SpawnConfigured runs an agent by a configuration file, in the place of an identity's agent.
func (s *Sandbox) SpawnConfigured(id spiffeid.ID, file string) (err error) {
	s.agents[id], err = s.spawn("agent-"+filepath.Base(id.Path()), s.cfg.Agent, "--config", file)
	return err
}

// KillAgent ends the agent of an identity as kill -9 does.
func (s *Sandbox) KillAgent(id spiffeid.ID) { s.agents[id].kill() }

// StopAgent tells it to end, and waits.
func (s *Sandbox) StopAgent(id spiffeid.ID) error { return s.agents[id].stop() }

// StartRelay starts the agent of an identity with a listener for verifiers on other hosts
// that allow admits, and returns where that is and the agent's process ID. Its upstream
// is the broker, or the relay at an address with an identity of its own.
func (s *Sandbox) StartRelay(ctx context.Context, id spiffeid.ID, allow, upstream string, upstreamID spiffeid.ID) (string, int, error) {
	workloadAPI, err := s.TD.Workload(id)
	if err != nil {
		return "", 0, err
	}
	name := filepath.Base(id.Path())
	socket, file := filepath.Join(s.Dir, name+".sock"), filepath.Join(s.Dir, name+".yaml")
	above := ""
	if upstream != "" {
		above = fmt.Sprintf("  upstream: {address: %q, id: %q}\n", upstream, upstreamID)
	}
	text := fmt.Sprintf("broker: {address: %q, id: %q}\nworkload_api: %q\nsockets: {grpc: %q}\nfeed:\n  max_staleness: %s\n%s  relay: {listen: \"127.0.0.1:0\", allow: [%q]}\n",
		s.Info.GRPC, Broker, workloadAPI, socket, Staleness, above, allow)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return "", 0, err
	}
	p, err := s.spawn("agent-"+name, s.cfg.Agent, "--config", file)
	if err != nil {
		return "", 0, err
	}
	s.agents[id] = p
	if err := s.awaitAgent(ctx, "unix://"+socket, p); err != nil {
		return "", 0, err
	}
	m := relayAddress.FindSubmatch([]byte(tail(p.log)))
	if m == nil {
		return "", 0, fmt.Errorf("the %s doesn't say where it relays: %s", p.name, tail(p.log))
	}
	return string(m[1]), p.cmd.Process.Pid, nil
}

var relayAddress = regexp.MustCompile(`"msg":"serving".*"relay":"([^"]+)"`)

// awaitAgent waits until an agent says that it serves.
func (s *Sandbox) awaitAgent(ctx context.Context, address string, p *process) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-p.done:
			cancel()
		case <-ctx.Done():
		}
	}()
	quick := backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.2, MaxDelay: 200 * time.Millisecond}
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithConnectParams(grpc.ConnectParams{Backoff: quick}))
	if err != nil {
		return err
	}
	defer conn.Close()
	watch, err := healthpb.NewHealthClient(conn).Watch(ctx, &healthpb.HealthCheckRequest{}, grpc.WaitForReady(true))
	if err != nil {
		return fmt.Errorf("waiting for the %s: %w: %s", p.name, err, tail(p.log))
	}
	for {
		m, err := watch.Recv()
		if err != nil {
			return fmt.Errorf("waiting for the %s: %w: %s", p.name, err, tail(p.log))
		}
		if m.GetStatus() == healthpb.HealthCheckResponse_SERVING {
			return nil
		}
	}
}

// Close ends everything and removes what was made.
func (s *Sandbox) Close() {
	s.once.Do(func() {
		for _, p := range s.agents {
			p.kill()
		}
		s.broker.kill()
		for i := len(s.closers) - 1; i >= 0; i-- {
			s.closers[i]()
		}
	})
}

// process is a child that dies with us: its standard input is a pipe that only we
// hold, and it ends when that closes, however we end.
type process struct {
	name, log string
	cmd       *exec.Cmd
	lifeline  io.Closer
	lines     chan []byte // the first line of its output
	done      chan struct{}
	err       error
}

// spawn starts a process.
func (s *Sandbox) spawn(name string, command []string, args ...string) (*process, error) {
	p := &process{name: name, log: filepath.Join(s.Dir, name+".log"), lines: make(chan []byte, 1), done: make(chan struct{})}
	logFile, err := os.OpenFile(p.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer logFile.Close() // the child has its own copy
	p.cmd = exec.Command(command[0], append(append([]string{}, command[1:]...), args...)...)
	p.cmd.Stderr = logFile
	stdin, err := p.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	p.lifeline = stdin
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting the %s: %w", name, err)
	}
	go func() {
		defer close(p.done)
		out := bufio.NewReader(stdout)
		if line, err := out.ReadBytes('\n'); err == nil {
			p.lines <- line
		}
		io.Copy(io.Discard, out)
		p.err = p.cmd.Wait()
	}()
	return p, nil
}

// announced waits for the first line of output.
func (p *process) announced(ctx context.Context) ([]byte, error) {
	select {
	case line := <-p.lines:
		return line, nil
	case <-p.done:
		return nil, fmt.Errorf("the %s ended instead of serving (%v): %s", p.name, p.err, tail(p.log))
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for the %s: %w: %s", p.name, ctx.Err(), tail(p.log))
	}
}

// tail returns the end of a log, for an error.
func tail(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-2000):])
}

func (p *process) kill() {
	if p == nil {
		return
	}
	p.cmd.Process.Kill()
	<-p.done
	p.lifeline.Close()
}

func (p *process) stop() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-p.done
	p.lifeline.Close()
	return p.err
}

// Lifeline returns a context that ends when standard input does: with the process that
// started this one.
func Lifeline(ctx context.Context, stdin io.Reader) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		io.Copy(io.Discard, stdin)
		cancel()
	}()
	return ctx, cancel
}
