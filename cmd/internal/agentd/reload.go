package agentd

import (
	"errors"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/dayflyhq/dayfly/agent"
)

// reloads is how reading the configuration anew went.
type reloads struct {
	mu           sync.Mutex
	began        time.Time // when what is in force was read
	failedSince  time.Time // zero: the last time went well
	good, failed float64
}

// state is for those who ask the agent how it is. What was wrong is in the log: it may be
// about another workload than theirs.
func (r *reloads) state() agent.ConfigurationInfo {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := agent.ConfigurationInfo{ReadAt: r.began.UTC().Truncate(time.Second)}
	if !r.failedSince.IsZero() {
		since := r.failedSince.UTC().Truncate(time.Second)
		out.ReloadFailedSince = &since
	}
	return out
}

func (r *reloads) ended(err error, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case err == nil:
		r.good++
		r.began, r.failedSince = now, time.Time{}
	case r.failedSince.IsZero():
		r.failedSince = now
		fallthrough
	default:
		r.failed++
	}
}

func (r *reloads) metrics() agent.Metrics {
	r.mu.Lock()
	defer r.mu.Unlock()
	successful := 1.0
	if !r.failedSince.IsZero() {
		successful = 0
	}
	return agent.Metrics{
		{Name: "dayfly_agent_config_last_reload_successful", Kind: "gauge", Help: "0 if the configuration could not be read anew the last time that it was told to be.", Samples: []agent.Sample{{Value: successful}}},
		{Name: "dayfly_agent_config_loaded_timestamp_seconds", Kind: "gauge", Help: "When the configuration that is in force was read.", Samples: []agent.Sample{{Value: float64(r.began.Unix())}}},
		{Name: "dayfly_agent_config_reloads_total", Kind: "counter", Help: "Times that the configuration was read anew, by outcome.", Samples: []agent.Sample{
			{Labels: []agent.Label{{Name: "outcome", Value: "ok"}}, Value: r.good},
			{Labels: []agent.Label{{Name: "outcome", Value: "failed"}}, Value: r.failed},
		}},
	}
}

// obey reads the configuration anew with each signal.
func (d *daemon) obey(hup <-chan os.Signal) {
	for {
		select {
		case <-d.ctx.Done():
			return
		case <-hup:
		}
		changed, err := d.reload()
		d.reloads.ended(err, time.Now())
		switch {
		case err != nil:
			d.loud.ErrorContext(d.ctx, "the configuration was not reloaded: what was in force still is", "error", err)
		default:
			d.loud.InfoContext(d.ctx, "the configuration was reloaded", "changed", changed)
		}
	}
}

// reload puts the configuration in force as it is on disk now, and says what has changed.
// After an error nothing has.
func (d *daemon) reload() (changed []string, err error) {
	next, err := d.load()
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.needsRestart(next); err != nil {
		return nil, err
	}
	p := d.plan(next)
	fresh, err := d.open(next, p.fresh)
	if err != nil {
		return nil, err
	}
	err = d.try(fresh)
	if err == nil {
		err = p.apply(next)
	}
	if err != nil {
		return nil, errors.Join(err, abandon(fresh))
	}
	d.level.Set(next.Log.Level)
	stop(p.gone)
	for _, w := range fresh {
		d.start(w)
	}
	d.cfg, d.running = next, slices.Concat(p.kept, fresh)
	return p.changed, nil
}

// try sees that what is new can run, before anything ends for it.
func (d *daemon) try(fresh []*workload) error {
	var taken []string
	for _, w := range d.running {
		for _, t := range w.w.targets() {
			taken = append(taken, t.Path)
		}
	}
	var errs []error
	for _, w := range fresh {
		errs = append(errs, ofWorkload(w.cfg, w.name, w.agent.Try(taken)))
	}
	return errors.Join(errs...)
}

// needsRestart refuses what everything else depends on.
func (d *daemon) needsRestart(next *Config) error {
	var errs []error
	for key, same := range map[string]bool{
		"broker":       next.Broker == d.cfg.Broker,
		"workload_api": next.WorkloadAPI == d.cfg.WorkloadAPI,
		"metrics":      next.Metrics == d.cfg.Metrics,
		"log.format":   next.Log.Format == d.cfg.Log.Format,
	} {
		if !same {
			errs = append(errs, fmt.Errorf("%s: has changed, which needs a restart of the agent", key))
		}
	}
	return errors.Join(errs...)
}

// plan is what a reload does.
type plan struct {
	kept    []*workload             // they go on, with other settings perhaps
	to      map[*workload]*Workload // and these are those
	gone    []*workload
	fresh   []placed
	changed []string
}

func (d *daemon) plan(next *Config) *plan {
	p := &plan{to: map[*workload]*Workload{}}
	if next.Log.Level != d.cfg.Log.Level {
		p.changed = append(p.changed, "log.level")
	}
	p.changed = append(p.changed, differing("feed.", d.cfg.Feed, next.Feed)...)
	gone := slices.Clone(d.running)
	for _, one := range next.all() {
		label := "workload " + one.name() + ": "
		i := slices.IndexFunc(gone, func(w *workload) bool { return w.name == one.name() })
		if i < 0 {
			p.fresh, p.changed = append(p.fresh, one), append(p.changed, label+"started")
			continue
		}
		w := gone[i]
		keys := differing("", *w.w, *one.Workload)
		if !reflect.DeepEqual(fixed(w.cfg, w.w), fixed(next, one.Workload)) {
			p.fresh, p.changed = append(p.fresh, one), append(p.changed, label+strings.Join(append(keys, "started anew"), ", "))
			continue // the old one stays in gone
		}
		if len(keys) > 0 {
			p.changed = append(p.changed, label+strings.Join(keys, ", "))
		}
		p.kept, p.to[w] = append(p.kept, w), one.Workload
		gone = slices.Delete(gone, i, i+1)
	}
	p.gone = gone
	for _, w := range gone {
		if !slices.ContainsFunc(p.fresh, func(one placed) bool { return one.name() == w.name }) {
			p.changed = append(p.changed, "workload "+w.name+": stopped")
		}
	}
	return p
}

// apply gives those that go on their new settings, all or none.
func (p *plan) apply(next *Config) error {
	for i, w := range p.kept {
		err := w.agent.Apply(p.to[w].settings(next))
		if err == nil {
			continue
		}
		errs := []error{ofWorkload(next, w.name, err)}
		for _, before := range p.kept[:i] {
			errs = append(errs, before.agent.Apply(before.w.settings(before.cfg)))
		}
		return errors.Join(errs...)
	}
	for _, w := range p.kept {
		w.cfg, w.w = next, p.to[w]
	}
	return nil
}

// fixed is what can't change in a workload that goes on.
func fixed(cfg *Config, w *Workload) any {
	own, feed := *w, cfg.Feed
	own.Prefetch, own.Files, own.Directories = nil, nil, nil
	own.Sockets.Callers = Callers{}
	feed.MaxStaleness, feed.Relay = 0, cfg.relayOf(w)
	return struct {
		Workload
		Feed
		several bool
	}{own, feed, cfg.several()}
}

// differing lists the keys of a struct that have changed.
func differing(prefix string, a, b any) []string {
	var out []string
	x, y := reflect.ValueOf(a), reflect.ValueOf(b)
	for i := range x.NumField() {
		if !reflect.DeepEqual(x.Field(i).Interface(), y.Field(i).Interface()) {
			key, _, _ := strings.Cut(x.Type().Field(i).Tag.Get("yaml"), ",")
			out = append(out, prefix+key)
		}
	}
	return out
}
