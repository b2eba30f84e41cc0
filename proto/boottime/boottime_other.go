//go:build !linux

package boottime

import (
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
)

// Now reads the wall clock: other systems have no such clock in Go, and one that
// stops during suspend would call a resumed machine fresh. A wall clock set back does
// so too: on such systems that is a stated limit.
func Now() feed.Instant { return feed.Instant(time.Now().UnixNano()) }
