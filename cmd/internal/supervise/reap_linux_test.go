package supervise

import (
	"os/exec"
	"strings"
	"testing"
)

// The reaper takes nobody's exit code who waits for it, however they race, and buries what
// nobody waits for.
func TestReaperLeavesOwn(t *testing.T) {
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				reapOrphans()
			}
		}
	}()
	for range 100 {
		if err := RunOwn(exec.Command("sh", "-c", "exit 3")); err == nil || err.Error() != "exit status 3" {
			t.Errorf("got %v", err)
			break
		}
	}
	close(stop)
	<-done
	orphan := exec.Command("true")
	if err := orphan.Start(); err != nil { // nobody's here
		t.Fatal(err)
	}
	for firstDead() != orphan.Process.Pid {
	}
	reapOrphans()
	if err := orphan.Wait(); err == nil || !strings.Contains(err.Error(), "no child processes") {
		t.Errorf("it wasn't buried: %v", err)
	}
}
