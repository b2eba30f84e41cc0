//go:build linux

package faults_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"golang.org/x/sys/unix"
)

// A process is one that is started again after it was killed.
type process struct {
	t    testing.TB
	name string
	line []string
	log  string

	cmd      *exec.Cmd
	lifeline io.Closer
	said     chan string // its first line, closed at its end
}

func newProcess(t testing.TB, dir, name string, line []string) *process {
	t.Helper()
	p := &process{t: t, name: name, line: line, log: filepath.Join(dir, name+".log")}
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			b, _ := os.ReadFile(p.log)
			t.Logf("%s:\n%s", name, b[max(0, len(b)-2000):])
		}
	})
	p.start()
	return p
}

func (p *process) start() {
	p.t.Helper()
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		p.t.Fatal(err)
	}
	defer log.Close()
	p.cmd = exec.Command(p.line[0], p.line[1:]...)
	p.cmd.Stderr = log
	if p.lifeline, err = p.cmd.StdinPipe(); err != nil {
		p.t.Fatal(err)
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	said := make(chan string, 1)
	p.said = said
	go func() {
		defer close(said)
		r := bufio.NewReader(stdout)
		if first, err := r.ReadString('\n'); err == nil {
			said <- first
		}
		io.Copy(io.Discard, r)
	}()
}

// speaks waits for the first line.
func (p *process) speaks(ctx context.Context) {
	p.t.Helper()
	select {
	case _, ok := <-p.said:
		if !ok {
			p.t.Fatalf("the %s ended", p.name)
		}
	case <-ctx.Done():
		p.t.Fatalf("the %s says nothing", p.name)
	}
}

func (p *process) kill() {
	if p.cmd == nil || p.cmd.Process == nil {
		return
	}
	p.cmd.Process.Kill()
	p.cmd.Wait()
	p.lifeline.Close()
	p.cmd = nil
}

func (p *process) pause()  { pause(p.t, p.cmd.Process.Pid) }
func (p *process) resume() { send(p.t, p.cmd.Process.Pid, unix.SIGCONT) }

// pause returns once the process, a child of ours, stands still.
func pause(t testing.TB, pid int) {
	t.Helper()
	send(t, pid, unix.SIGSTOP)
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_PID, pid, &info, unix.WSTOPPED|unix.WNOWAIT, nil); err != nil {
		t.Errorf("waiting for a pause: %v", err)
	}
}

func send(t testing.TB, pid int, s unix.Signal) {
	t.Helper()
	if err := unix.Kill(pid, s); err != nil {
		t.Errorf("sending %v: %v", s, err)
	}
}

// A verifierConfig is how a verifier's process is told what to do.
type verifierConfig struct {
	ID          spiffeid.ID
	Audience    string
	Feed        string // of the broker, or unix:// of a relay
	WorkloadAPI string
	Socket      string // to serve HTTPS on: it works when the host's link doesn't
	Bound       time.Duration
}

// serveVerifier is a verifier's process: a service whose answers are verdicts. It says
// one line once it serves.
func serveVerifier(args []string) error {
	var cfg verifierConfig
	if err := json.Unmarshal([]byte(args[0]), &cfg); err != nil {
		return err
	}
	ctx, cancel := sandbox.Lifeline(context.Background(), os.Stdin)
	defer cancel()
	src, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(cfg.WorkloadAPI)))
	if err != nil {
		return err
	}
	defer src.Close()
	client, err := sdk.New(sdk.Config{Address: cfg.Feed, Source: src, BrokerID: sandbox.Broker})
	if err != nil {
		return err
	}
	defer client.Close()
	v, err := verify.New(verify.Config{
		Conn: client.Conn(), Audiences: []string{cfg.Audience}, Bundles: src, MaxStaleness: cfg.Bound,
		Log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	})
	if err != nil {
		return err
	}
	os.Remove(cfg.Socket) // of one that was killed
	l, err := net.Listen("unix", cfg.Socket)
	if err != nil {
		return err
	}
	srv := &http.Server{
		Handler:           v.HTTP(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "{}") })),
		TLSConfig:         tlsconfig.MTLSServerConfig(src, src, tlsconfig.AuthorizeMemberOf(sandbox.TrustDomain)),
		ReadHeaderTimeout: time.Minute,
	}
	go v.Run(ctx)
	go func() {
		<-ctx.Done()
		srv.Close()
	}()
	fmt.Println("serving")
	if err := srv.ServeTLS(l, "", ""); ctx.Err() == nil {
		return err
	}
	return nil
}

// crowd is a process that holds many connections to an address, half of them in the
// midst of a handshake, and opens each again when it is ended. Its arguments: the address, and
// how many. It says one line once all are open.
func crowd(args []string) error {
	var n int
	if _, err := fmt.Sscan(args[1], &n); err != nil {
		return err
	}
	ctx, cancel := sandbox.Lifeline(context.Background(), os.Stdin)
	defer cancel()
	open := make(chan struct{}, n)
	for i := range n {
		go func() {
			for first := true; ctx.Err() == nil; first = false {
				conn, err := net.Dial("tcp", args[0])
				if err != nil {
					continue
				}
				if i%2 == 0 {
					conn.Write([]byte{0x16, 3, 1, 2, 0, 1}) // a record of 512 bytes, and the first of them
				}
				if first {
					open <- struct{}{}
				}
				io.Copy(io.Discard, conn)
				conn.Close()
			}
		}()
	}
	for range n {
		<-open
	}
	fmt.Println("all are open")
	<-ctx.Done()
	return nil
}

// rush makes handshakes without a certificate until ctx ends, and counts them.
func rush(ctx context.Context, addr string, made func()) {
	dialer := &tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}}
	for ctx.Err() == nil {
		conn, err := dialer.DialContext(ctx, "tcp", addr)
		if err == nil || strings.Contains(err.Error(), "remote error: tls") {
			made()
		}
		if err == nil {
			conn.Close()
		}
	}
}
