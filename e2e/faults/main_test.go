//go:build linux

package faults_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// binVar says that this process is inside the namespaces, and where the commands are.
const binVar = "DAYFLY_FAULTS_BIN"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		if role, ok := roles[os.Args[1]]; ok {
			if err := role(os.Args[2:]); err != nil {
				fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[1], err)
				os.Exit(1)
			}
			return
		}
	}
	var code int
	var err error
	if os.Getenv(binVar) == "" {
		code, err = outside()
	} else if err = prepare(); err == nil {
		code = m.Run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// roles are what this binary is when its first argument says so.
var roles = map[string]func(args []string) error{
	"role-enter":    enter,
	"role-verifier": serveVerifier,
	"role-crowd":    crowd,
}

// outside builds the commands and runs this binary again in namespaces of its own.
func outside() (int, error) {
	dir, err := os.MkdirTemp("", "dayfly-bin")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	build := exec.Command("go", "build", "-o", dir, "../../cmd/...")
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	if err := build.Run(); err != nil {
		return 0, fmt.Errorf("building the commands: %w", err)
	}
	// What is inside is killed when the thread that started it ends.
	runtime.LockOSThread()
	own, ownErr := inside(dir, unix.CLONE_NEWNET|unix.CLONE_NEWNS)
	if os.Geteuid() != 0 || ownErr != nil {
		if own, err = inside(dir, unix.CLONE_NEWNET|unix.CLONE_NEWNS|unix.CLONE_NEWUSER); err != nil {
			return 0, fmt.Errorf(`the fault tests need network and mount namespaces, and this kernel makes none for us:
as we are: %v
in a user namespace: %w
Run them as root, or allow user namespaces: sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone=1,
kernel.apparmor_restrict_unprivileged_userns=0; in a container, a seccomp profile that lets unshare through`, ownErr, err)
		}
	}
	// Who ends us ends what is inside, and we remove what we made.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGQUIT)
	go func() {
		for s := range signals {
			own.Process.Signal(s)
		}
	}()
	err = own.Wait()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.Exited() {
		return exit.ExitCode(), nil
	}
	return 0, err
}

// inside starts this binary again, with its arguments, in new namespaces.
func inside(bin string, namespaces uintptr) (*exec.Cmd, error) {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), binVar+"="+bin)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: namespaces, Pdeathsig: syscall.SIGKILL}
	if namespaces&unix.CLONE_NEWUSER != 0 {
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
	}
	return cmd, cmd.Start()
}

// prepare makes the namespaces usable: nothing that is mounted here is seen outside, and
// "ip netns" has its folder.
func prepare() error {
	if _, err := exec.LookPath("ip"); err != nil {
		return errors.New("the fault tests need the command ip: apt-get install iproute2")
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=0755"); err != nil {
		return fmt.Errorf("mounting a tmpfs on /run: %w", err)
	}
	return makeBridge()
}

// command is where a built command is.
func command(name string) string { return filepath.Join(os.Getenv(binVar), name) }

// enter becomes another command on a host: its arguments are the host and the command.
// The process ends with the one that started it, paused or not.
func enter(args []string) error {
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return err
	}
	ns, err := os.Open("/run/netns/" + args[0])
	if err != nil {
		return err
	}
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("entering %s: %w", args[0], err)
	}
	return syscall.Exec(args[1], args[1:], os.Environ())
}
