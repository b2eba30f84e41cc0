package broker_test

import (
	"strconv"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
)

// Answers go by age: the oldest for a new one where there is no more room, and all when
// their window is over.
func TestRetriesGoByAge(t *testing.T) {
	enter, n := broker.NewRetries()
	now := time.Now()
	for i := range broker.MaxRetries + 1 {
		if !enter(strconv.Itoa(i), now) {
			t.Fatalf("%d was there", i)
		}
	}
	if n() != broker.MaxRetries {
		t.Errorf("%d are kept, want %d", n(), broker.MaxRetries)
	}
	if enter("1", now) || enter(strconv.Itoa(broker.MaxRetries), now) {
		t.Error("one that there was room for is gone")
	}
	if !enter("0", now) {
		t.Error("the oldest is still there")
	}
	if enter("2", now) || !enter("1", now) {
		t.Error("another than the oldest has gone")
	}
	if !enter("new", now.Add(broker.RetryWindow)) || n() != 1 {
		t.Errorf("%d are kept a window later, want 1", n())
	}
}
