package agentd

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"time"
)

func TestLogWritesDurationsForPeople(t *testing.T) {
	for _, format := range []string{"json", "text"} {
		var out bytes.Buffer
		newLog(Log{Format: format}, slog.LevelInfo, &out).With("every", time.Minute).Info("renewing", "again_in", 613421970*time.Nanosecond)
		for _, want := range []string{"613ms", "1m0s"} {
			if !strings.Contains(out.String(), want) {
				t.Errorf("%s: %q is not in %s", format, want, out.String())
			}
		}
	}
}
