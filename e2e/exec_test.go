package e2e_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"golang.org/x/sys/unix"
)

// A supervised is one exec and its program.
type supervised struct {
	t    *testing.T
	cmd  *exec.Cmd
	done chan struct{}

	mu      sync.Mutex
	out     bytes.Buffer
	changed chan struct{}
}

func (s *supervised) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.out.Write(p)
	close(s.changed)
	s.changed = make(chan struct{})
	return len(p), nil
}

func (s *supervised) said() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.out.String()
}

// await returns what matches as soon as it was said, on either stream.
func (s *supervised) await(pattern string) []string {
	s.t.Helper()
	re := regexp.MustCompile(pattern)
	deadline := time.After(time.Minute)
	for {
		s.mu.Lock()
		m, changed := re.FindStringSubmatch(s.out.String()), s.changed
		s.mu.Unlock()
		if m != nil {
			return m
		}
		select {
		case <-changed:
		case <-deadline:
			s.t.Fatalf("it never said %q:\n%s", pattern, s.said())
		}
	}
}

// ends waits for the end and checks the exit code.
func (s *supervised) ends(code int) {
	s.t.Helper()
	select {
	case <-s.done:
	case <-time.After(time.Minute):
		s.t.Fatalf("it doesn't end:\n%s", s.said())
	}
	if got := s.cmd.ProcessState.ExitCode(); got != code {
		s.t.Errorf("exit code %d (%v), want %d:\n%s", got, s.cmd.ProcessState, code, s.said())
	}
}

func (s *supervised) signal(sig syscall.Signal) {
	s.t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		s.t.Fatal(err)
	}
}

// execWith starts a command of ours with an environment of its own.
func execWith(t *testing.T, env []string, attr *syscall.SysProcAttr, name string, args ...string) *supervised {
	t.Helper()
	s := &supervised{t: t, cmd: exec.Command(name, args...), done: make(chan struct{}), changed: make(chan struct{})}
	s.cmd.Env = append([]string{"PATH=" + bin + ":" + os.Getenv("PATH")}, env...)
	s.cmd.Stdout, s.cmd.Stderr, s.cmd.SysProcAttr = s, s, attr
	s.cmd.WaitDelay = time.Second // one that was left behind may have the pipe
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(s.done)
		_ = s.cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = s.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-s.done:
		case <-time.After(20 * time.Second):
			_ = s.cmd.Process.Kill()
			<-s.done
		}
		if strings.Contains(t.Name(), "Exec") && t.Failed() {
			t.Log(s.said())
		}
	})
	return s
}

func dayflyExec(t *testing.T, agent string, args ...string) *supervised {
	t.Helper()
	return execWith(t, []string{"DAYFLY_AGENT=" + agent}, nil, filepath.Join(bin, "dayfly"), append([]string{"exec"}, args...)...)
}

// execBox is a dayfly with the agent of payments.
func execBox(t *testing.T) (box *sandbox.Sandbox, agent string, revoke func() (lift func())) {
	t.Helper()
	box = newBox(t)
	agent = must(box.StartAgent(t.Context(), sandbox.Payments))(t)
	alice := must(box.Client(t.Context(), sandbox.Alice, box.Info.GRPC))(t)
	c := dayflyv1.NewRevocationServiceClient(alice.Conn())
	return box, agent, func() func() {
		number := must(c.Revoke(t.Context(), &dayflyv1.RevokeRequest{
			Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Identity{Identity: sandbox.Payments.String()}}}, Reason: "exec",
		}))(t).GetRevocation().GetPosition().GetSequence()
		return func() {
			must(c.Lift(t.Context(), &dayflyv1.LiftRequest{Lock: number, Reason: "exec"}))(t)
		}
	}
}

// gone waits until a process or a file isn't there any more.
func gone(t *testing.T, path string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s is still there", path)
		}
	}
}

func proc(pid string) string { return "/proc/" + pid }

