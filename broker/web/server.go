package web

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"
)

// Limits of both servers. All answers are small and made from memory, so a client
// that needs longer is broken or hostile.
const (
	readHeaderTimeout = 5 * time.Second
	readTimeout       = 10 * time.Second
	writeTimeout      = 30 * time.Second
	idleTimeout       = 60 * time.Second
	// maxHeaderBytes is net/http's bound on the request line and headers; it adds
	// 4 KiB of its own.
	maxHeaderBytes = 16 << 10
	// maxBodyBytes is the design's bound on a request.
	maxBodyBytes = 64 << 10
	// maxConnections bounds the connections of each server on which nobody has proved who
	// it is. What strangers read is cached for a minute; a full server closes the connection
	// that is open longest of the source that has the most.
	maxConnections = 1024
	// maxConcurrentStreams bounds the requests under way on one connection of HTTP/2. Each
	// may hold a body and headers before anybody has proved who it is, so that a stranger
	// costs this times 1,024 times some 100 KiB at most.
	maxConcurrentStreams = 8
	// shutdownTimeout is how long requests under way may take after ctx has ended.
	shutdownTimeout = 10 * time.Second
)

// ErrNotLoopback: an admin listener that others than this host could reach.
var ErrNotLoopback = errors.New("the admin listener must be on loopback or a unix socket")

// Serve answers on the listener until ctx ends, then lets requests under way finish,
// for at most 10 seconds. It owns the listener and has closed it when it returns. It
// returns nil after a shutdown in which everything finished. Log may be nil.
func Serve(ctx context.Context, ln net.Listener, handler http.Handler, log *slog.Logger) error {
	return ServeTLS(ctx, ln, nil, handler, log)
}

// ServeTLS is Serve over TLS: HTTP/1.1 and HTTP/2. A nil configuration is plain HTTP.
func ServeTLS(ctx context.Context, ln net.Listener, cfg *tls.Config, handler http.Handler, log *slog.Logger) error {
	d := newDoor()
	server := &http.Server{
		ConnState:         d.state,
		TLSConfig:         cfg,
		ConnContext:       d.welcome,
		Handler:           http.MaxBytesHandler(handler, maxBodyBytes),
		ReadHeaderTimeout: readHeaderTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: maxConcurrentStreams},
		ErrorLog:          slog.NewLogLogger(orDiscard(log).Handler(), slog.LevelWarn),
		// The end of ctx stops new requests; it doesn't cut off those under way.
		BaseContext: func(net.Listener) context.Context { return context.WithoutCancel(ctx) },
	}
	ended := make(chan error, 1)
	go func() {
		if cfg != nil {
			ended <- server.ServeTLS(ln, "", "")
		} else {
			ended <- server.Serve(ln)
		}
	}()
	select {
	case err := <-ended:
		_ = ln.Close()
		return fmt.Errorf("serving HTTP on %s: %w", ln.Addr(), err)
	case <-ctx.Done():
	}
	err := shutdown(context.WithoutCancel(ctx), server)
	<-ended
	if err != nil {
		return fmt.Errorf("shutting down HTTP on %s: %w", ln.Addr(), err)
	}
	return nil
}

func shutdown(ctx context.Context, server *http.Server) error {
	ctx, cancel := context.WithTimeout(ctx, shutdownTimeout)
	defer cancel()
	err := server.Shutdown(ctx)
	if err != nil {
		_ = server.Close() // what didn't finish in time is cut off
	}
	return err
}

// ServeAdmin is Serve for the admin handler. It closes a listener that isn't on
// loopback or a unix socket, and returns ErrNotLoopback.
func ServeAdmin(ctx context.Context, ln net.Listener, handler http.Handler, log *slog.Logger) error {
	if !local(ln.Addr()) {
		_ = ln.Close()
		return fmt.Errorf("serving HTTP on %s: %w", ln.Addr(), ErrNotLoopback)
	}
	return Serve(ctx, ln, handler, log)
}

func local(addr net.Addr) bool {
	switch a := addr.(type) {
	case *net.TCPAddr:
		return a.IP.IsLoopback()
	case *net.UnixAddr:
		return true
	}
	return false
}

func orDiscard(log *slog.Logger) *slog.Logger {
	if log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return log
}
