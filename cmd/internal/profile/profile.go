// Package profile shows a daemon's CPU, allocation, block and mutex profiles on a unix
// socket, for make profile. No command that is built without the tag "profile" has it in
// its binary: what isn't there can't be reached (TestImports).
package profile

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"path/filepath"
	"runtime"
	"time"
)

// DirVariable names the environment variable with the folder for the socket.
const DirVariable = "DAYFLY_PROFILE_DIR"

// How much is sampled of what blocks: enough to name causes, at little cost.
const (
	blockRate     = 100_000 // ns blocked for each sample
	mutexFraction = 50
)

// Start serves the profiles on DIR/<name>-<pid>.sock, of mode 0600, where DIR is the value
// of DirVariable. Without one it does nothing. It serves until the process ends.
func Start(name string) error {
	dir := os.Getenv(DirVariable)
	if dir == "" {
		return nil
	}
	path := filepath.Join(dir, fmt.Sprintf("%s-%d.sock", name, os.Getpid()))
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return fmt.Errorf("listening for profiles: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return errors.Join(err, l.Close())
	}
	runtime.SetBlockProfileRate(blockRate)
	runtime.SetMutexProfileFraction(mutexFraction)
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	go func() { _ = server.Serve(l) }() // ends with the process
	return nil
}
