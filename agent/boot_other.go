//go:build !linux

package agent

import (
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
)

// bootTime is the monotonic clock of Go, which may stand still while the machine
// sleeps: a relay that was suspended may say too small an age. docs/agent.md states
// this limit.
func bootTime() feed.Instant { return feed.Instant(time.Since(started)) }

var started = time.Now()
