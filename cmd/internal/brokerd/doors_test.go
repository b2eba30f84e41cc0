package brokerd_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/cmd/internal/brokerd"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
)

// webFiles writes a certificate for loopback that vouches for itself, and returns those
// who believe it.
func (h *house) webFiles() *x509.CertPool {
	h.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		h.t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		h.t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		h.t.Fatal(err)
	}
	h.cfg.Listen.HTTPSCertificate, h.cfg.Listen.HTTPSKey = filepath.Join(h.dir, "cert"), filepath.Join(h.dir, "key")
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	err = errors.Join(os.WriteFile(h.cfg.Listen.HTTPSCertificate, cert, 0o600), os.WriteFile(h.cfg.Listen.HTTPSKey, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600))
	if err != nil {
		h.t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(cert)
	return pool
}

// TestServeDoors: every listener gives tokens to whoever proves an identity in a way that
// it takes, and what each says of the others is so.
func TestServeDoors(t *testing.T) {
	h := newHouse(t)
	roots := h.webFiles()
	h.cfg.Listen.HTTPS, h.cfg.Listen.HTTPSSVID, h.cfg.Listen.GRPCJWT = "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0"
	h.cfg.GRPCJWTTrustDomains = []spiffeid.TrustDomain{domain}
	h.cfg.Listen.Admin = "127.0.0.1:0"
	h.cfg.MutualTLSURL = "https://broker-mtls.example.org:8445"
	h.writePolicy()
	h.giveSVID()
	s := h.serve()
	at := s.announced()
	svid, err := h.td.IssueSVID(reports, spiffetest.SVIDOptions{})
	if err != nil {
		t.Fatal(err)
	}
	assertion, err := h.td.IssueJWTSVID(reports, []string{h.cfg.Issuer}, spiffetest.SVIDOptions{})
	if err != nil {
		t.Fatal(err)
	}
	form := url.Values{"grant_type": {"client_credentials"}, "audience": {"orders"}}
	withJWT := url.Values{"client_assertion_type": {"urn:ietf:params:oauth:client-assertion-type:jwt-spiffe"}, "client_assertion": {assertion}}
	for k, v := range form {
		withJWT[k] = v
	}
	bySVID := tlsconfig.TLSClientConfig(h.td, tlsconfig.AuthorizeID(brokerID))
	mutual := tlsconfig.MTLSClientConfig(svid, h.td, tlsconfig.AuthorizeID(brokerID))
	byWeb := &tls.Config{RootCAs: roots}
	webMutual := &tls.Config{RootCAs: roots, GetClientCertificate: tlsconfig.GetClientCertificate(svid)}
	for name, c := range map[string]struct {
		base   string
		tls    *tls.Config
		form   url.Values
		status int
	}{
		"https_svid, certificate":    {"https://" + at.HTTPSSVID, mutual, form, 200},
		"https_svid, JWT-SVID":       {"https://" + at.HTTPSSVID, bySVID, withJWT, 200},
		"https_svid, nothing":        {"https://" + at.HTTPSSVID, bySVID, form, 401},
		"https, certificate":         {"https://" + at.HTTPS, webMutual, form, 200},
		"https, JWT-SVID":            {"https://" + at.HTTPS, byWeb, withJWT, 200},
		"https, nothing":             {"https://" + at.HTTPS, byWeb, form, 401},
		"plain, JWT-SVID":            {"http://" + at.Public, nil, withJWT, 200},
		"plain, nothing":             {"http://" + at.Public, nil, form, 401},
		"both ways at the same time": {"https://" + at.HTTPS, webMutual, withJWT, 400},
	} {
		t.Run(name, func(t *testing.T) {
			transport := &http.Transport{TLSClientConfig: c.tls}
			defer transport.CloseIdleConnections()
			client := &http.Client{Transport: transport, Timeout: patience}
			resp, err := client.PostForm(c.base+"/token", c.form)
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(resp.Body)
			if resp.Body.Close(); resp.StatusCode != c.status || strings.Contains(string(body), "access_token") != (c.status == 200) {
				t.Errorf("got %s", resp.Status)
			}
			resp, err = client.Get(c.base + "/.well-known/oauth-authorization-server")
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			var m struct {
				Token   string `json:"token_endpoint"`
				Aliases struct {
					Token string `json:"token_endpoint"`
				} `json:"mtls_endpoint_aliases"`
			}
			if err := json.NewDecoder(resp.Body).Decode(&m); err != nil || m.Token != h.cfg.Issuer+"/token" || m.Aliases.Token != h.cfg.MutualTLSURL+"/token" {
				t.Errorf("discovered %+v, %v", m, err)
			}
		})
	}
	showing := sdk.Config{Address: at.GRPCJWT, Source: source{svid, h.td}, BrokerID: brokerID, JWTSVID: func(context.Context) (string, error) { return assertion, nil }}
	c, err := sdk.New(showing)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Issue(within(t), sdk.Request{Audience: "orders"}); err != nil {
		t.Error(err)
	}
	var refused *sdk.Error
	if _, err := c.Issue(within(t), sdk.Request{Audience: "orders", Binding: token.BindingX5T}); !errors.As(err, &refused) || refused.Code != codes.PermissionDenied {
		t.Errorf("bound to the certificate of a connection that doesn't count: %v", err)
	}
	showing.JWTSVID = func(context.Context) (string, error) { return "", errors.New("the Workload API is away") }
	if c, err = sdk.New(showing); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Issue(within(t), sdk.Request{Audience: "orders"}); !errors.As(err, &refused) || refused.Code != codes.Unavailable || !strings.Contains(err.Error(), "is away") {
		t.Errorf("without a JWT-SVID: %v", err)
	}
	// Who has proved nothing is counted by door and way, and logged.
	bearer, err := grpc.NewClient(at.GRPCJWT, grpc.WithTransportCredentials(credentials.NewTLS(bySVID)))
	if err != nil {
		t.Fatal(err)
	}
	defer bearer.Close()
	if _, err := dayflyv1.NewTokenServiceClient(bearer).Issue(within(t), &dayflyv1.IssueRequest{Audience: "orders"}); status.Code(err) != codes.Unauthenticated {
		t.Errorf("with nothing: %v", err)
	}
	resp, err := http.Get("http://" + at.Admin + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	scraped, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`{door="http",method="none",reason="CLIENT_UNAUTHENTICATED"} 3`,
		`{door="http",method="jwt",reason="FORM_INVALID"} 1`,
		`{door="grpc_jwt",method="jwt",reason="JWT_SVID_INVALID"} 1`,
	} {
		if !strings.Contains(string(scraped), "dayfly_client_authentication_failures_total"+want) {
			t.Errorf("no metric %s", want)
		}
	}
	if log := s.stderr.String(); strings.Count(log, "a client has not proved who it is") != 5 || strings.Contains(log, assertion) {
		t.Error("the log doesn't say so, or says too much")
	}
	if _, err := sdk.New(sdk.Config{Address: "unix:///a.sock", JWTSVID: showing.JWTSVID}); err == nil {
		t.Error("a JWT-SVID is taken for a unix socket")
	}
}

// What can't be served ends the broker, in words: it isn't left out.
func TestServeRefusesDoors(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*brokerd.Config)
		want   string
	}{
		"a trust domain that isn't served": {func(cfg *brokerd.Config) {
			cfg.Listen.GRPCJWT = "127.0.0.1:0"
			cfg.GRPCJWTTrustDomains = []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("stranger.example")}
		}, "stranger.example"},
		"no certificate in the files": {func(cfg *brokerd.Config) {
			cfg.Listen.HTTPS, cfg.Listen.HTTPSCertificate, cfg.Listen.HTTPSKey = "127.0.0.1:0", "/dev/null", "/dev/null"
		}, "web certificate"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHouse(t)
			c.change(&h.cfg)
			h.writePolicy()
			h.giveSVID()
			if err := brokerd.Serve(within(t), h.cfg, io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v", err)
			}
		})
	}
}
