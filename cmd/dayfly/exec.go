package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/cmd/internal/supervise"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/spf13/cobra"
)

func (a *app) execCmd() *cobra.Command {
	var flags supervise.Flags
	cmd := &cobra.Command{
		Use:   "exec [flags] -- PROGRAM [ARG...]",
		Short: "Run a program with fresh tokens in its environment or in files",
		Long: `Wait until the tokens are there, run a program with them, and stay beside it: files
are renewed while it runs, and it is told, restarted or ended when what it holds is
renewed, revoked or expired, as the flags say.

A token in the environment can't be renewed, and whoever may look at the process can
read it; a file in the folder ` + supervise.FilesVariable + ` is better where a program can read one.

Signals, exit code and terminal are the program's. Beside its codes: 123 it was ended
because a token was revoked or expired, 124 --wait has passed, 125 anything else that
isn't the program's doing, 126 it can't be run, 127 it isn't there.`,
		Example: `  dayfly exec --audience orders -- ./nightly-job --full
  dayfly exec --env REGISTRY_TOKEN=registry=push --binding none -- ./push.sh
  dayfly exec --file orders.jwt=orders=orders.read --on-renew HUP -- ./server
  dayfly exec --env TOKEN=orders --on-renew restart --on-revoke restart -- ./server`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef("dayfly exec --audience orders -- PROGRAM", "the command is missing")
			}
			if cmd.ArgsLenAtDash() != 0 {
				return usagef("dayfly exec --audience orders -- PROGRAM", "put -- before the command")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error { return a.exec(cmd.Context(), &flags, args) },
	}
	flags.Add(cmd.Flags())
	complete(cmd, "binding", string(token.BindingSPIFFE), string(token.BindingX5T), string(token.BindingNone))
	complete(cmd, "on-renew", "none", "restart", "HUP", "USR1", "USR2")
	complete(cmd, "on-revoke", "kill", "restart", "none", "TERM")
	complete(cmd, "on-expiry", "none", "kill", "restart", "TERM")
	return cmd
}

// childCode is the exit code of a program that exec has run.
type childCode int

func (c childCode) Error() string { return fmt.Sprintf("the program ended with %d", int(c)) }

// execFailure gives what exec itself fails with a code that no other verb has, so that it
// isn't taken for the program's.
func execFailure(err error) error {
	var known *failure
	if errors.As(err, &known) && known.code >= supervise.ExitRevoked {
		return err
	}
	return &failure{err: err, code: supervise.ExitFailed}
}

func (a *app) exec(ctx context.Context, flags *supervise.Flags, args []string) error {
	spec, err := flags.Spec()
	if err != nil {
		return usagef("dayfly exec --help has examples", "%v", err)
	}
	if _, exit := supervise.Find(args[0]); exit != nil { // first, so that no token is issued for nothing
		return exitError(*exit)
	}
	signals, release := supervise.Catch()
	defer release()
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx)) // a signal is the program's
	defer cancel()
	log := slog.New(&notes{a.stderr, "dayfly: exec: ", &sync.Mutex{}})
	var folder *supervise.Folder
	if len(spec.Files) > 0 {
		if folder, err = supervise.NewFolder(spec.Folder); err != nil {
			return failf(supervise.ExitFailed, "name another with --dir", "making a folder for the files: %w", err)
		}
		defer folder.Close()
		if !folder.InMemory {
			log.Warn("the files are on a disk: --dir names a folder in memory", "folder", folder.Path)
		}
	}
	keeper, stop, err := a.keeper(ctx, spec, log)
	if err != nil {
		return err
	}
	defer stop()
	return exitError(supervise.Run(ctx, supervise.Config{
		Spec: spec, Keeper: keeper, Program: args, Environ: a.environ, Folder: folder, Log: log, Signals: signals,
	}))
}

