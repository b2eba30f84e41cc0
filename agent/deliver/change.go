package deliver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	// DefaultInterval and MaxInterval bound how often a program is told.
	DefaultInterval = time.Second
	MaxInterval     = time.Hour
	// DefaultTimeout and MaxTimeout bound how long a command may take.
	DefaultTimeout = 30 * time.Second
	MaxTimeout     = 5 * time.Minute

	maxOutput  = 16 << 10 // of a command, that is kept
	maxPIDFile = 64
)

// A Change is how a program is told that its files have changed: by a command or by a
// signal. What fails is tried again, with growing pauses.
type Change struct {
	// Command is a program and its arguments, without a shell. Its path is absolute. It
	// finds out what happened by DAYFLY_PATH and DAYFLY_CHANGE ("written" or "removed"),
	// and has PATH, HOME, LANG and TZ of the agent; nothing else.
	Command []string
	// Timeout is how long it may take until it is killed, with all that it started. Zero:
	// DefaultTimeout.
	Timeout time.Duration

	// PIDFile names a file with the number of the process that gets Signal, such as HUP.
	// While there is no such file there is nobody to tell. Where others than root and this
	// user could have written it, it speaks for processes of its owner only.
	PIDFile, Signal string

	// MinInterval is the least time between two times of telling: changes between them are
	// told as one. Zero: DefaultInterval.
	MinInterval time.Duration
}

func (c *Change) validate() error {
	var errs []error
	signalled := c.PIDFile != "" || c.Signal != ""
	if (len(c.Command) > 0) == signalled {
		errs = append(errs, wrong("command", "either it, or pid_file and signal, must be there"))
	}
	if len(c.Command) > 0 && !filepath.IsAbs(c.Command[0]) {
		errs = append(errs, wrong("command", "begins with the absolute path of a program; there is no shell"))
	}
	if signalled && !filepath.IsAbs(c.PIDFile) {
		errs = append(errs, wrong("pid_file", "must be an absolute path"))
	}
	if _, ok := signals[c.Signal]; !ok && signalled {
		errs = append(errs, wrong("signal", "is HUP, INT, QUIT, TERM, USR1, USR2 or WINCH"))
	}
	if c.Timeout < 0 || c.Timeout > MaxTimeout {
		errs = append(errs, wrong("timeout", "is at most %v", MaxTimeout))
	}
	if c.MinInterval < 0 || c.MinInterval > MaxInterval {
		errs = append(errs, wrong("min_interval", "is at most %v", MaxInterval))
	}
	return errors.Join(errs...)
}

func (c *Change) interval() time.Duration {
	if c.MinInterval == 0 {
		return DefaultInterval
	}
	return c.MinInterval
}

// tell does it once.
func (c *Change) tell(ctx context.Context, path, what string, run func(*exec.Cmd) error, log *slog.Logger) error {
	if len(c.Command) == 0 {
		return c.signal(log)
	}
	return c.run(ctx, path, what, run, log)
}

func (c *Change) run(ctx context.Context, path, what string, run func(*exec.Cmd) error, log *slog.Logger) error {
	timeout := c.Timeout
	if timeout == 0 {
		timeout = DefaultTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.Command[0], c.Command[1:]...)
	cmd.Dir = "/"
	cmd.Env = []string{"DAYFLY_PATH=" + path, "DAYFLY_CHANGE=" + what}
	for _, name := range []string{"PATH", "HOME", "LANG", "TZ"} {
		if v, ok := os.LookupEnv(name); ok {
			cmd.Env = append(cmd.Env, name+"="+v)
		}
	}
	var out head
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = time.Second
	inGroup(cmd)
	err := run(cmd)
	if errors.Is(err, exec.ErrWaitDelay) && ctx.Err() == nil {
		err = nil // it went well, and left somebody behind with its output
	}
	if ctx.Err() == context.DeadlineExceeded {
		err = fmt.Errorf("it took more than %v and was killed", timeout)
	}
	if text := redact(strings.TrimSpace(out.String())); text != "" {
		log.Info("output of the command on change", "output", text)
	}
	if err != nil {
		return fmt.Errorf("running %s: %w", c.Command[0], err)
	}
	return nil
}

// head keeps how an output begins. It may be written to by the two pipes of a command.
type head struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (h *head) Write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.b.Write(p[:min(len(p), max(0, maxOutput-h.b.Len()))])
	return len(p), nil
}

func (h *head) String() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.b.String()
}

