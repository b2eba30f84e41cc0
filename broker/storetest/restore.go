package storetest

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/feed"
)

// Log returns what the store says of its log, as whoever reads a file finds it.
func (m *Mem) Log() *broker.LogCopy {
	d := m.d
	d.mu.Lock()
	defer d.mu.Unlock()
	c := &broker.LogCopy{Head: d.head, Horizon: d.horizon}
	for _, e := range d.log {
		if e.dropped {
			c.Dropped = append(c.Dropped, e.at)
		} else {
			c.Records = append(c.Records, cloneRecord(e.record))
		}
	}
	for _, k := range slices.Sorted(maps.Keys(d.observed)) {
		if strings.HasPrefix(k, broker.RosterPrefix) {
			c.Verifiers = append(c.Verifiers, broker.Observation{Key: k, Value: d.observed[k]})
		}
	}
	return c
}

// Restore returns another store, in a new era, with the contents of this one, which is
// the backup: as boltstore.Restore makes a file.
func (m *Mem) Restore(r *broker.Restoration) (*Mem, error) {
	out := m.Clone()
	d := out.d
	if d.head != r.Backup {
		return nil, fmt.Errorf("the backup's head is %s, and was %s", d.head, r.Backup)
	}
	d.log = slices.DeleteFunc(d.log, func(e memEntry) bool { return e.dropped || e.record.Key != nil })
	d.head, d.horizon = r.Behind, feed.Position{}
	for i, rec := range r.Records {
		if _, err := d.append(rec); err != nil {
			return nil, err
		}
		if i == 0 {
			d.horizon = d.head
		}
	}
	for _, o := range r.Verifiers {
		d.observed[o.Key] = o.Value
	}
	return out, nil
}
