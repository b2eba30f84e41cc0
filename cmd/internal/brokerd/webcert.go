package brokerd

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// webCertificateEvery is how often the files of the web certificate are looked at.
const webCertificateEvery = 5 * time.Second

// webCertificate is a certificate in files, which others renew. The last good one is kept
// while they don't hold one: they are replaced one after the other.
type webCertificate struct {
	certFile, keyFile string
	log               *slog.Logger

	mu      sync.Mutex
	read    [2][]byte // what the files held at the last look
	current *tls.Certificate
	err     error // of the last look
}

// newWebCertificate reads the files, which must hold a pair.
func newWebCertificate(certFile, keyFile string, log *slog.Logger) (*webCertificate, error) {
	c := &webCertificate{certFile: certFile, keyFile: keyFile, log: log}
	if err := c.look(); err != nil {
		return nil, err
	}
	return c, nil
}

// look reads the files again.
func (c *webCertificate) look() error {
	cert, err := os.ReadFile(c.certFile)
	if err != nil {
		return c.note(nil, fmt.Errorf("reading the web certificate: %w", err))
	}
	key, err := os.ReadFile(c.keyFile)
	if err != nil {
		return c.note(nil, fmt.Errorf("reading the web certificate's key: %w", err))
	}
	c.mu.Lock()
	same := c.current != nil && c.err == nil && bytes.Equal(cert, c.read[0]) && bytes.Equal(key, c.read[1])
	c.read = [2][]byte{cert, key}
	c.mu.Unlock()
	if same {
		return nil
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return c.note(nil, fmt.Errorf("the web certificate %s and its key %s: %w", c.certFile, c.keyFile, err))
	}
	return c.note(&pair, nil)
}

// note keeps what a look found, and says in the log what is new.
func (c *webCertificate) note(pair *tls.Certificate, err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	first := c.current == nil
	switch {
	case pair != nil:
		c.current = pair
		if !first {
			c.log.Info("the web certificate was replaced", "not_after", pair.Leaf.NotAfter)
		}
	case c.err == nil && !first:
		c.log.Warn("the web certificate can't be read; the last good one is kept", "err", err)
	}
	c.err = err
	return err
}

// run looks at the files until ctx ends.
func (c *webCertificate) run(ctx context.Context, every time.Duration) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			_ = c.look() // kept, logged, and told by readiness
		case <-ctx.Done():
			return nil
		}
	}
}

// get is a tls.Config's GetCertificate.
func (c *webCertificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.current, nil
}

// problem says what an operator should know; "": nothing.
func (c *webCertificate) problem(now time.Time) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.err != nil:
		return fmt.Sprintf("the last good web certificate is kept: %v", c.err)
	case now.After(c.current.Leaf.NotAfter):
		return fmt.Sprintf("the web certificate has expired at %s", c.current.Leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	return ""
}
