//go:build linux

package soak_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"
)

// The agents, by what they are for.
const (
	unitSockets   = "sockets"   // gRPC and HTTP; never restarted, so that its memory can be looked at
	unitRestarted = "restarted" // the same, restarted and killed
	unitFiles     = "files"     // files, a template and a folder
	unitAWS       = "aws"       // AWS's container endpoint
	unitRelay     = "relay"     // verifiers beside it and on another host
	unitJumps     = "jumps"     // in this process, with a clock that jumps
)

var everyUnit = []string{unitSockets, unitRestarted, unitFiles, unitAWS, unitRelay, unitJumps}

// A unit is one agent, its identity and its way to the broker.
type unit struct {
	name  string
	id    spiffeid.ID
	path  *path
	reach reach
	down  downtime
	clock *clock // nil: that of the machine
	http  string // its socket for HTTP
	grpc  string // and for gRPC, "" for none

	unserved atomic.Int64 // requests without an answer, so far

	mu      sync.Mutex
	cmd     *exec.Cmd // nil for the one in this process
	done    chan struct{}
	config  string
	log     string
	noAPI   bool      // its Workload API is away
	waiting bool      // it was started meanwhile, and has no SVID
	rotated time.Time // when it last got, or may have got, another SVID
}

func identity(name string) spiffeid.ID {
	return spiffeid.RequireFromPath(sandbox.TrustDomain, "/ns/soak/"+name)
}

// patience ends what must happen by itself and doesn't. No promise is about it.
const patience = time.Minute

// start starts the process and returns once it serves.
func (u *unit) start(ctx context.Context) error {
	log, err := os.OpenFile(u.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	line := append(command("dayfly-agent"), "--config", u.config)
	cmd, done := exec.Command(line[0], line[1:]...), make(chan struct{})
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() {
		_ = cmd.Wait()
		close(done)
	}()
	u.mu.Lock()
	u.cmd, u.done = cmd, done
	u.mu.Unlock()
	return u.serves(ctx)
}

// serves waits until it answers.
func (u *unit) serves(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	client := overUnix(u.http, true)
	for {
		resp, err := get(ctx, client, "http://agent/healthz", "")
		if err == nil && resp.status == http.StatusOK {
			return nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-u.ended():
			return fmt.Errorf("agent %s ended: %s", u.name, u.tail())
		case <-ctx.Done():
			return fmt.Errorf("agent %s doesn't serve: %v: %s", u.name, err, u.tail())
		}
	}
}

func (u *unit) ended() <-chan struct{} {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.done
}

func (u *unit) pid() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.cmd == nil {
		return 0
	}
	return u.cmd.Process.Pid
}

// signal sends one to the process and says if it isn't there.
func (u *unit) signal(s unix.Signal) error {
	if err := unix.Kill(u.pid(), s); err != nil {
		return fmt.Errorf("agent %s: %v: %w: %s", u.name, s, err, u.tail())
	}
	return nil
}

// stop ends the process, with SIGTERM or SIGKILL.
func (u *unit) stop(s unix.Signal) error {
	if err := u.signal(s); err != nil {
		return err
	}
	select {
	case <-u.ended():
		if code := u.cmd.ProcessState.ExitCode(); s == unix.SIGTERM && code != 0 {
			return fmt.Errorf("agent %s ended with %d: %s", u.name, code, u.tail())
		}
		return nil
	case <-time.After(patience):
		return fmt.Errorf("agent %s doesn't end at %v: %s", u.name, s, u.tail())
	}
}

// tail is the end of its log.
func (u *unit) tail() string {
	b, _ := os.ReadFile(u.log)
	return string(b[max(0, len(b)-2000):])
}

// restarted is for whoever starts it: what a process has in memory is gone, and it can't
// get an SVID while its Workload API is away.
func (u *unit) restarted() {
	u.down.end(false)
	u.reach.end()
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.noAPI && !u.waiting {
		u.waiting = true
		u.reach.begin()
	}
}

// askAgain is the longest pause of an agent that asks its Workload API for its first SVID.
const askAgain = 3 * time.Second

// apiBack is for whoever brings its Workload API back.
func (u *unit) apiBack() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.noAPI, u.rotated = false, time.Now()
	if u.waiting {
		u.waiting = false
		u.reach.endAfter(askAgain)
	}
}

// An answer is one of HTTP.
type answer struct {
	status int
	body   []byte
}

func (a *answer) Error() string { return fmt.Sprintf("%d: %.300s", a.status, bytes.TrimSpace(a.body)) }

// overUnix returns a client of a socket; fresh: each request has a connection of its own.
func overUnix(path string, fresh bool) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: fresh,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		},
	}}
}

func get(ctx context.Context, client *http.Client, url, authorization string) (*answer, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	if authorization != "" {
		req.Header.Set("Authorization", authorization)
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return &answer{resp.StatusCode, body}, err
}

// freePort is one on loopback that nobody listens on.
func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// writeConfig writes the file of an agent.
func (u *unit) writeConfig(dir, workloadAPI, bound, more string) error {
	u.config, u.log = filepath.Join(dir, u.name+".yaml"), filepath.Join(dir, "agent-"+u.name+".log")
	grpc := ""
	if u.grpc != "" {
		grpc = fmt.Sprintf("grpc: %q, ", u.grpc)
	}
	text := fmt.Sprintf("broker: {address: %q, id: %q}\nworkload_api: %q\nsockets: {%shttp: %q}\n%s", u.path.addr(), sandbox.Broker, workloadAPI, grpc, u.http, more)
	if u.name != unitRelay {
		text += "feed: {max_staleness: " + bound + "}\n"
	}
	return os.WriteFile(u.config, []byte(text), 0o600)
}
