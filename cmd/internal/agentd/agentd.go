// Package agentd wires the agent: configuration file and flags in, a running agent out.
// cmd/dayfly-agent is its main, and a hidden subcommand of cmd/dayfly runs the same, so
// that the demo can start and kill real agents.
package agentd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/cmd/internal/config"
	"github.com/dayflyhq/dayfly/cmd/internal/supervise"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
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
			"what is revoked at once and relays the feed to verifiers beside it.\n\n" +
			"Exit codes: 0 it was told to stop, 1 it failed, 2 the command line or the configuration is wrong.",
		Example: "  dayfly-agent --config /etc/dayfly/agent.yaml\n" +
			"  dayfly-agent --broker broker:8443 --broker-id spiffe://example.org/dayfly/broker \\\n" +
			"    --grpc-socket /run/dayfly/agent.sock --prefetch orders=orders:read",
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := f.load(cmd)
			if err != nil {
				return config.UsageError{Err: err}
			}
			return serve(cmd.Context(), cfg, cmd.ErrOrStderr(), nil)
		},
	}
	f.add(cmd)
	cmd.AddCommand(execCommand())
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
		"metrics":       func() (err error) { cfg.Metrics, err = netip.ParseAddrPort(f.metrics); return err },
		"log-level":     func() error { return cfg.Log.Level.UnmarshalText([]byte(f.level)) },
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

// serve runs everything until ctx ends or a part of it fails. beside, if there is one, runs
// with it, and all of it ends with beside.
func serve(ctx context.Context, cfg *Config, stderr io.Writer, beside func(context.Context, *agent.Agent) error) error {
	log := newLog(cfg.Log, stderr)
	identity := agent.NewIdentity(cfg.WorkloadAPI, log)
	client, err := sdk.New(sdk.Config{Address: cfg.Broker.Address, Source: identity, BrokerID: cfg.Broker.ID})
	if err != nil {
		return err
	}
	defer client.Close()
	above, err := upstream(cfg, identity)
	if err != nil {
		return err
	}
	if above != nil {
		defer above.Close()
	}
	allow, err := cfg.Feed.Relay.selectors()
	if err != nil {
		return err
	}
	listeners, err := listen(cfg)
	if err != nil {
		return err
	}
	agentCfg := agent.Config{
		Upstream: client.Conn(), Source: identity, Changed: identity.Changed,
		GRPC: listeners.grpc, HTTP: listeners.http, AllowedUIDs: cfg.Sockets.AllowedUIDs,
		Prefetch: cfg.requests(), Files: cfg.targets(), NoFeed: !cfg.Feed.Follow, MaxStaleness: cfg.Feed.MaxStaleness,
		Audiences: cfg.Feed.Audiences, MaxStreams: cfg.Feed.MaxStreams, Log: log,
		BrokerID: cfg.Broker.ID, Bundles: identity, Relay: listeners.relay, RelayAllow: allow,
		AWS: cfg.AWS.agent(listeners.aws), Systemd: cfg.Systemd.agent(listeners.systemd), Run: supervise.RunOwn,
	}
	if above != nil {
		agentCfg.Feed = above.Conn()
	}
	a, err := agent.New(agentCfg)
	if err != nil {
		return errors.Join(err, listeners.close())
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return identity.Run(ctx) })
	group.Go(func() error { return a.Run(ctx) })
	if listeners.metrics != nil {
		group.Go(func() error { return serveMetrics(ctx, a, listeners.metrics) })
	}
	if beside != nil {
		group.Go(func() error { return beside(ctx, a) })
	}
	return group.Wait()
}

// upstream is the client of a relay on another host, nil where the broker is followed.
func upstream(cfg *Config, identity *agent.Identity) (*sdk.Client, error) {
	if cfg.Feed.Upstream.Address == "" {
		return nil, nil
	}
	client, err := sdk.New(sdk.Config{Address: cfg.Feed.Upstream.Address, Source: identity, BrokerID: cfg.Feed.Upstream.ID})
	if err != nil {
		return nil, fmt.Errorf("feed.upstream: %w", err)
	}
	return client, nil
}

func newLog(cfg Log, w io.Writer) *slog.Logger {
	options := &slog.HandlerOptions{Level: cfg.Level}
	if cfg.Format == "text" {
		return slog.New(slog.NewTextHandler(w, options))
	}
	return slog.New(slog.NewJSONHandler(w, options))
}

// listeners are all that the process listens on; nil for what isn't configured.
type listeners struct{ grpc, http, relay, metrics, aws, systemd net.Listener }

func listen(cfg *Config) (_ listeners, err error) {
	var l listeners
	defer func() {
		if err != nil {
			err = errors.Join(err, l.close())
		}
	}()
	if l.grpc, err = listenUnix(cfg, cfg.Sockets.GRPC); err != nil {
		return listeners{}, err
	}
	if l.http, err = listenUnix(cfg, cfg.Sockets.HTTP); err != nil {
		return listeners{}, err
	}
	if cfg.Feed.Relay.Listen != "" {
		if l.relay, err = net.Listen("tcp", cfg.Feed.Relay.Listen); err != nil {
			return listeners{}, fmt.Errorf("listening for verifiers on other hosts: %w", err)
		}
	}
	if cfg.AWS.Listen.IsValid() {
		if l.aws, err = net.Listen("tcp", cfg.AWS.Listen.String()); err != nil {
			return listeners{}, fmt.Errorf("listening for AWS's SDKs: %w", err)
		}
	}
	if cfg.Systemd.Socket != "" {
		if l.systemd, err = agent.Listen(agent.SocketConfig{Path: cfg.Systemd.Socket}); err != nil {
			return listeners{}, err
		}
	}
	if cfg.Metrics.IsValid() {
		if l.metrics, err = net.Listen("tcp", cfg.Metrics.String()); err != nil {
			return listeners{}, fmt.Errorf("listening for metrics: %w", err)
		}
	}
	return l, nil
}

func listenUnix(cfg *Config, path string) (net.Listener, error) {
	if path == "" {
		return nil, nil
	}
	socket, err := cfg.Sockets.socket(path)
	if err != nil {
		return nil, err
	}
	return agent.Listen(socket)
}

func (l *listeners) close() error {
	var errs []error
	for _, one := range []net.Listener{l.grpc, l.http, l.relay, l.metrics, l.aws, l.systemd} {
		if one != nil {
			errs = append(errs, one.Close())
		}
	}
	return errors.Join(errs...)
}

// serveMetrics answers GET /metrics until ctx ends.
func serveMetrics(ctx context.Context, a *agent.Agent, l net.Listener) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		_ = a.WriteMetrics(w) // to one who has gone, perhaps
	})
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second, MaxHeaderBytes: 16 << 10}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving metrics: %w", err)
	}
	return nil
}
