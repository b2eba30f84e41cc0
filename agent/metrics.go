package agent

import (
	"fmt"
	"io"
	"sync/atomic"
)

// counters is what the agent counts.
type counters struct {
	hits, misses, fetches, failures, dropped atomic.Uint64 // credentials
	events, reconnects, relayed              atomic.Uint64 // feed
}

// WriteMetrics writes the agent's metrics in the text format of Prometheus. They hold
// no identity and no credential.
func (a *Agent) WriteMetrics(w io.Writer) error {
	c, files := &a.counts, &a.files.Counts
	for _, m := range []struct {
		name, kind, help string
		value            uint64
	}{
		{"dayfly_agent_cache_hits_total", "counter", "Requests for a credential that was known here.", c.hits.Load()},
		{"dayfly_agent_cache_misses_total", "counter", "Requests for a credential that was not.", c.misses.Load()},
		{"dayfly_agent_fetches_total", "counter", "Calls to the broker for a credential.", c.fetches.Load()},
		{"dayfly_agent_fetch_failures_total", "counter", "Those that failed.", c.failures.Load()},
		{"dayfly_agent_dropped_total", "counter", "Credentials dropped because they were revoked or their certificate rotated.", c.dropped.Load()},
		{"dayfly_agent_credentials", "gauge", "Different credentials kept.", uint64(a.cache.len())},
		{"dayfly_agent_files", "gauge", "Files and folders of files to deliver.", uint64(len(a.cfg.Files))},
		{"dayfly_agent_files_present", "gauge", "Those that are on disk.", a.present()},
		{"dayfly_agent_files_failing", "gauge", "Those that can't be written or removed, or whose program can't be told.", a.failing()},
		{"dayfly_agent_file_writes_total", "counter", "Times that one was written.", files.Written.Load()},
		{"dayfly_agent_file_write_failures_total", "counter", "Times that one could not be written.", files.WriteFailures.Load()},
		{"dayfly_agent_file_removals_total", "counter", "Times that one was removed because its credential had died.", files.Removed.Load()},
		{"dayfly_agent_file_changes_total", "counter", "Times that a program was told of a change.", files.Told.Load()},
		{"dayfly_agent_file_change_failures_total", "counter", "Those that failed.", files.TellFailures.Load()},
		{"dayfly_agent_feed_events_total", "counter", "Records received.", c.events.Load()},
		{"dayfly_agent_feed_reconnects_total", "counter", "Streams to the broker that ended.", c.reconnects.Load()},
		{"dayfly_agent_relay_messages_total", "counter", "Messages sent to verifiers.", c.relayed.Load()},
		{"dayfly_agent_relay_verifiers", "gauge", "Verifiers that learn from here, those gone and not yet closed included.", uint64(a.k.len())},
		{"dayfly_agent_ready", "gauge", "1 if ready.", ready(a.Status())},
	} {
		if _, err := fmt.Fprintf(w, "# HELP %s %s\n# TYPE %s %s\n%s %d\n", m.name, m.help, m.name, m.kind, m.name, m.value); err != nil {
			return err
		}
	}
	age, known := a.k.age()
	if !known {
		return nil
	}
	const name = "dayfly_agent_feed_age_seconds"
	_, err := fmt.Fprintf(w, "# HELP %s How old the newest proof is.\n# TYPE %s gauge\n%s %g\n", name, name, name, age.Seconds())
	return err
}

func ready(s Status) uint64 {
	if s.Ready {
		return 1
	}
	return 0
}

func (k *knowledge) len() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.relay.Len()
}
