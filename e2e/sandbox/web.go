package sandbox

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
)

// WebCA is the file of the throwaway authority that vouches for the issuer's certificate:
// what a client without SPIFFE verifies it with.
func (s *Sandbox) WebCA() string { return filepath.Join(s.Dir, "web", "ca.pem") }

func (s *Sandbox) webCertificate() (cert, key string) {
	return filepath.Join(s.Dir, "web", "cert.pem"), filepath.Join(s.Dir, "web", "key.pem")
}

// makeWebCertificate makes the authority and its one certificate, for loopback.
func (s *Sandbox) makeWebCertificate() error {
	if err := os.MkdirAll(filepath.Join(s.Dir, "web"), 0o700); err != nil {
		return err
	}
	now := time.Now()
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "dayfly dev"}, NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(1, 0, 0),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true,
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "localhost"}, NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	leafKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	if err != nil {
		return err
	}
	leafDER, err := x509.CreateCertificate(rand.Reader, leaf, ca, leafKey.Public(), caKey)
	if err != nil {
		return err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(leafKey)
	if err != nil {
		return err
	}
	cert, key := s.webCertificate()
	return errors.Join(writePEM(s.WebCA(), "CERTIFICATE", caDER), writePEM(cert, "CERTIFICATE", leafDER), writePEM(key, "PRIVATE KEY", keyDER))
}

func writePEM(path, kind string, der []byte) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

// HTTP returns a client of the issuer that knows its authority and shows the identity's
// SVID; with the zero ID it shows none.
func (s *Sandbox) HTTP(ctx context.Context, id spiffeid.ID) (*http.Client, error) {
	ca, err := os.ReadFile(s.WebCA())
	if err != nil {
		return nil, err
	}
	cfg := &tls.Config{RootCAs: x509.NewCertPool()}
	if !cfg.RootCAs.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("%s holds no certificate", s.WebCA())
	}
	if !id.IsZero() {
		src, err := s.Source(ctx, id)
		if err != nil {
			return nil, err
		}
		cfg.GetClientCertificate = tlsconfig.GetClientCertificate(src)
	}
	transport := &http.Transport{TLSClientConfig: cfg, ForceAttemptHTTP2: true}
	s.closers = append(s.closers, transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: time.Minute}, nil
}

// SVIDFiles writes an identity's SVIDs for clients that read files, and returns the folder:
// svid.pem, key.pem and bundle.pem, and in jwt-svid a JWT-SVID for the issuer. They expire:
// call it again.
func (s *Sandbox) SVIDFiles(id spiffeid.ID) (string, error) {
	dir := filepath.Join(s.Dir, "svids", filepath.Base(id.Path()))
	if err := s.TD.WritePEM(dir, id); err != nil {
		return "", err
	}
	jwt, err := s.TD.IssueJWTSVID(id, []string{s.Issuer}, spiffetest.SVIDOptions{})
	if err != nil {
		return "", err
	}
	// Replaced whole: somebody may be reading it.
	next := filepath.Join(dir, "jwt-svid.next")
	if err := os.WriteFile(next, []byte(jwt), 0o600); err != nil {
		return "", err
	}
	return dir, os.Rename(next, filepath.Join(dir, "jwt-svid"))
}

// freePort finds a loopback address that nobody listens on. The issuer must name its port
// before the broker takes it, so it is one that the kernel gives to nobody who asks for
// any: on Linux those begin at 32768.
func freePort() (string, error) {
	for range 100 {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 10000+mathrand.IntN(20000)))
		if err != nil {
			continue
		}
		return l.Addr().String(), l.Close()
	}
	return "", errors.New("finding a free port: a hundred were taken")
}