func exitError(e supervise.Exit) error {
	if e.Err == nil {
		return childCode(e.Code)
	}
	return &failure{err: e.Err, code: e.Code, hint: map[int]string{
		supervise.ExitWaited:        "--wait waits longer",
		supervise.ExitNotFound:      "is it in PATH?",
		supervise.ExitNotExecutable: "is it executable?",
		supervise.ExitRevoked:       "ask the security team what was revoked: dayfly revocations list; --on-revoke and --on-expiry say what happens",
	}[e.Code]}
}

// keeper is the agent at its socket, or one in this process that asks the broker.
func (a *app) keeper(ctx context.Context, spec *supervise.Spec, log *slog.Logger) (supervise.Keeper, func(), error) {
	if a.conn.agent != "" && a.conn.broker != "" {
		return nil, nil, usagef("give one of the two", "both --agent and --broker are given")
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	stop := func() { cancel(); wg.Wait() }
	if address := a.agent(); address != "" {
		client, err := a.socketClient("the agent's socket", address)
		if err != nil {
			return nil, stop, err
		}
		w := supervise.NewWatcher(client.Conn(), spec.Requests())
		wg.Go(func() {
			w.Run(ctx)
			_ = client.Close()
		})
		return w, stop, nil
	}
	address, id, err := a.broker(tokensHint)
	if err != nil {
		return nil, stop, err
	}
	var source sdk.Source
	var changed func() <-chan struct{}
	if a.conn.filesNamed() {
		source, err = a.fileSource(id.TrustDomain())
	} else {
		var at string
		if at, err = a.workloadAPI(); err == nil {
			live := agent.NewIdentity(at, nil)
			source, changed = live, live.Changed
			wg.Go(func() { _ = live.Run(ctx) })
		}
	}
	if err != nil {
		return nil, stop, err
	}
	client, err := sdk.New(sdk.Config{Address: address, Source: source, BrokerID: id, Timeout: a.timeout})
	if err != nil {
		stop()
		return nil, stop, usagef("write host:port", "%v", err)
	}
	own, err := agent.New(agent.Config{
		Upstream: client.Conn(), BrokerID: id, Bundles: source, Source: source, Changed: changed, Prefetch: spec.Prefetch(), NoSockets: true,
	})
	if err != nil {
		stop()
		return nil, stop, errors.Join(err, client.Close())
	}
	wg.Go(func() {
		if err := own.Run(ctx); err != nil {
			log.Error("keeping the tokens", "err", err)
		}
		_ = client.Close()
	})
	deaf := time.AfterFunc(deafAfter, func() {
		for _, c := range own.Status().Checks {
			if c.Name == "feed" && !c.OK && ctx.Err() == nil {
				log.Warn("revocations aren't heard: what is revoked stays until it expires", "err", c.Message)
			}
		}
	})
	return supervise.OfAgent(own), func() { deaf.Stop(); stop() }, nil
}

// deafAfter is when it is said that the feed can't be followed.
const deafAfter = 10 * time.Second

// notes writes a log for people, a line an event.
type notes struct {
	w      io.Writer
	prefix string
	mu     *sync.Mutex
}

func (n *notes) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelInfo }
func (n *notes) WithGroup(string) slog.Handler                { return n }

func (n *notes) WithAttrs(attrs []slog.Attr) slog.Handler {
	prefix := n.prefix
	for _, at := range attrs {
		prefix += clean(at.Value.String()) + ": "
	}
	return &notes{n.w, prefix, n.mu}
}

func (n *notes) Handle(_ context.Context, r slog.Record) error {
	var facts []string
	cause := ""
	r.Attrs(func(at slog.Attr) bool {
		if at.Key == "err" {
			cause = ": " + clean(at.Value.String())
			return true
		}
		facts = append(facts, strings.ReplaceAll(at.Key, "_", " ")+" "+clean(at.Value.String()))
		return true
	})
	line := n.prefix + r.Message
	if len(facts) > 0 {
		line += " (" + strings.Join(facts, ", ") + ")"
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	_, err := fmt.Fprintln(n.w, line+cause)
	return err
}
