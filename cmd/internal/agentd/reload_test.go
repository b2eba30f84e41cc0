package agentd

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/dayflyhq/dayfly/agent"
)

// Each reload that fails is told of, also where the next mistake differs by a line's number
// only: who mended the first one must not believe that all is well.
func TestEachReloadIsToldOf(t *testing.T) {
	var out bytes.Buffer
	lines := []string{"agent.yaml:9: wrong", "agent.yaml:8: wrong"}
	d := &daemon{loud: newLog(Log{Format: "json"}, slog.LevelInfo, &out)}
	d.log = slog.New(agent.QuietLog(d.loud.Handler()))
	d.load = func() (*Config, error) {
		line := lines[0]
		lines = lines[1:]
		return nil, errors.New(line)
	}
	ctx, cancel := context.WithCancel(t.Context())
	d.ctx = ctx
	hup, done := make(chan os.Signal), make(chan struct{})
	go func() { defer close(done); d.obey(hup) }()
	hup <- syscall.SIGHUP
	hup <- syscall.SIGHUP
	cancel()
	<-done
	for _, want := range []string{"agent.yaml:9: wrong", "agent.yaml:8: wrong"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q isn't told of: %s", want, out.String())
		}
	}
}