func (c *Change) signal(log *slog.Logger) error {
	pid, owner, err := readPID(c.PIDFile)
	if errors.Is(err, fs.ErrNotExist) {
		log.Debug("nobody to signal yet", "pid_file", c.PIDFile)
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading %s: %w", c.PIDFile, err)
	}
	p, err := os.FindProcess(pid)
	if err != nil {
		return fmt.Errorf("signalling process %d: %w", pid, err)
	}
	defer func() { _ = p.Release() }()
	// After the process is held: if the number is another's by now, the signal reaches nobody.
	if err := speaksFor(owner, pid); err != nil {
		return fmt.Errorf("signalling process %d: %w", pid, err)
	}
	if err := p.Signal(signals[c.Signal]); err != nil {
		return fmt.Errorf("signalling process %d: %w", pid, err)
	}
	return nil
}

// anybody is the owner of a file that may name any process.
const anybody = -1

// readPID reads the number of a process, and whose word it is: anybody for root's and this
// user's own, else that of the file's owner. A folder in which others can put things may hold
// a link to a file of root's, so that there only others' files count.
func readPID(path string) (pid, owner int, err error) {
	f, err := openPlain(path)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, 0, err
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o002 != 0 {
		return 0, 0, errors.New("it is no plain file, or everybody may write it")
	}
	if owner, err = ownerOf(info); err != nil {
		return 0, 0, err
	}
	if owner == 0 || owner == os.Geteuid() {
		if err := guarded(filepath.Dir(path)); err != nil {
			return 0, 0, fmt.Errorf("it may be another file than it seems: %w", err)
		}
		owner = anybody
	}
	content := make([]byte, maxPIDFile)
	n, _ := f.Read(content)
	pid, err = parsePID(string(content[:n]))
	return pid, owner, err
}

// guarded wants nobody but root and this user to be able to put anything in a folder, or on
// the way to it; links of theirs are good.
func guarded(folder string) error {
	for at := folder; at != filepath.Dir(at); at = filepath.Dir(at) {
		info, err := os.Lstat(at)
		if err != nil {
			return err
		}
		if uid, err := ownerOf(info); err != nil || uid != 0 && uid != os.Geteuid() {
			return errors.Join(fmt.Errorf("%s belongs to user %d", at, uid), err)
		}
	}
	real, err := filepath.EvalSymlinks(folder)
	if err != nil {
		return err
	}
	root, err := openFolder(real)
	if err != nil {
		return err
	}
	return root.Close()
}

// speaksFor says whether an owner's word counts for a process.
func speaksFor(owner, pid int) error {
	if owner == anybody {
		return nil
	}
	info, err := os.Stat("/proc/" + strconv.Itoa(pid))
	if err != nil {
		return err
	}
	if uid, err := ownerOf(info); err != nil || uid != owner {
		return errors.Join(fmt.Errorf("it is user %d's, and the file with its number is user %d's", uid, owner), err)
	}
	return nil
}

// parsePID reads one number of a process that may be signalled: 1 is everything's parent,
// and what isn't positive would be groups.
func parsePID(s string) (int, error) {
	pid, err := strconv.ParseInt(strings.TrimSpace(s), 10, 31)
	if err != nil || pid <= 1 {
		return 0, errors.New("it doesn't hold the number of a process")
	}
	return int(pid), nil
}

// A teller tells of a target's changes, the latest only, not too often, until it worked.
type teller struct {
	tell     func(ctx context.Context, what string) error
	interval time.Duration
	now      func() time.Time
	log      *slog.Logger
	counts   *Counts
	wake     chan struct{} // has an element when there is something to tell

	mu     sync.Mutex
	what   string // to be told; "" for nothing
	number int    // of the change that it tells of
	err    error  // of the last time
}

// changed leaves word; it doesn't wait.
func (t *teller) changed(what string) {
	t.mu.Lock()
	t.what, t.number = what, t.number+1
	t.mu.Unlock()
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

func (t *teller) newest() (string, int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.what, t.number
}

func (t *teller) failing() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err
}

// run tells until ctx ends.
func (t *teller) run(ctx context.Context) {
	var last time.Time
	var retry backoff
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.wake:
		}
		for what, _ := t.newest(); what != ""; what, _ = t.newest() {
			wait := retry.left(t.now())
			if !last.IsZero() {
				wait = max(wait, min(t.interval, last.Add(t.interval).Sub(t.now())))
			}
			if !pause(ctx, wait) {
				return
			}
			last = t.now()
			t.once(ctx, &retry)
			if ctx.Err() != nil {
				return
			}
		}
	}
}

// once tells of the newest change there is by now.
func (t *teller) once(ctx context.Context, retry *backoff) {
	what, number := t.newest()
	err := t.tell(ctx, what)
	if ctx.Err() != nil {
		return
	}
	t.counts.Told.Add(1)
	t.mu.Lock()
	t.err = err
	if err == nil && number == t.number {
		t.what = ""
	}
	t.mu.Unlock()
	if err == nil {
		retry.reset()
		return
	}
	t.counts.TellFailures.Add(1)
	retry.failed(t.now())
	t.log.Error("telling of a change", "change", what, "err", err, "retry_in", retry.pause)
}

// pause waits, and reports whether ctx is still on.
func pause(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
