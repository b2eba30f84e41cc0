package agentd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/dayflyhq/dayfly/agent"
	"golang.org/x/sync/errgroup"
)

// daemon is the whole process at work.
type daemon struct {
	load       func() (*Config, error) // reads the configuration anew
	level      *slog.LevelVar
	log        *slog.Logger
	identities *agent.Identities
	shelf      *shelf
	group      *errgroup.Group
	ctx        context.Context // of the group

	mu      sync.Mutex
	cfg     *Config
	running []*workload
	reloads reloads
}

// serve runs everything until ctx ends or a part of it fails. Each element of hup makes it
// read its configuration anew. beside, if there is one, runs with the only workload, and all
// of it ends with beside.
func serve(ctx context.Context, cfg *Config, load func() (*Config, error), hup <-chan os.Signal, stderr io.Writer, beside func(context.Context, *agent.Agent, *slog.Logger) error) error {
	d := &daemon{load: load, level: new(slog.LevelVar), cfg: cfg, shelf: newShelf()}
	d.level.Set(cfg.Log.Level)
	d.log = newLog(cfg.Log, d.level, stderr)
	d.identities = agent.NewIdentities(cfg.WorkloadAPI, d.log)
	d.reloads.began = time.Now()
	fresh, err := d.open(cfg, cfg.all())
	if err != nil {
		return err
	}
	var metrics net.Listener
	if cfg.Metrics.IsValid() {
		if metrics, err = net.Listen("tcp", cfg.Metrics.String()); err != nil {
			return errors.Join(fmt.Errorf("listening for metrics: %w", err), abandon(fresh))
		}
	}
	d.group, d.ctx = errgroup.WithContext(ctx)
	d.group.Go(func() error { return d.identities.Run(d.ctx) })
	d.mu.Lock()
	d.running = fresh
	for _, w := range fresh {
		d.start(w)
	}
	d.mu.Unlock()
	if metrics != nil {
		d.group.Go(func() error { return d.serveMetrics(metrics) })
	}
	d.group.Go(func() error { d.obey(hup); return nil })
	if beside != nil {
		d.group.Go(func() error { return beside(d.ctx, fresh[0].agent, d.log) })
	}
	return d.group.Wait()
}

// open makes workloads, all or none.
func (d *daemon) open(cfg *Config, all []placed) ([]*workload, error) {
	var out []*workload
	for _, one := range all {
		w, err := d.newWorkload(cfg, one.Workload)
		if err != nil {
			return nil, errors.Join(err, abandon(out))
		}
		out = append(out, w)
	}
	return out, nil
}

func abandon(all []*workload) error {
	var errs []error
	for _, w := range all {
		errs = append(errs, w.abandon())
	}
	return errors.Join(errs...)
}

// start lets a workload run. If it ends by itself, the process does.
func (d *daemon) start(w *workload) {
	ctx, cancel := context.WithCancel(d.ctx)
	w.cancel = cancel
	d.group.Go(func() error {
		defer cancel()
		return w.run(ctx)
	})
}

// stop ends workloads and waits for them.
func stop(all []*workload) {
	for _, w := range all {
		w.cancel()
	}
	for _, w := range all {
		<-w.done
	}
}

// workloads lists those that run.
func (d *daemon) workloads() (all []*workload, several bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.running, d.cfg.several()
}

func newLog(cfg Log, level slog.Leveler, w io.Writer) *slog.Logger {
	options := &slog.HandlerOptions{Level: level, ReplaceAttr: durations}
	if cfg.Format == "text" {
		return slog.New(agent.QuietLog(slog.NewTextHandler(w, options)))
	}
	return slog.New(agent.QuietLog(slog.NewJSONHandler(w, options)))
}

// durations writes how long something takes as people do, 57s, where JSON has nanoseconds.
func durations(_ []string, at slog.Attr) slog.Attr {
	if at.Value.Kind() == slog.KindDuration {
		at.Value = slog.StringValue(at.Value.Duration().Round(time.Millisecond).String())
	}
	return at
}

// serveMetrics answers GET /metrics until the group's context ends.
func (d *daemon) serveMetrics(l net.Listener) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		_ = agent.WriteMetrics(w, d.metrics()...) // to one who has gone, perhaps
	})
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second, MaxHeaderBytes: 16 << 10}
	stop := context.AfterFunc(d.ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving metrics: %w", err)
	}
	return nil
}

// metrics is the one place where those of several workloads meet: with a label that says
// whose a sample is, where there are several.
func (d *daemon) metrics() []agent.Metrics {
	all, several := d.workloads()
	out := []agent.Metrics{d.reloads.metrics()}
	for _, w := range all {
		m := w.agent.Metrics()
		if several {
			m = m.With("workload", w.name)
		}
		out = append(out, m)
	}
	return out
}
