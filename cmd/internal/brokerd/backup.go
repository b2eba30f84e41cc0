package brokerd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/boltstore"
	"github.com/dayflyhq/dayfly/broker/rpc"
	"github.com/dayflyhq/dayfly/cmd/internal/config"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/spf13/cobra"
	"golang.org/x/term"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// backupTries is how often a backup is begun that gives way to the broker's writes:
// what it was in the way of is done by the next time.
const backupTries = 3

// A backup is what "dayfly-broker backup" is asked for, and how it went.
type backup struct {
	File  string `json:"file"`
	From  string `json:"from"` // "broker" or "store"
	Bytes int64  `json:"bytes"`
	boltstore.Report
	store, socket string
	progress      io.Writer // a terminal, or nil
}

func backupCommand(name string) *cobra.Command {
	var b backup
	var configPath, output string
	cmd := &cobra.Command{
		Use:   "backup --to FILE",
		Short: "copy the store, while a broker serves it or while none does",
		Long: "Copy the store to a new file, which is there once it is on the disk and has been checked. A broker that\n" +
			"serves gives the copy over its break-glass socket and is not held up; without one the store itself is\n" +
			"read. The file holds no token and no private key, but who talks to whom: keep it as the store is kept.\n" +
			"A backup is never served: \"" + name + " restore\" makes a store of it.",
		Example: "  " + name + " backup --to /var/backups/dayfly-monday.db\n" +
			"  " + name + " backup --break-glass /run/dayfly/break-glass.sock --to /mnt/dayfly.db --output json",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			b.socket = strings.TrimPrefix(b.socket, "unix://") // as the other commands write it
			if b.File == "" {
				return config.UsageError{Err: errors.New("--to FILE is missing: where the backup goes")}
			}
			if err := checkOutput(output); err != nil {
				return err
			}
			if b.store == "" && b.socket == "" {
				cfg := Defaults()
				if err := config.Load(configPath, &cfg); err != nil {
					return config.UsageError{Err: err}
				}
				b.store, b.socket = cfg.Store, cfg.Listen.BreakGlass
			}
			if f, ok := cmd.ErrOrStderr().(*os.File); ok && term.IsTerminal(int(f.Fd())) {
				b.progress = f
			}
			if err := b.run(cmd.Context()); err != nil {
				return err
			}
			return b.print(cmd.OutOrStdout(), output)
		},
	}
	f := cmd.Flags()
	f.StringVar(&b.File, "to", "", "the `file` to make; an existing one is left as it is")
	f.StringVarP(&configPath, "config", "c", "/etc/dayfly/broker.yaml", "the broker's configuration, which names its store and its socket")
	f.StringVar(&b.store, "store", "", "the store's `file`, instead of a configuration")
	f.StringVar(&b.socket, "break-glass", "", "the `path` of the broker's break-glass socket, instead of a configuration")
	f.StringVarP(&output, "output", "o", "text", "text or json")
	return cmd
}

// run copies from the broker that serves, else from the store.
func (b *backup) run(ctx context.Context) error {
	hot := b.socket != "" && answers(b.socket)
	switch {
	case !hot && b.store == "":
		return fmt.Errorf("no broker answers at %s: name its store with --store if none is meant to run", b.socket)
	case !hot:
		b.From = "store"
		err := b.save(ctx, func(w io.Writer) error { return boltstore.CopyFile(ctx, b.store, b.begin, b.counted(w)) })
		if errors.Is(err, boltstore.ErrLocked) {
			return fmt.Errorf("%w, or name its break-glass socket with --break-glass", err)
		}
		return err
	}
	b.From = "broker"
	var err error
	for range backupTries {
		err = b.save(ctx, func(w io.Writer) error { return b.receive(ctx, b.counted(w)) })
		if status.Code(err) != codes.Unavailable {
			break
		}
	}
	return err
}

// answers reports whether a process listens on a socket.
func answers(path string) bool {
	conn, err := net.Dial("unix", path)
	if err == nil {
		conn.Close()
		return true
	}
	return !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ECONNREFUSED)
}

func (b *backup) save(ctx context.Context, fill func(io.Writer) error) (err error) {
	b.Report, err = boltstore.SaveBackup(ctx, b.File, time.Now(), fill)
	if b.progress != nil {
		fmt.Fprintln(b.progress)
	}
	return err
}

// receive takes a copy from the broker.
func (b *backup) receive(ctx context.Context, w io.Writer) error {
	conn, err := grpc.NewClient("unix:"+b.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	stream, err := dayflyv1.NewBackupServiceClient(conn).Backup(ctx, &dayflyv1.BackupRequest{})
	if err != nil {
		return fmt.Errorf("asking the broker: %w", err)
	}
	first, err := stream.Recv()
	if err != nil {
		return fmt.Errorf("asking the broker: %w", err)
	}
	size := int64(first.GetBegin().GetSize())
	b.begin(size)
	for left := size; ; {
		m, err := stream.Recv()
		switch {
		case err == io.EOF && left == 0:
			return nil
		case err == io.EOF:
			return fmt.Errorf("the broker's copy ended %d bytes early", left)
		case err != nil:
			return fmt.Errorf("receiving the broker's copy: %w", err)
		}
		if left -= int64(len(m.GetData())); left < 0 {
			return errors.New("the broker's copy is longer than it said")
		}
		if _, err := w.Write(m.GetData()); err != nil {
			return err
		}
	}
}

func (b *backup) begin(size int64) { b.Bytes = size }

// counted shows how far a copy is, on a terminal.
func (b *backup) counted(w io.Writer) io.Writer {
	if b.progress == nil {
		return w
	}
	return &counter{w: w, b: b}
}

type counter struct {
	w     io.Writer
	b     *backup
	done  int64
	shown time.Time
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.done += int64(n)
	if now := time.Now(); now.Sub(c.shown) > 100*time.Millisecond || c.done == c.b.Bytes {
		c.shown = now
		fmt.Fprintf(c.b.progress, "\rcopied %.1f of %.1f MiB", float64(c.done)/(1<<20), float64(c.b.Bytes)/(1<<20))
	}
	return n, err
}

func (b *backup) print(w io.Writer, output string) error {
	if output == "json" {
		return printJSON(w, b)
	}
	how := "the store, which no broker serves"
	if b.From == "broker" {
		how = "the broker that serves"
	}
	fmt.Fprintf(w, "backup        %s, checked and on the disk\nfrom          %s\nmade          %s\nsize          %d bytes\n", b.File, how, b.Backup.Format(time.RFC3339), b.Bytes)
	return printReport(w, "text", b.Report)
}

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// beginBackup is the store's backup, in the broker's words.
func (d *daemon) beginBackup() (rpc.Backup, error) {
	b, err := d.store.Backup()
	switch {
	case errors.Is(err, boltstore.ErrBusy):
		return rpc.Backup{}, broker.ErrBackupBusy
	case errors.Is(err, broker.ErrStoreClosed):
		return rpc.Backup{}, broker.ErrStoreLost
	case err != nil:
		return rpc.Backup{}, err
	}
	return rpc.Backup{ReadCloser: yielding{b, d}, Size: b.Size, Head: b.Head}, nil
}

// yielding tells the caller that the backup gave way, and the log why.
type yielding struct {
	*boltstore.Backup
	d *daemon
}

func (y yielding) Read(p []byte) (int, error) {
	n, err := y.Backup.Read(p)
	if errors.Is(err, boltstore.ErrGaveWay) {
		y.d.log.Warn("a backup was given up", "err", err)
		err = broker.ErrBackupGaveWay
	}
	return n, err
}
