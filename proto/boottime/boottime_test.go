package boottime_test

import (
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/proto/boottime"
)

func TestNowRunsForward(t *testing.T) {
	before := boottime.Now()
	timer := time.NewTimer(2 * time.Millisecond)
	<-timer.C
	if d := boottime.Now().Sub(before); d < time.Millisecond {
		t.Fatalf("2 ms of waiting measured as %s", d)
	}
}
