package agent_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/dayflyhq/dayfly/agent"
	"golang.org/x/sys/unix"
)

// The callers of these tests are copies of the test's own program, which do as they are told
// line by line on standard input.
const callerEnv = "DAYFLY_TEST_CALLER"

func init() {
	if os.Getenv(callerEnv) == "" {
		return
	}
	if err := call(); err != nil {
		fmt.Println("fail:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// callerFD is where the connection is in a program that got it from another.
const callerFD = 3

func call() error {
	var conn net.Conn
	if inherited, err := net.FileConn(os.NewFile(callerFD, "conn")); err == nil {
		conn = inherited
	}
	for {
		line, err := readLine(os.Stdin)
		if err != nil {
			return nil
		}
		verb, arg, _ := strings.Cut(line, " ")
		switch verb {
		case "connect":
			conn, err = net.Dial("unix", arg)
		case "get":
			err = ask(conn)
		case "exec", "pass":
			err = handOver(conn, verb, arg)
		}
		if err != nil {
			return err
		}
	}
}

// readLine reads no further than the line: what is after it is for the next program.
func readLine(r io.Reader) (string, error) {
	var line []byte
	for b := make([]byte, 1); ; {
		if _, err := r.Read(b); err != nil || b[0] == '\n' {
			return string(line), err
		}
		line = append(line, b[0])
	}
}

// ask prints what the agent answers.
func ask(conn net.Conn) error {
	if _, err := io.WriteString(conn, "GET /v1/token?audience=orders HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return err
	}
	var body struct{ Reason, Message string }
	if err := json.NewDecoder(resp.Body).Decode(&body); err != nil {
		return err
	}
	fmt.Println(resp.StatusCode, body.Reason, body.Message)
	return nil
}

// handOver makes another program go on with the connection: in this process or, when this
// one has ended, in another.
func handOver(conn net.Conn, how, path string) error {
	f, err := conn.(*net.UnixConn).File()
	if err != nil {
		return err
	}
	if how == "pass" {
		cmd := exec.Command(path)
		cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = os.Stdin, os.Stdout, os.Stderr, []*os.File{f}
		if err := cmd.Start(); err != nil {
			return err
		}
		os.Exit(0)
	}
	if int(f.Fd()) != callerFD {
		if err := unix.Dup3(int(f.Fd()), callerFD, 0); err != nil {
			return err
		}
	} else if _, err := unix.FcntlInt(callerFD, unix.F_SETFD, 0); err != nil {
		return err
	}
	return syscall.Exec(path, []string{path}, os.Environ())
}

// caller is one such process.
type caller struct {
	*testing.T
	in  io.WriteCloser
	out *bufio.Reader
	cmd *exec.Cmd
}

// program copies the caller to a path that only root and this user may write.
func program(t *testing.T, path string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path+".new", content, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	return path
}

func startCaller(t *testing.T, path string, as *syscall.Credential) *caller {
	t.Helper()
	cmd := exec.Command(path)
	cmd.Env = append(os.Environ(), callerEnv+"=1")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: as}
	// Pipes of its own: those of exec.Cmd end with the first process.
	stdin, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	out, stdout, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdin, cmd.Stdout = stdin, stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_, _ = stdin.Close(), stdout.Close()
	t.Cleanup(func() { _, _ = in.Close(), out.Close(); _ = cmd.Wait() })
	return &caller{t, in, bufio.NewReader(out), cmd}
}

func (c *caller) tell(line string) {
	c.Helper()
	if _, err := io.WriteString(c.in, line+"\n"); err != nil {
		c.Fatal(err)
	}
}

// get asks on the connection that it has, and wants an answer that begins like this.
func (c *caller) get(want string) {
	c.Helper()
	c.tell("get")
	if got, err := c.out.ReadString('\n'); err != nil || !strings.HasPrefix(got, want) {
		c.Errorf("got %q, %v; want %q", got, err, want)
	}
}

// openAgent runs an agent whose socket every user may reach, so that only the lists decide.
func openAgent(t *testing.T, allow agent.Allow) *fixture {
	t.Helper()
	td := newDomain(t)
	f := start(t, td, newBroker(t, td), func(c *agent.Config) { c.Allow = allow })
	if err := os.Chmod(f.dir, 0o711); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(f.http, 0o666); err != nil {
		t.Fatal(err)
	}
	return f
}

// The program that runs decides, by its file and not by its name: with every call, for
// another may go on with the connection.
func TestAllowedExecutables(t *testing.T) {
	dir := tempDir(t)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	good, bad := program(t, dir+"/good/app"), program(t, dir+"/bad/app")
	if err := os.Symlink(good, dir+"/link"); err != nil {
		t.Fatal(err)
	}
	f := openAgent(t, agent.Allow{Executables: []string{dir + "/nothing", dir + "/link"}})
	refused := "403 PEER_NOT_ALLOWED " + bad + " (process "

	stranger := startCaller(t, bad, nil)
	stranger.tell("connect " + f.http)
	stranger.get(refused)
	friend := startCaller(t, good, nil)
	friend.tell("connect " + f.http)
	friend.get("200")
	friend.get("200")

	friend.tell("exec " + bad) // the same process and connection
	friend.get(refused)
	friend.tell("exec " + good)
	friend.get("200")

	friend.tell("pass " + good) // another process, the same connection
	if err := unix.Waitid(unix.P_PID, friend.cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err) // it has ended, and its number is still its own
	}
	friend.get("403 PEER_UNKNOWN the kernel doesn't say who is calling: the process that connected has ended")
	if err := friend.cmd.Wait(); err != nil {
		t.Error(err)
	}
	friend.get("403 PEER_UNKNOWN the kernel doesn't say who is calling: the process that connected has ended")

	old := startCaller(t, good, nil)
	old.tell("connect " + f.http)
	old.get("200")
	program(t, good) // an upgrade
	old.get("403 PEER_NOT_ALLOWED " + good + " (deleted) (process ")
	renewed := startCaller(t, good, nil)
	renewed.tell("connect " + f.http)
	renewed.get("200")

	if err := os.Chmod(filepath.Dir(good), 0o777); err != nil { // anybody could put anything there
		t.Fatal(err)
	}
	renewed.get("403 PEER_NOT_ALLOWED " + good + " (process ")
	if err := os.Chmod(filepath.Dir(good), 0o755); err != nil {
		t.Fatal(err)
	}
	renewed.get("200")
	if err := os.Chmod(good, 0o775); err != nil {
		t.Fatal(err)
	}
	renewed.get("403 PEER_NOT_ALLOWED " + good + " (process ")
}

// asWhom is another user's process where the tests may start one, else this user's.
func asWhom(t *testing.T) (as *syscall.Credential, uid uint32, gids []uint32) {
	t.Helper()
	if os.Geteuid() == 0 {
		more := make([]uint32, 40) // more than are asked for at first
		for i := range more {
			more[i] = uint32(70000 + i)
		}
		return &syscall.Credential{Uid: 60001, Gid: 60002, Groups: more}, 60001, append([]uint32{60002}, more...)
	}
	groups, err := os.Getgroups()
	if err != nil {
		t.Fatal(err)
	}
	gids = []uint32{uint32(os.Getegid())}
	for _, g := range groups {
		gids = append(gids, uint32(g))
	}
	return nil, uint32(os.Geteuid()), gids
}

// Users and groups decide, the primary and the others; and every list that there is.
func TestAllowedUsersAndGroups(t *testing.T) {
	dir := tempDir(t)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := program(t, dir+"/app")
	as, uid, gids := asWhom(t)
	first, last := gids[0], gids[len(gids)-1]
	for name, c := range map[string]struct {
		allow agent.Allow
		want  string
	}{
		"none":                {agent.Allow{}, "200"},
		"the user":            {agent.Allow{UIDs: []uint32{7, uid}}, "200"},
		"another user":        {agent.Allow{UIDs: []uint32{uid + 1}}, fmt.Sprintf("403 PEER_NOT_ALLOWED user %d may not", uid)},
		"the group":           {agent.Allow{GIDs: []uint32{first}}, "200"},
		"a group beside":      {agent.Allow{GIDs: []uint32{7, last}}, "200"},
		"another group":       {agent.Allow{GIDs: []uint32{4200000}}, "403 PEER_NOT_ALLOWED no group of the caller's may use this socket; it is in ["},
		"all":                 {agent.Allow{UIDs: []uint32{uid}, GIDs: []uint32{last}, Executables: []string{path}}, "200"},
		"all but the user":    {agent.Allow{UIDs: []uint32{uid + 1}, GIDs: []uint32{last}, Executables: []string{path}}, "403 PEER_NOT_ALLOWED"},
		"all but the group":   {agent.Allow{UIDs: []uint32{uid}, GIDs: []uint32{4200000}, Executables: []string{path}}, "403 PEER_NOT_ALLOWED"},
		"all but the program": {agent.Allow{UIDs: []uint32{uid}, GIDs: []uint32{last}, Executables: []string{"/bin/sh"}}, "403 PEER_NOT_ALLOWED " + path},
	} {
		t.Run(name, func(t *testing.T) {
			f := openAgent(t, c.allow)
			caller := startCaller(t, path, as)
			caller.tell("connect " + f.http)
			caller.get(c.want)
		})
	}
}
