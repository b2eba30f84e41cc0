// Package agentd wires the agent: configuration file and flags in, a running agent out.
// cmd/dayfly-agent is its main, and a hidden subcommand of cmd/dayfly runs the same, so
// that the demo can start and kill real agents.
package agentd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/cmd/internal/config"
	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Run is the agent's command: it parses args (without the program's name) and serves
// until ctx ends. Logs go to stderr. A command line or a configuration that is wrong is a
// config.UsageError.
func Run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	cmd := Command()
	cmd.SetArgs(args)
	cmd.SetOut(stdout)
	cmd.SetErr(stderr)
	return config.Execute(ctx, cmd)
}

// flags are what may be said on the command line; they come on top of the file.
type flags struct {
	file         string
	broker       string
	brokerID     string
	workloadAPI  string
	grpc, http   string
	uids         []uint
	prefetch     []string
	maxStaleness time.Duration
	metrics      string
	level        string

	adjust func(*Config) // before the whole is checked; nil: as it stands
}

// Command is the agent as a cobra command.
func Command() *cobra.Command {
	var f flags
	cmd := &cobra.Command{
		Use:   "dayfly-agent",
		Short: "give a workload its credentials over unix sockets, and relay the feed",
		Long: "dayfly-agent is a sidecar: it takes its workload's SVID from the Workload API, keeps\n" +
			"short-lived credentials fresh in memory, and gives them out over unix sockets. It drops\n" +
			"what is revoked at once and relays the feed to verifiers beside it. At SIGHUP it\n" +
			"reads its configuration file anew, and goes on without dropping anything.\n\n" +
			"Exit codes: 0 it was told to stop, 1 it failed, 2 the command line or the configuration is wrong.",
		Example: "  dayfly-agent --config /etc/dayfly/agent.yaml\n" +
			"  dayfly-agent check --config /etc/dayfly/agent.yaml && systemctl reload dayfly-agent\n" +
			"  dayfly-agent status\n" +
			"  dayfly-agent --broker broker:8443 --broker-id spiffe://example.org/dayfly/broker \\\n" +
			"    --grpc-socket /run/dayfly/agent.sock --prefetch orders=orders.read",
		Version:       agent.Version(),
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			load := func() (*Config, error) { return f.load(cmd) }
			cfg, err := load()
			if err != nil {
				return config.UsageError{Err: err}
			}
			hup := make(chan os.Signal, 1)
			if f.file != "" { // else there is nothing to read anew, and SIGHUP ends the process as ever
				signal.Notify(hup, syscall.SIGHUP)
				defer signal.Stop(hup)
			}
			return serve(cmd.Context(), cfg, load, hup, cmd.ErrOrStderr(), nil)
		},
	}
	f.add(cmd)
	cmd.AddCommand(execCommand(), statusCommand(), checkCommand())
	return cmd
}

func (f *flags) add(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.StringVarP(&f.file, "config", "c", "", "configuration file (YAML); flags come on top of it")
	fs.StringVar(&f.broker, "broker", "", "host:port of the broker")
	fs.StringVar(&f.brokerID, "broker-id", "", "SPIFFE ID that the broker must prove")
	fs.StringVar(&f.workloadAPI, "workload-api", "", "socket of the Workload API (default $SPIFFE_ENDPOINT_SOCKET)")
	fs.StringVar(&f.grpc, "grpc-socket", "", "path of the socket for gRPC")
	fs.StringVar(&f.http, "http-socket", "", "path of the socket for HTTP")
	fs.UintSliceVar(&f.uids, "allow-uid", nil, "user that may call; repeatable (default whom the socket's mode lets connect)")
	fs.StringArrayVar(&f.prefetch, "prefetch", nil, "AUDIENCE or AUDIENCE=SCOPE,SCOPE to keep fresh; repeatable")
	fs.DurationVar(&f.maxStaleness, "max-staleness", 0, "how old the agent's knowledge of revocations may be")
	fs.StringVar(&f.metrics, "metrics", "", "loopback address for Prometheus metrics")
	fs.StringVar(&f.level, "log-level", "", "debug, info, warn or error")
}

// load reads the file, puts the flags on top and checks the whole.
func (f *flags) load(cmd *cobra.Command) (*Config, error) {
	cfg := defaults()
	var err error
	if f.file != "" {
		err = config.Load(f.file, &cfg)
	}
	if err := errors.Join(err, f.apply(cmd, &cfg)); err != nil {
		return nil, err
	}
	if f.adjust != nil {
		f.adjust(&cfg)
	}
	if err := cfg.complete(); err != nil {
		return nil, fmt.Errorf("the configuration is incomplete or wrong:\n%w", err)
	}
	return &cfg, nil
}

func (f *flags) apply(cmd *cobra.Command, cfg *Config) error {
	var errs []error
	for name, set := range map[string]func() error{
		"broker":       func() error { cfg.Broker.Address = f.broker; return nil },
		"broker-id":    func() (err error) { cfg.Broker.ID, err = spiffeid.FromString(f.brokerID); return err },
		"workload-api": func() error { cfg.WorkloadAPI = f.workloadAPI; return nil },
		"grpc-socket":  func() error { cfg.Sockets.GRPC = f.grpc; return nil },
		"http-socket":  func() error { cfg.Sockets.HTTP = f.http; return nil },
		"allow-uid": func() error {
			cfg.Sockets.AllowedUIDs = nil
			for _, uid := range f.uids {
				cfg.Sockets.AllowedUIDs = append(cfg.Sockets.AllowedUIDs, uint32(uid))
			}
			return nil
		},
		"prefetch": func() error {
			for _, p := range f.prefetch {
				audience, scopes, given := strings.Cut(p, "=")
				next := Prefetch{Audience: audience}
				if given {
					next.Scopes = strings.Split(scopes, ",")
				}
				cfg.Prefetch = append(cfg.Prefetch, next)
			}
			return nil
		},
		"max-staleness": func() error { cfg.Feed.MaxStaleness = f.maxStaleness; return nil },
		"metrics":       func() error { return config.SetText(f.metrics, &cfg.Metrics) },
		"log-level":     func() error { return config.SetText(f.level, &cfg.Log.Level) },
	} {
		if !cmd.Flags().Changed(name) {
			continue
		}
		if err := set(); err != nil {
			errs = append(errs, fmt.Errorf("--%s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

func checkCommand() *cobra.Command {
	var f flags
	cmd := &cobra.Command{
		Use:   "check",
		Short: "say whether a configuration is right, and start nothing",
		Long: "Reads the configuration file and the flags as a start or a reload would, and says all that\n" +
			"is wrong, with line numbers. It looks up users and groups on this host, and calls nobody.\n\n" +
			"Exit codes: 0 it is right, 2 it is wrong.",
		Example:       "  dayfly-agent check --config /etc/dayfly/agent.yaml",
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := f.load(cmd)
			if err != nil {
				return config.UsageError{Err: err}
			}
			names := make([]string, 0, len(cfg.all()))
			for _, w := range cfg.all() {
				names = append(names, w.name())
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "the configuration is right; workloads: %s\n", strings.Join(names, ", "))
			return err
		},
	}
	f.add(cmd)
	return cmd
}