// TestExecRevoked: whoever holds what is revoked is ended, with all that it started, even
// if it doesn't want to be; its files go, and nothing is left.
func TestExecRevoked(t *testing.T) {
	_, agent, revoke := execBox(t)
	s := dayflyExec(t, agent, "--audience", "orders", "--file", "web.jwt=web", "--grace", "1s", "--",
		"sh", "-c", `trap 'echo told' TERM; setsid sleep 1000 & echo left $!.; echo at $DAYFLY_FILES; echo "$(cat $DAYFLY_FILES/web.jwt); $DAYFLY_TOKEN."; while :; do sleep 0.1; done`)
	left := s.await(`left (\d+)\.`)[1]
	at := s.await(`at (/\S+)`)[1]
	s.await(`eyJ\S+; eyJ\S+\.`)
	revoke()
	s.await("told")
	gone(t, at+"/web.jwt") // while the program has its grace
	s.await("didn't end in time: killing it")
	s.ends(123)
	s.await("ended because a credential that it had was revoked")
	gone(t, proc(left))
	gone(t, at)
}

// TestExecOnRevoke: it is as its owner says: nothing, a signal, or a new start once there
// is something to start with.
func TestExecOnRevoke(t *testing.T) {
	_, agent, revoke := execBox(t)
	loop := `trap 'echo HUP' HUP; echo "start $$ $DAYFLY_TOKEN."; while :; do sleep 0.1; done`
	none := dayflyExec(t, agent, "--audience", "orders", "--on-revoke", "none", "--", "sh", "-c", loop)
	hup := dayflyExec(t, agent, "--audience", "orders", "--on-revoke", "HUP", "--", "sh", "-c", loop)
	again := dayflyExec(t, agent, "--audience", "orders", "--on-revoke", "restart", "--", "sh", "-c", loop)
	for _, s := range []*supervised{none, hup, again} {
		s.await(`start \d+ eyJ\S+\.`)
	}
	first := again.await(`start (\d+) (\S+)\.`)
	lift := revoke()
	none.await("was revoked: it goes on")
	hup.await("HUP\n")
	again.await("was revoked: ending the program")
	gone(t, proc(first[1]))
	again.await("waiting .for a credential for orders: IDENTITY_LOCKED")
	lift()
	second := again.await(`(?s)start .*start (\d+) (\S+)\.`)
	if second[2] == first[2] {
		t.Error("started anew with what is revoked")
	}
	for _, s := range []*supervised{none, hup, again} {
		if n := strings.Count(s.said(), "start "); n != map[*supervised]int{none: 1, hup: 1, again: 2}[s] {
			t.Errorf("started %d times", n)
		}
		s.signal(syscall.SIGTERM)
		s.ends(128 + 15)
	}
}

// TestExecRenews: files are renewed before the program's eyes, and it is told or started
// anew if it wants to be; what stays in an environment is said to grow stale.
func TestExecRenews(t *testing.T) {
	_, agent, _ := execBox(t)
	file := dayflyExec(t, agent, "--file", "t=orders", "--ttl", "10s", "--on-renew", "HUP", "--", "sh", "-c",
		`trap 'echo now $(cat $DAYFLY_FILES/t).' HUP; echo first $(cat $DAYFLY_FILES/t).; while :; do sleep 0.1; done`)
	again := dayflyExec(t, agent, "--audience", "orders", "--ttl", "12s", "--on-renew", "restart", "--", "sh", "-c", `echo with $DAYFLY_TOKEN.; sleep 1000`)
	stale := dayflyExec(t, agent, "--audience", "web", "--ttl", "4s", "--on-expiry", "kill", "--", "sh", "-c", `echo with $DAYFLY_TOKEN. until $DAYFLY_TOKEN_EXPIRES.; sleep 1000`)

	first := file.await(`first (\S+)\.\n`)[1]
	if second := file.await(`now (\S+)\.\n`)[1]; second == first {
		t.Error("told of nothing new")
	}
	m := again.await(`(?s)with (\S+)\..*a credential was renewed: ending the program.*with (\S+)\.\n`)
	if m[1] == m[2] {
		t.Error("started anew with the old one")
	}
	stale.await(`environment can't be renewed: use --file, or --on-renew restart .variable DAYFLY_TOKEN, stale from 20`)
	expires := must(time.Parse(time.RFC3339, stale.await(`until (\S+)\.\n`)[1]))(t)
	stale.ends(123)
	if time.Now().Before(expires) {
		t.Errorf("ended %v before its token", time.Until(expires))
	}
	for _, s := range []*supervised{file, again} {
		s.signal(syscall.SIGTERM)
		s.ends(128 + 15)
	}
}

