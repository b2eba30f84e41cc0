package brokerd

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/dayflyhq/dayfly/broker"
	"gopkg.in/natefinch/lumberjack.v2"
)

// auditLog writes one JSON object a line to a file that is rotated at 100 MiB, ten
// old ones kept, all of them 0600.
type auditLog struct {
	mu  sync.Mutex
	out io.Writer
	end io.Closer
}

func openAudit(path string, stderr io.Writer) (*auditLog, error) {
	if path == "-" {
		return &auditLog{out: stderr, end: io.NopCloser(nil)}, nil
	}
	// Find out now, not at the first decision, and make the file ours: the rotation
	// keeps its mode.
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the audit: %w", err)
	}
	if err := f.Close(); err != nil {
		return nil, fmt.Errorf("opening the audit: %w", err)
	}
	l := &lumberjack.Logger{Filename: path, MaxSize: 100, MaxBackups: 10}
	return &auditLog{out: l, end: l}, nil
}

func (a *auditLog) write(e broker.AuditEntry) error {
	line, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("encoding an audit record: %w", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	_, err = a.out.Write(append(line, '\n'))
	return err
}

func (a *auditLog) close() error { return a.end.Close() }
