package agent

import (
	"fmt"

	"github.com/dayflyhq/dayfly/proto/feed"
	"golang.org/x/sys/unix"
)

// bootTime reads the clock that runs through suspend.
func bootTime() feed.Instant {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(fmt.Sprintf("internal error: reading CLOCK_BOOTTIME: %v", err)) // since Linux 2.6.39
	}
	return feed.Instant(ts.Nano())
}