// TestExecSignals: each signal reaches the program once, and the code is the program's.
func TestExecSignals(t *testing.T) {
	_, agent, _ := execBox(t)
	script := `for s in HUP INT QUIT USR1 USR2 WINCH CONT ALRM 36; do trap "echo got $s." $s; done; trap 'echo got TERM.; exit 7' TERM; echo up.; while :; do sleep 0.1; done`
	s := dayflyExec(t, agent, "-a", "orders", "--", "bash", "-c", script)
	s.await(`up\.`)
	for name, sig := range map[string]syscall.Signal{
		"HUP": syscall.SIGHUP, "INT": syscall.SIGINT, "QUIT": syscall.SIGQUIT, "USR1": syscall.SIGUSR1, "USR2": syscall.SIGUSR2,
		"WINCH": syscall.SIGWINCH, "CONT": syscall.SIGCONT, "ALRM": syscall.SIGALRM, "36": syscall.Signal(36),
	} {
		s.signal(sig)
		s.await("got " + name + `\.`)
	}
	// A stop, and on again.
	s.signal(syscall.SIGTSTP)
	state(t, s.cmd.Process.Pid, "T")
	s.signal(syscall.SIGCONT)
	s.signal(syscall.SIGTERM)
	s.ends(7)
	for _, name := range []string{"HUP", "INT", "QUIT", "USR1", "USR2", "WINCH", "ALRM", "36", "TERM"} {
		if n := strings.Count(s.said(), "got "+name+"."); n != 1 {
			t.Errorf("%s came %d times:\n%s", name, n, s.said())
		}
	}

	// What was ignored stays so, as nohup wants it.
	n := execWith(t, []string{"DAYFLY_AGENT=" + agent}, nil, "sh", "-c", `trap '' HUP INT; exec dayfly exec -a orders -- sh -c 'echo up.; kill -HUP $PPID $$; kill -INT $PPID $$; echo alive.; grep SigIgn /proc/self/status; exit 3'`)
	n.await(`alive\.`)
	n.ends(3)
	ignored := must(strconv.ParseUint(n.await(`SigIgn:\s*([0-9a-f]+)`)[1], 16, 64))(t)
	const want = 1<<(syscall.SIGHUP-1) | 1<<(syscall.SIGINT-1)
	if ignored&want != want || ignored&^(want|ignoredHere(t)) != 0 {
		t.Errorf("the program ignores %x", ignored)
	}
}

// ignoredHere is what this process ignores, and so all that it starts.
func ignoredHere(t *testing.T) uint64 {
	t.Helper()
	status := string(must(os.ReadFile("/proc/self/status"))(t))
	m := regexp.MustCompile(`SigIgn:\s*([0-9a-f]+)`).FindStringSubmatch(status)
	return must(strconv.ParseUint(m[1], 16, 64))(t)
}

// state waits until a process is in a state of proc(5).
func state(t *testing.T, pid int, want string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		_, after, _ := strings.Cut(string(text), ") ")
		if strings.HasPrefix(after, want) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %d is %.20q, want %s", pid, after, want)
		}
	}
}

// TestExecWaits: it is started when all is there, whatever comes last, and whoever only
// waits ends at once when told to.
func TestExecWaits(t *testing.T) {
	box := newBox(t)
	socket := "unix://" + filepath.Join(box.Dir, "payments.sock")
	early := dayflyExec(t, socket, "--audience", "orders", "--file", "t=web", "--", "sh", "-c", `echo "$DAYFLY_TOKEN; $(cat $DAYFLY_FILES/t)."`)
	told := dayflyExec(t, socket, "--audience", "orders", "--wait", "0", "--", "echo", "it began")
	told.await("waiting .for a credential for orders; the agent: ")
	told.signal(syscall.SIGTERM)
	told.ends(128 + 15)
	if strings.Contains(told.said(), "it began") {
		t.Error("it began")
	}
	must(box.StartAgent(t.Context(), sandbox.Payments))(t)
	early.await(`eyJ\S+; eyJ\S+\.`)
	early.ends(0)
}

// TestExecAgentAway: the agent's end is nothing to the program; what is revoked while
// nobody tells is known as soon as somebody does.
func TestExecAgentAway(t *testing.T) {
	box, agent, revoke := execBox(t)
	s := dayflyExec(t, agent, "--audience", "orders", "--", "sh", "-c", `echo up.; sleep 1000`)
	s.await(`up\.`)
	box.KillAgent(sandbox.Payments)
	revoke()
	must(box.SpawnAgent(sandbox.Payments))(t)
	s.ends(123)
}

