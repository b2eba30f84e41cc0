package brokerd

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// pair makes a certificate of a serial number, and its key.
func pair(t *testing.T, serial int64, notAfter time.Time) (cert, key []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), NotBefore: notAfter.Add(-time.Hour), NotAfter: notAfter}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
}

// The files are replaced one after the other, and sometimes hold nothing of use: the last
// good pair is served, and readiness says so.
func TestWebCertificateIsReloaded(t *testing.T) {
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert"), filepath.Join(dir, "key")
	write := func(path string, b []byte) {
		t.Helper()
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := newWebCertificate(certFile, keyFile, slog.New(slog.DiscardHandler)); err == nil {
		t.Fatal("began without files")
	}
	now := time.Now()
	cert1, key1 := pair(t, 1, now.Add(time.Hour))
	cert2, key2 := pair(t, 2, now.Add(2*time.Hour))
	write(certFile, cert1)
	write(keyFile, key2)
	if _, err := newWebCertificate(certFile, keyFile, slog.New(slog.DiscardHandler)); err == nil {
		t.Fatal("began with a key of another certificate")
	}
	write(keyFile, key1)
	var log bytes.Buffer
	c, err := newWebCertificate(certFile, keyFile, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	serves := func(serial int64, problem string) {
		t.Helper()
		got, err := c.get(nil)
		if err != nil || got.Leaf.SerialNumber.Int64() != serial {
			t.Fatalf("serves %v, %v, want number %d", got.Leaf.SerialNumber, err, serial)
		}
		if what := c.problem(now); (what == "") != (problem == "") || !strings.Contains(what, problem) {
			t.Errorf("the problem is %q, want %q", what, problem)
		}
	}
	serves(1, "")
	write(certFile, cert2) // the key comes a moment later
	for range 2 {
		if c.look() == nil {
			t.Error("a pair that isn't one is taken")
		}
		serves(1, "last good")
	}
	write(keyFile, key2)
	if err := c.look(); err != nil {
		t.Fatal(err)
	}
	serves(2, "")
	if err := os.Remove(keyFile); err != nil {
		t.Fatal(err)
	}
	if c.look() == nil {
		t.Error("no key, and no word of it")
	}
	serves(2, "last good")
	write(keyFile, key2) // the same again
	if err := c.look(); err != nil {
		t.Fatal(err)
	}
	serves(2, "")
	if what := c.problem(now.Add(3 * time.Hour)); !strings.Contains(what, "expired") {
		t.Errorf("after it expired: %q", what)
	}
	if n := strings.Count(log.String(), "last good one is kept"); n != 2 || strings.Count(log.String(), "was replaced") != 2 {
		t.Errorf("the log: %s", log.String())
	}
	if strings.Contains(log.String(), "PRIVATE") {
		t.Error("the log holds a key")
	}
}

// Nobody has to say that the files have changed.
func TestWebCertificateIsLookedAt(t *testing.T) {
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert"), filepath.Join(dir, "key")
	synctest.Test(t, func(t *testing.T) {
		write := func(serial int64) {
			cert, key := pair(t, serial, time.Now().Add(time.Hour))
			if err := errors.Join(os.WriteFile(certFile, cert, 0o600), os.WriteFile(keyFile, key, 0o600)); err != nil {
				t.Fatal(err)
			}
		}
		write(1)
		c, err := newWebCertificate(certFile, keyFile, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- c.run(ctx, webCertificateEvery) }()
		write(2)
		time.Sleep(webCertificateEvery)
		synctest.Wait()
		if got, _ := c.get(nil); got.Leaf.SerialNumber.Int64() != 2 {
			t.Errorf("serves number %v still", got.Leaf.SerialNumber)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
