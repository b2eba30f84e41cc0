package brokerd_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/cmd/internal/brokerd"
	"github.com/dayflyhq/dayfly/policy"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"go.yaml.in/yaml/v3"
)

var bundlesID = spiffeid.RequireFromPath(domain, "/bundles")

// publisher signs the demo policy and serves it to the broker's SVID alone.
type publisher struct {
	t       *testing.T
	private string
	raw     atomic.Pointer[[]byte]
	url     string
}

func (h *house) publisher() *publisher {
	h.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		h.t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		h.t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		h.t.Fatal(err)
	}
	p := &publisher{t: h.t, private: string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}))}
	file := filepath.Join(h.dir, "key.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}), 0o600); err != nil {
		h.t.Fatal(err)
	}
	svid, err := h.td.IssueSVID(bundlesID, spiffetest.SVIDOptions{})
	if err != nil {
		h.t.Fatal(err)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(svid, h.td, tlsconfig.AuthorizeID(brokerID)))
	if err != nil {
		h.t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		raw := p.raw.Load()
		if raw == nil {
			http.NotFound(w, r)
			return
		}
		http.ServeContent(w, r, "policy.tar.gz", time.Time{}, bytes.NewReader(*raw))
	})}
	go func() { _ = server.Serve(l) }()
	h.t.Cleanup(func() { server.Close() })
	p.url = "https://" + l.Addr().String()
	h.cfg.Policy = ""
	h.cfg.PolicyBundle = &brokerd.PolicyBundle{URL: p.url + "/policy.tar.gz", Keys: map[string]string{"k1": file}, ServerID: bundlesID, Poll: time.Second}
	return p
}

func (p *publisher) publish(revision string, iat int64) {
	p.t.Helper()
	b := bundle.Bundle{Manifest: bundle.Manifest{Revision: revision}, Data: map[string]any{}}
	b.Manifest.Init()
	data, err := fs.ReadFile(policy.Demo(), "data.yaml")
	if err == nil {
		err = yaml.Unmarshal(data, &b.Data)
	}
	if err != nil {
		p.t.Fatal(err)
	}
	text, err := fs.ReadFile(policy.Demo(), "policy.rego")
	if err != nil {
		p.t.Fatal(err)
	}
	b.Modules = []bundle.ModuleFile{{URL: "/policy.rego", Path: "/policy.rego", Raw: text, Parsed: ast.MustParseModule(string(text))}}
	claims := filepath.Join(p.t.TempDir(), "claims.json")
	if text, err = json.Marshal(map[string]int64{"iat": iat}); err == nil {
		err = os.WriteFile(claims, text, 0o600)
	}
	if err == nil {
		err = b.GenerateSignature(bundle.NewSigningConfig(p.private, "ES256", claims), "k1", false)
	}
	var out bytes.Buffer
	if err == nil {
		err = bundle.NewWriter(&out).Write(b)
	}
	if err != nil {
		p.t.Fatal(err)
	}
	raw := out.Bytes()
	p.raw.Store(&raw)
}

// A broker fetches its policy, over mTLS with its own SVID; the revision in force is in
// every record of a decision, in the metrics and, once nothing newer can be had, in what
// readiness warns of; a restart while the server is away starts with what was kept.
func TestServeWithABundle(t *testing.T) {
	h := newHouse(t)
	h.cfg.Listen.Admin, h.cfg.JWKSMaxAge = "127.0.0.1:0", time.Second
	p := h.publisher()
	p.publish("v1", time.Now().Unix()-10)
	h.giveSVID()
	s := h.serve()
	at := s.announced()
	c := h.client(h.td, reports, at)
	issue := func() error {
		_, err := c.Issue(within(t), sdk.Request{Audience: "orders"})
		return err
	}
	h.eventually(func() bool { return issue() == nil })
	last := h.lastAudited()
	if !strings.HasPrefix(last.Revision, "v1@sha256:") || len(last.Asked) != 1 || last.Asked[0].Answer == nil || !last.Asked[0].Answer.Allow {
		t.Errorf("audit: %+v", last)
	}
	if m := get(t, at, "/metrics"); !strings.Contains(m, `dayfly_policy_info{revision="`+last.Revision+`"} `) || !strings.Contains(m, "dayfly_policy_stale 0") {
		t.Errorf("metrics:\n%s", m)
	}

	p.publish("v2", time.Now().Unix())
	h.eventually(func() bool { return issue() == nil && strings.HasPrefix(h.lastAudited().Revision, "v2@") })
	p.raw.Store(nil)
	h.eventually(func() bool { return strings.Contains(get(t, at, "/readyz"), "POLICY_STALE") })
	if m := get(t, at, "/metrics"); !strings.Contains(m, "dayfly_policy_stale 1") {
		t.Errorf("metrics:\n%s", m)
	}
	if err := issue(); err != nil {
		t.Errorf("the last good policy isn't in force: %v", err)
	}

	h.cfg.TakeOver = true
	next := h.serve()
	c = h.client(h.td, reports, next.announced())
	s.stop() // has ended, without an error
	if err := issue(); err != nil || !strings.HasPrefix(h.lastAudited().Revision, "v2@") {
		t.Errorf("after a takeover: %v, %s", err, h.lastAudited().Revision)
	}
	next.stop()

	h.cfg.TakeOver = false
	s = h.serve()
	c = h.client(h.td, reports, s.announced())
	if err := issue(); err != nil || !strings.HasPrefix(h.lastAudited().Revision, "v2@") {
		t.Errorf("after a restart: %v, %s", err, h.lastAudited().Revision)
	}
}

// Without a bundle from anywhere everything is denied, and a key file that isn't one is
// said at once.
func TestServeWithoutABundle(t *testing.T) {
	h := newHouse(t)
	h.publisher()
	h.giveSVID()
	at := h.serve().announced()
	var refused *sdk.Error
	if _, err := h.client(h.td, reports, at).Issue(within(t), sdk.Request{Audience: "orders"}); !errors.As(err, &refused) || refused.Reason != "NO_POLICY" {
		t.Errorf("got %v", err)
	}
	h.cfg.PolicyBundle.Keys["k1"] = h.cfg.Store
	if err := brokerd.Serve(within(t), h.cfg, &lockedBuffer{}, &lockedBuffer{}); err == nil || !strings.Contains(err.Error(), `key "k1"`) {
		t.Errorf("a key that is none: %v", err)
	}
}

func (h *house) eventually(done func() bool) {
	h.t.Helper()
	for ctx := within(h.t); !done(); time.Sleep(20 * time.Millisecond) {
		if ctx.Err() != nil {
			h.t.Fatal("it never came")
		}
	}
}

func (h *house) lastAudited() broker.AuditEntry {
	h.t.Helper()
	text, err := os.ReadFile(h.cfg.Audit)
	if err != nil {
		h.t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	var e broker.AuditEntry
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &e); err != nil {
		h.t.Fatal(err)
	}
	return e
}

func get(t *testing.T, at brokerd.Announcement, path string) string {
	t.Helper()
	resp, err := http.Get("http://" + at.Admin + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var b bytes.Buffer
	if _, err := b.ReadFrom(resp.Body); err != nil {
		t.Fatal(err)
	}
	return b.String()
}