// TestExecFromBroker is exec without an agent beside it.
func TestExecFromBroker(t *testing.T) {
	box, _, revoke := execBox(t)
	env := []string{"DAYFLY_BROKER=" + box.Info.GRPC, "DAYFLY_BROKER_ID=" + sandbox.Broker.String(), "SPIFFE_ENDPOINT_SOCKET=" + must(box.TD.Workload(sandbox.Payments))(t)}
	s := execWith(t, env, nil, filepath.Join(bin, "dayfly"), "exec", "--audience", "orders", "--file", "t=web", "--", "sh", "-c", `echo "$DAYFLY_TOKEN; $(cat $DAYFLY_FILES/t)."; sleep 1000`)
	s.await(`eyJ\S+; eyJ\S+\.`)
	revoke()
	s.ends(123)
}

// TestExecKilled: who kills exec with SIGKILL ends the program too, and the next exec
// removes what it left.
func TestExecKilled(t *testing.T) {
	box, agent, _ := execBox(t)
	dir := filepath.Join(box.Dir, "files")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	start := func(script string) *supervised {
		return dayflyExec(t, agent, "--dir", dir, "--file", "t=orders", "--", "sh", "-c", script)
	}
	lives := start(`echo at $DAYFLY_FILES.; sleep 1000`)
	kept := lives.await(`at (\S+)\.\n`)[1]
	s := start(`echo $$ at $DAYFLY_FILES.; exec sleep 1000`)
	m := s.await(`(\d+) at (\S+)\.\n`)
	s.signal(syscall.SIGKILL)
	gone(t, proc(m[1]))
	if _, err := os.Stat(m[2] + "/t"); err != nil {
		t.Errorf("what does the next one remove? %v", err)
	}
	next := start("exit 5")
	next.ends(5)
	gone(t, m[2])
	if _, err := os.Stat(kept + "/t"); err != nil {
		t.Errorf("the file of one that lives: %v", err)
	}
}

// agentExec writes a configuration and returns what starts dayfly-agent exec with it.
func agentExec(t *testing.T, box *sandbox.Sandbox, more string, args ...string) []string {
	t.Helper()
	file := filepath.Join(box.Dir, "exec.yaml")
	text := fmt.Sprintf("broker: {address: %q, id: %q}\nworkload_api: %q\n%s", box.Info.GRPC, sandbox.Broker, must(box.TD.Workload(sandbox.Payments))(t), more)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return append([]string{"exec", "--config", file}, args...)
}

// TestAgentExec is the agent around a program: its files, its sockets, one end, and a
// revocation of what only the configuration names.
func TestAgentExec(t *testing.T) {
	box, _, revoke := execBox(t)
	dir := filepath.Join(box.Dir, "delivered")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	files := fmt.Sprintf("files:\n  - path: %s/t\n    credential: {audience: orders}\n    on_change: {command: [/bin/sh, -c, 'echo $DAYFLY_CHANGE >>%s/told']}\n", dir, dir)
	stale := []string{"DAYFLY_AGENT=unix:///stale", "DAYFLY_AGENT_HTTP=/stale"}
	s := execWith(t, stale, nil, filepath.Join(bin, "dayfly-agent"), agentExec(t, box, files, "--env", "W=web", "--",
		"sh", "-c", fmt.Sprintf(`echo "$(cat %s/t); $W; $(dayfly token get --audience orders)."; echo at ${DAYFLY_AGENT#unix://} $DAYFLY_AGENT_HTTP.; exit 9`, dir))...)
	m := s.await(`(eyJ\S+); eyJ\S+; (eyJ\S+)\.\n`)
	if m[1] != m[2] {
		t.Error("the socket has another token than the file")
	}
	at := s.await(`at (\S+) (\S+)\.\n`)
	s.ends(9)
	gone(t, at[1])
	gone(t, at[2])
	gone(t, dir+"/t")
	if told := string(must(os.ReadFile(dir + "/told"))(t)); told != "written\n" {
		t.Errorf("the configuration's command was told %q", told)
	}

	s = execWith(t, nil, nil, filepath.Join(bin, "dayfly-agent"), agentExec(t, box, files, "--", "sh", "-c", `echo up.; sleep 1000`)...)
	s.await(`up\.`)
	revoke()
	s.ends(123)
	if strings.Contains(s.said(), "eyJ") {
		t.Error("a token in the log")
	}
}

