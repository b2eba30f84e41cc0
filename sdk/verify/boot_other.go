//go:build !linux

package verify

import (
	"time"

	"github.com/dayflyhq/dayfly/proto/feed"
)

// bootTime is the monotonic clock of Go, which may stand still while the machine
// sleeps: suspended, a verifier may believe itself fresher than it is. docs/verify.md
// states this limit.
func bootTime() feed.Instant { return feed.Instant(time.Since(started)) }

var started = time.Now()
