package agentd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/cmd/internal/config"
	"github.com/dayflyhq/dayfly/cmd/internal/supervise"
	"github.com/spf13/cobra"
)

// What the program finds the agent by: DAYFLY_AGENT is what dayfly and its helpers read.
const (
	agentVariable = "DAYFLY_AGENT"      // unix:///path of the socket for gRPC
	httpVariable  = "DAYFLY_AGENT_HTTP" // path of the socket for HTTP
)

// execCommand is the agent around one program, in one process.
func execCommand() *cobra.Command {
	var f flags
	var want supervise.Flags
	cmd := &cobra.Command{
		Use:   "exec [flags] -- PROGRAM [ARG...]",
		Short: "run the agent around a program, as the entrypoint of a container",
		Long: "Run the agent and, once its credentials are there, a program beside it: tokens in its\n" +
			"environment, in files in the folder " + supervise.FilesVariable + ", and at the agent's sockets, which it finds\n" +
			"by " + agentVariable + " and " + httpVariable + ". Sockets that aren't configured are made for it alone. Both end\n" +
			"together. Made to be PID 1: it passes signals on and buries what is left behind.\n\n" +
			"Exit codes: the program's; 123 it was ended because a token was revoked or expired,\n" +
			"124 --wait has passed, 125 anything else that isn't the program's doing, 126 it can't\n" +
			"be run, 127 it isn't there.",
		Example: "  dayfly-agent exec --config /etc/dayfly/agent.yaml -- ./server\n" +
			"  dayfly-agent exec --broker broker:8443 --broker-id spiffe://example.org/dayfly/broker \\\n" +
			"    --file orders.jwt=orders=orders.read --on-renew HUP -- ./server --port 8080",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 || cmd.ArgsLenAtDash() != 0 {
				return errors.New("the program is missing: dayfly-agent exec [flags] -- PROGRAM [ARG...]")
			}
			return nil
		},
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			return runBeside(cmd, &f, &want, args)
		},
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return ownFailure(err) })
	args := cmd.Args
	cmd.Args = func(cmd *cobra.Command, list []string) error { return ownFailure(args(cmd, list)) }
	f.add(cmd)
	want.Add(cmd.Flags())
	return cmd
}

// ownFailure has a code of its own, so that it isn't taken for the program's.
func ownFailure(err error) error {
	if err == nil {
		return nil
	}
	return config.ExitError{Code: supervise.ExitFailed, Err: err}
}

func runBeside(cmd *cobra.Command, f *flags, want *supervise.Flags, args []string) (err error) {
	spec, err := want.Spec()
	if err != nil && !errors.Is(err, supervise.ErrNothing) { // sockets and files of the configuration may be all it needs
		return ownFailure(err)
	}
	if _, exit := supervise.Find(args[0]); exit != nil {
		return exitError(*exit)
	}
	signals, release := supervise.Catch()
	defer release()
	folder, err := supervise.NewFolder(spec.Folder)
	if err != nil {
		return ownFailure(fmt.Errorf("making a folder for the program (--dir names another): %w", err))
	}
	defer func() { err = errors.Join(err, folder.Close()) }()
	if f.adjust, err = ownSockets(folder.Path); err != nil {
		return ownFailure(err)
	}
	cfg, err := f.load(cmd)
	if err != nil {
		return ownFailure(err)
	}
	if cfg.several() {
		return ownFailure(errors.New("workloads: a program is run for one workload, and the configuration has several: give it a configuration of its own"))
	}
	wanted := spec.Requests()
	for _, p := range cfg.Prefetch {
		spec.Beside = append(spec.Beside, p.request())
	}
	for _, t := range cfg.targets() {
		for _, f := range t.Files {
			spec.Beside = slices.AppendSeq(spec.Beside, maps.Values(f.Credentials))
		}
	}
	for _, p := range wanted {
		cfg.Prefetch = append(cfg.Prefetch, Prefetch{p.Audience, p.Scopes, p.TTL, string(p.Binding)})
	}
	var exit *supervise.Exit
	err = serve(context.WithoutCancel(cmd.Context()), cfg, nil, nil, cmd.ErrOrStderr(), func(ctx context.Context, a *agent.Agent, log *slog.Logger) error {
		if !folder.InMemory && len(spec.Files) > 0 {
			log.WarnContext(ctx, "the program's files are on a disk: --dir names a folder in memory", "folder", folder.Path)
		}
		e := supervise.Run(ctx, supervise.Config{
			Spec: spec, Keeper: supervise.OfAgent(a), Program: args, Environ: besideAgent(cfg, os.Environ()),
			Folder: folder, Log: log, Signals: signals, Ready: a.FilesThere,
		})
		exit = &e
		return errProgramEnded
	})
	if exit == nil || !errors.Is(err, errProgramEnded) {
		return ownFailure(err) // the program was ended because the agent failed
	}
	return exitError(*exit)
}

// errProgramEnded ends the agent with its program.
var errProgramEnded = errors.New("the program has ended")

func exitError(e supervise.Exit) error {
	if e.Err == nil && e.Code == 0 {
		return nil
	}
	return config.ExitError{Code: e.Code, Err: e.Err}
}

// ownSockets makes the sockets that nobody configured ones for the program alone, in a
// folder that no file of the program's can have the name of.
func ownSockets(folder string) (func(*Config), error) {
	dir := filepath.Join(folder, "..agent")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	return func(cfg *Config) {
		if cfg.Sockets.GRPC == "" {
			cfg.Sockets.GRPC = filepath.Join(dir, "grpc.sock")
		}
		if cfg.Sockets.HTTP == "" {
			cfg.Sockets.HTTP = filepath.Join(dir, "http.sock")
		}
	}, nil
}

// besideAgent is an environment in which the agent is found, and no other.
func besideAgent(cfg *Config, environ []string) []string {
	environ = slices.DeleteFunc(slices.Clone(environ), func(kv string) bool {
		name, _, _ := strings.Cut(kv, "=")
		return name == agentVariable || name == httpVariable
	})
	return append(environ, agentVariable+"=unix://"+cfg.Sockets.GRPC, httpVariable+"="+cfg.Sockets.HTTP)
}