// TestExecPID1 is the agent as the first process of a container: what the program leaves
// behind is buried, also while it runs commands of its own, and the program's signals and
// code are its own.
func TestExecPID1(t *testing.T) {
	box, _, _ := execBox(t)
	dir := filepath.Join(box.Dir, "delivered")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	// The command takes a while and must be known to have gone well.
	files := fmt.Sprintf("files:\n  - path: %s/t\n    credential: {audience: orders, ttl: 10s}\n    on_change: {command: [/bin/sh, -c, 'sleep 0.2; echo $DAYFLY_CHANGE >>%s/told']}\n", dir, dir)
	program := `echo "pid $$, parent $PPID."
for i in $(seq 50); do (sleep 0.0$i & sleep 0.01 &); done
trap 'echo got TERM.; exit 11' TERM
until [ $(wc -l <` + dir + `/told) -ge 2 ]; do sleep 0.1; done
for i in $(seq 300); do
  z=$(cat /proc/[0-9]*/stat 2>/dev/null | grep -c ' Z ')
  [ $z = 0 ] && break
  sleep 0.1
done
echo zombies $z. processes $(ls -d /proc/[0-9]* | wc -l).
while :; do sleep 0.1; done`
	args := agentExec(t, box, files, "--audience", "web", "--", "sh", "-c", program)
	quoted := ""
	for _, a := range args {
		quoted += " '" + strings.ReplaceAll(a, "'", `'\''`) + "'"
	}
	attr := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
	if os.Getuid() != 0 {
		attr.Cloneflags |= syscall.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	s := execWith(t, nil, attr, "sh", "-c", "mount --make-rprivate / && mount -t proc proc /proc && exec dayfly-agent"+quoted)
	s.await(`pid \d+, parent 1\.`)
	s.await(`zombies 0\.`)
	if strings.Contains(s.said(), "telling of a change") {
		t.Errorf("somebody else took the exit code of the command:\n%s", s.said())
	}
	s.signal(syscall.SIGTERM)
	s.await(`got TERM\.`)
	s.ends(11)
}

// A terminal is the other end of a pseudo-terminal.
type terminal struct {
	*supervised
	master *os.File
}

// onTerminal starts a command as the leader of a session on a terminal of its own.
func onTerminal(t *testing.T, env []string, name string, args ...string) *terminal {
	t.Helper()
	master := must(os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0))(t)
	t.Cleanup(func() { _ = master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n := must(unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN))(t)
	slave := must(os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|syscall.O_NOCTTY, 0))(t)
	defer slave.Close()
	s := &supervised{t: t, cmd: exec.Command(name, args...), done: make(chan struct{}), changed: make(chan struct{})}
	s.cmd.Env = append([]string{"PATH=" + bin + ":" + os.Getenv("PATH"), "TERM=dumb", "PS1=prompt> "}, env...)
	s.cmd.Stdin, s.cmd.Stdout, s.cmd.Stderr = slave, slave, slave
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := master.Read(buf)
			if err != nil {
				return
			}
			_, _ = s.Write(buf[:n])
		}
	}()
	go func() {
		defer close(s.done)
		_ = s.cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = s.cmd.Process.Kill()
		<-s.done
		if t.Failed() {
			t.Log(s.said())
		}
	})
	return &terminal{s, master}
}

func (s *terminal) types(text string) {
	s.t.Helper()
	if _, err := s.master.WriteString(text); err != nil {
		s.t.Fatal(err)
	}
}

// TestExecTerminal is a person at a shell with job control: Ctrl-C reaches the program
// once, Ctrl-Z stops both and fg goes on, the program reads the terminal, also at the end
// of a pipe, and a resize is told once.
func TestExecTerminal(t *testing.T) {
	_, agent, _ := execBox(t)
	script := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(script, []byte(`#!/bin/bash
trap 'echo got INT.' INT
trap 'echo got WINCH.' WINCH
trap 'echo got CONT.' CONT
echo "up $$ of $PPID."
while read -r line || [ $? -gt 128 ]; do
  [ -n "$line" ] && echo "read <$line>."
  [ "$line" = end ] && exit 5
done
`), 0o700); err != nil {
		t.Fatal(err)
	}
	sh := onTerminal(t, []string{"DAYFLY_AGENT=" + agent}, "bash", "--norc", "--noprofile", "-i")
	sh.await("prompt> ")
	sh.types("dayfly exec -a orders -- " + script + "\n")
	m := sh.await(`up (\d+) of (\d+)\.`)
	program, supervisor := must(strconv.Atoi(m[1]))(t), must(strconv.Atoi(m[2]))(t)
	sh.types("hello\n")
	sh.await(`read <hello>\.`)
	sh.types("\x03")
	sh.await(`got INT\.`)
	if err := unix.IoctlSetWinsize(int(sh.master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 33, Col: 44}); err != nil {
		t.Fatal(err)
	}
	sh.types("wide\n") // the program's shell runs its trap then
	sh.await(`got WINCH\.`)
	sh.types("\x1a")
	state(t, program, "T")
	state(t, supervisor, "T")
	sh.await(`(?i)stopped`)
	sh.types("fg\n")
	sh.types("again\n")
	sh.await(`read <again>\.`)
	sh.await(`got CONT\.`)
	sh.types("end\n")
	sh.types("echo code $?.\n")
	sh.await(`code 5\.`)
	for _, name := range []string{"INT", "WINCH", "CONT"} {
		if n := strings.Count(sh.said(), "got "+name+"."); n != 1 {
			t.Errorf("%s came %d times", name, n)
		}
	}

	// The other end of a pipe reads the terminal, as a pager does.
	sh.types(`dayfly exec -a orders -- sh -c 'echo piped' | bash -c 'read x; read y </dev/tty; echo "$x, $y."'` + "\n")
	sh.types("typed\n")
	sh.await(`piped, typed\.`)
	// A job in the background that was brought to the foreground.
	sh.types("dayfly exec -a orders -- sleep 1000 &\n")
	sh.types("sleep 0.5; fg\n")
	sh.await(`(?s)sleep 0.5; fg\r\n.*dayfly exec -a orders -- sleep 1000`)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for ctx.Err() == nil && !strings.Contains(sh.said(), "code 130.") { // it may take a moment until it is there
		sh.types("\x03")
		time.Sleep(300 * time.Millisecond)
		sh.types("echo code $?.\n")
		time.Sleep(300 * time.Millisecond)
	}
	sh.await(`code 130\.`)
}

// signalCounter in its environment makes the test's own binary the program of a test.
const signalCounter = "DAYFLY_TEST_SIGNALS"

// countSignals says each signal as it comes, until a line does.
func countSignals() int {
	c := make(chan os.Signal, 16)
	signal.Notify(c, syscall.SIGINT, syscall.SIGWINCH)
	line := make(chan string)
	go func() {
		text, _ := bufio.NewReader(os.Stdin).ReadString('\n')
		line <- text
	}()
	fmt.Println("up.")
	for {
		select {
		case s := <-c:
			fmt.Printf("got %v.\n", s)
		case text := <-line:
			fmt.Printf("read <%s>.\n", strings.TrimSpace(text))
			for _, f := range []*os.File{os.Stdin, os.Stdout, os.Stderr} {
				if _, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err != nil {
					fmt.Println("not a terminal:", f.Name())
				}
			}
			return 6
		}
	}
}

// TestExecOwnTerminal: exec is the first process on a terminal, as in a container with one.
// Ctrl-C is one signal, not two.
func TestExecOwnTerminal(t *testing.T) {
	_, agent, _ := execBox(t)
	s := onTerminal(t, []string{"DAYFLY_AGENT=" + agent, signalCounter + "=1"}, filepath.Join(bin, "dayfly"), "exec", "-a", "orders", "--", must(os.Executable())(t))
	s.await(`up\.`)
	s.types("\x03")
	s.await(`got interrupt\.`)
	s.types("\x03")
	s.await(`(?s)got interrupt\..*got interrupt\.`)
	s.types("x\n")
	s.await(`read <x>\.`)
	s.ends(6)
	if n := strings.Count(s.said(), "got interrupt."); n != 2 || strings.Contains(s.said(), "not a terminal") {
		t.Errorf("Ctrl-C, twice, came %d times:\n%s", n, s.said())
	}
}
