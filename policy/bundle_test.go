package policy_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/policy"
	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/bundle"
	"go.yaml.in/yaml/v3"
)

// signer is whoever publishes bundles, with OPA's own writer.
type signer struct {
	key     *ecdsa.PrivateKey
	private string // PEM
}

func newSigner(t testing.TB) *signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return &signer{key, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))}
}

func (s *signer) keys() map[string]crypto.PublicKey {
	return map[string]crypto.PublicKey{"k1": s.key.Public()}
}

// made is the demo policy as a bundle, before it is signed.
func made(t testing.TB, revision string, change func(*bundle.Bundle)) *bundle.Bundle {
	t.Helper()
	read := func(name string) []byte {
		raw, err := fs.ReadFile(policy.Demo(), name)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	b := &bundle.Bundle{Manifest: bundle.Manifest{Revision: revision}, Data: map[string]any{}}
	b.Manifest.Init()
	if err := yaml.Unmarshal(read("data.yaml"), &b.Data); err != nil {
		t.Fatal(err)
	}
	b.Modules = []bundle.ModuleFile{module("/policy.rego", string(read("policy.rego")))}
	if change != nil {
		change(b)
	}
	return b
}

func module(path, text string) bundle.ModuleFile {
	return bundle.ModuleFile{URL: path, Path: path, RelativePath: path, Raw: []byte(text)}
}

// sign signs with a claims file, as "opa sign --claims-file" does.
func (s *signer) sign(t testing.TB, b *bundle.Bundle, claims map[string]any) []byte {
	t.Helper()
	file := filepath.Join(t.TempDir(), "claims.json")
	raw, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	for i := range b.Modules { // the writer wants them parsed
		if b.Modules[i].Parsed, err = ast.ParseModule(b.Modules[i].Path, string(b.Modules[i].Raw)); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.GenerateSignature(bundle.NewSigningConfig(s.private, "ES256", file), "k1", false); err != nil {
		t.Fatal(err)
	}
	return packed(t, b)
}

func packed(t testing.TB, b *bundle.Bundle) []byte {
	t.Helper()
	var out bytes.Buffer
	if err := bundle.NewWriter(&out).DisableFormat(true).Write(*b); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// repacked changes the files of a bundle without signing it anew.
func repacked(t testing.TB, raw []byte, change func(files map[string]string)) []byte {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		files[h.Name] = string(text)
	}
	change(files)
	var out bytes.Buffer
	gz := gzip.NewWriter(&out)
	w := tar.NewWriter(gz)
	for name, text := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: int64(len(text)), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, text); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := gz.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// shelf serves one bundle, over TLS, with an ETag.
type shelf struct {
	*httptest.Server
	mu      sync.Mutex
	raw     []byte
	handler http.HandlerFunc // instead
	asked   []string         // If-None-Match of each request
}

func newShelf(t *testing.T) *shelf {
	s := &shelf{}
	s.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		raw, handler := s.raw, s.handler
		s.asked = append(s.asked, r.Header.Get("If-None-Match"))
		s.mu.Unlock()
		if handler != nil {
			handler(w, r)
			return
		}
		w.Header().Set("ETag", fmt.Sprintf(`"%x"`, sha256.Sum256(raw)))
		http.ServeContent(w, r, "bundle.tar.gz", time.Time{}, bytes.NewReader(raw))
	}))
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	t.Cleanup(s.Close)
	return s
}

func (s *shelf) put(raw []byte) { s.set(raw, nil) }

func (s *shelf) set(raw []byte, handler http.HandlerFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.raw, s.handler = raw, handler
}

func (s *shelf) requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.asked...)
}

// config is a policy from the shelf that keeps its bundle in dir.
func (s *shelf) config(t *testing.T, by *signer, dir string) policy.Config {
	roots := x509.NewCertPool()
	roots.AddCert(s.Certificate())
	return policy.Config{
		Bundle: &policy.Bundle{
			URL: s.URL + "/bundle.tar.gz", Keys: by.keys(), TLS: &tls.Config{RootCAs: roots}, Kept: filepath.Join(dir, "kept.tar.gz"),
		},
		Timeout: patience, Now: func() time.Time { return bundleNow },
	}
}

// bundleNow is the present of the tests; iat counts around it.
var bundleNow = time.Unix(1_800_000_000, 0)

func iat(seconds int64) map[string]any { return map[string]any{"iat": bundleNow.Unix() + seconds} }

func open(t *testing.T, cfg policy.Config) *policy.Policy {
	t.Helper()
	p, err := policy.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func demoAsks(t *testing.T, p *policy.Policy) policy.Decision {
	t.Helper()
	d, err := p.Decide(t.Context(), policy.Input{
		Action: policy.ActionIssue, Caller: policy.Caller{ID: id("/ns/shop/payments")}, Audience: "orders", Scopes: []string{"orders.read"},
	})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// A bundle is fetched, verified, in force and kept; it is asked for conditionally; a
// newer one replaces it; a restart while the server is away starts with the last one.
func TestBundle(t *testing.T) {
	by, at, dir := newSigner(t), newShelf(t), t.TempDir()
	cfg := at.config(t, by, dir)
	p := open(t, cfg)
	if st := p.Status(); st.Generation != 0 || st.Err == nil {
		t.Fatalf("before any bundle: %+v", st)
	}
	at.put(by.sign(t, made(t, "v1", nil), iat(-20)))
	for range 2 {
		if err := p.Reload(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	d := demoAsks(t, p)
	if !d.Allow || !strings.HasPrefix(d.Revision, "v1@sha256:") || d.Generation != 1 {
		t.Errorf("got %+v", d)
	}
	if asked := at.requests(); len(asked) != 2 || asked[0] != "" || asked[1] == "" {
		t.Errorf("If-None-Match of two requests: %q", asked)
	}
	kept, err := os.Stat(cfg.Bundle.Kept)
	if err != nil || kept.Mode().Perm() != 0o600 || kept.Size() == 0 {
		t.Errorf("kept: %v, %v", kept, err)
	}

	at.put(by.sign(t, made(t, "v2", func(b *bundle.Bundle) { delete(b.Data, "entitlements") }), iat(-10)))
	if err := p.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	if d := demoAsks(t, p); d.Allow || d.Generation != 2 || !strings.HasPrefix(d.Revision, "v2@") {
		t.Errorf("after a newer bundle: %+v", d)
	}

	at.Close()
	again := open(t, cfg)
	if st := again.Status(); st.Revision != p.Status().Revision || st.Err != nil {
		t.Errorf("after a restart: %+v, want revision %s", st, p.Status().Revision)
	}
	if demoAsks(t, again).Allow {
		t.Error("after a restart the older policy decides")
	}
	if err := again.Reload(t.Context()); err == nil || again.Status().Err == nil || again.Status().Generation != 1 {
		t.Errorf("a server that is away: %v, %+v", err, again.Status())
	}
}

// What isn't a good and newer bundle changes nothing, whatever is wrong with it, and is
// said; a good one heals.
func TestBundleRefused(t *testing.T) {
	by, other, at := newSigner(t), newSigner(t), newShelf(t)
	cfg := at.config(t, by, t.TempDir())
	cfg.Bundle.MaxSize = 1 << 20
	p := open(t, cfg)
	good := by.sign(t, made(t, "v1", nil), iat(-100))
	change := func(change func(*bundle.Bundle)) []byte { return by.sign(t, made(t, "v2", change), iat(-50)) }
	answer := func(status int, header, value string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set(header, value)
			w.WriteHeader(status)
		}
	}
	hmac := made(t, "v2", nil)
	der, err := x509.MarshalPKIXPublicKey(by.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	public := string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	if err := hmac.GenerateSignature(bundle.NewSigningConfig(public, "HS256", ""), "k1", false); err != nil {
		t.Fatal(err)
	}
	at.put(good)
	if err := p.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	first := p.Status()
	for name, c := range map[string]struct {
		raw     []byte
		handler http.HandlerFunc
		want    string
	}{
		"unsigned":                      {raw: packed(t, made(t, "v2", nil)), want: "missing .signatures.json"},
		"signed by another":             {raw: other.sign(t, made(t, "v2", nil), iat(-50)), want: "failed to verify"},
		"signed with the public key":    {raw: packed(t, hmac), want: "failed to verify"},
		"of a scope":                    {raw: by.sign(t, made(t, "v2", nil), map[string]any{"iat": bundleNow.Unix(), "scope": "write"}), want: "scope mismatch"},
		"expired":                       {raw: by.sign(t, made(t, "v2", nil), map[string]any{"iat": bundleNow.Unix() - 50, "exp": bundleNow.Unix()}), want: "expired at 2027"},
		"signed in milliseconds":        {raw: by.sign(t, made(t, "v2", nil), map[string]any{"iat": bundleNow.UnixMilli()}), want: "in the future"},
		"older":                         {raw: by.sign(t, made(t, "v0", nil), iat(-101)), want: "sign it anew"},
		"older, signed without a time":  {raw: by.sign(t, made(t, "v0", nil), map[string]any{"x": 1}), want: "sign it anew"},
		"another of the same second":    {raw: by.sign(t, made(t, "v0", nil), iat(-100)), want: "sign it anew"},
		"a file altered":                {raw: repacked(t, good, func(f map[string]string) { f["/policy.rego"] += " " }), want: "digest mismatch"},
		"data altered":                  {raw: repacked(t, good, func(f map[string]string) { f["/data.json"] = `{}` }), want: "digest mismatch"},
		"a file more":                   {raw: repacked(t, good, func(f map[string]string) { f["/more.rego"] = "package more" }), want: "not included in bundle signature"},
		"a file less":                   {raw: repacked(t, good, func(f map[string]string) { delete(f, "/data.json") }), want: "not found in the target bundle"},
		"truncated":                     {raw: good[:len(good)-9], want: "unpacking"},
		"nothing":                       {raw: []byte{}, want: "not a bundle"},
		"a web page":                    {raw: []byte("<html>please log in</html>"), want: "not a bundle"},
		"too large":                     {handler: answer(200, "Content-Length", "999999999"), want: "larger than"},
		"too large, and it doesn't say": {handler: func(w http.ResponseWriter, _ *http.Request) { _, _ = io.CopyN(w, zeros{}, 2<<20) }, want: "larger than"},
		"a compression bomb":            {raw: bomb(t), want: "unpacks to more"},
		"elsewhere":                     {handler: answer(302, "Location", "/other"), want: "redirects aren't followed"},
		"gone":                          {handler: answer(404, "X", "y"), want: "404"},
		"a policy that doesn't compile": {raw: change(func(b *bundle.Bundle) { b.Modules[0] = module("/policy.rego", "package policy\ndecision := x") }), want: "policy.rego:2"},
		"a policy that calls out": {raw: change(func(b *bundle.Bundle) {
			b.Modules = append(b.Modules, module("/m.rego", "package m\nx := http.send({})"))
		}), want: "http.send"},
		"no policy":                      {raw: change(func(b *bundle.Bundle) { b.Modules = nil }), want: "no policy"},
		"a key that isn't known":         {raw: change(func(b *bundle.Bundle) { b.Data["entitlement"] = map[string]any{} }), want: `data.json:32: unknown key "entitlement"`},
		"a revision that isn't one word": {raw: change(func(b *bundle.Bundle) { b.Manifest.Revision = "v 2" }), want: "its revision"},
		"a plan": {raw: change(func(b *bundle.Bundle) {
			b.PlanModules = []bundle.PlanModuleFile{{URL: "/plan.json", Path: "/plan.json", Raw: []byte("{}")}}
		}), want: "target rego"},
	} {
		at.set(c.raw, c.handler)
		err := p.Reload(t.Context())
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		if st := p.Status(); st.Revision != first.Revision || st.Generation != 1 || st.Err == nil {
			t.Errorf("%s: %+v", name, st)
		}
		if !demoAsks(t, p).Allow {
			t.Errorf("%s: the last good policy isn't in force", name)
		}
	}
	at.put(good)
	if err := p.Reload(t.Context()); err != nil || p.Status().Err != nil || p.Status().Generation != 1 {
		t.Errorf("the good one again: %v, %+v", err, p.Status())
	}
	at.put(change(nil))
	if err := p.Reload(t.Context()); err != nil || p.Status().Err != nil || p.Status().Generation != 2 {
		t.Errorf("a newer one: %v, %+v", err, p.Status())
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func bomb(t *testing.T) []byte {
	t.Helper()
	var member bytes.Buffer
	z := gzip.NewWriter(&member)
	if _, err := io.CopyN(z, zeros{}, 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return bytes.Repeat(member.Bytes(), 65)
}

// A signature covers what OPA parses. Other bytes of the same meaning to OPA must mean
// the same to us: here a key twice, of which OPA takes the last.
func TestBundleMeansWhatWasSigned(t *testing.T) {
	by := newSigner(t)
	good := by.sign(t, made(t, "v1", nil), iat(0))
	revision, files, err := policy.ReadBundle(good, by.keys())
	if err != nil {
		t.Fatal(err)
	}
	altered := repacked(t, good, func(f map[string]string) {
		f["/data.json"] = `{"operators": {"spiffe://evil.test/*": ["revoke_everything"]}, ` + strings.TrimPrefix(f["/data.json"], "{")
	})
	got, again, err := policy.ReadBundle(altered, by.keys())
	if err != nil || got != revision || !bytes.Equal(files["data.json"], again["data.json"]) {
		t.Errorf("got %s, %v, want %s", got, err, revision)
	}
	if bytes.Contains(again["data.json"], []byte("evil")) {
		t.Error("unsigned data are read")
	}
}

// The kept bundle is verified again: whoever can write to the disk signs nothing.
func TestBundleKeptIsVerified(t *testing.T) {
	by, at, dir := newSigner(t), newShelf(t), t.TempDir()
	cfg := at.config(t, by, dir)
	for name, raw := range map[string][]byte{
		"signed by another": newSigner(t).sign(t, made(t, "v1", nil), iat(0)),
		"unsigned":          packed(t, made(t, "v1", nil)),
		"truncated":         by.sign(t, made(t, "v1", nil), iat(0))[:100],
	} {
		if err := os.WriteFile(cfg.Bundle.Kept, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		p := open(t, cfg)
		if st := p.Status(); st.Generation != 0 || st.Err == nil {
			t.Errorf("%s: %+v", name, st)
		}
	}
	// One that has expired was in force, and an older one doesn't replace it.
	raw := by.sign(t, made(t, "v2", nil), map[string]any{"iat": bundleNow.Unix() - 50, "exp": bundleNow.Unix() - 1})
	if err := os.WriteFile(cfg.Bundle.Kept, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	p := open(t, cfg)
	at.put(by.sign(t, made(t, "v1", nil), iat(-60)))
	if err := p.Reload(t.Context()); err == nil || !strings.Contains(err.Error(), "sign it anew") {
		t.Errorf("an older bundle after a restart: %v", err)
	}
	if st := p.Status(); !strings.HasPrefix(st.Revision, "v2@") || !demoAsks(t, p).Allow {
		t.Errorf("the kept bundle: %+v", st)
	}
}

// A disk that takes nothing doesn't hold a newer policy up. It is said, and tried again
// although the server has nothing newer.
func TestBundleCannotBeKept(t *testing.T) {
	by, at, dir := newSigner(t), newShelf(t), t.TempDir()
	cfg := at.config(t, by, filepath.Join(dir, "later"))
	p := open(t, cfg)
	at.put(by.sign(t, made(t, "v1", nil), iat(0)))
	if err := p.Reload(t.Context()); err == nil || !demoAsks(t, p).Allow {
		t.Fatalf("got %v, want it in force and an error", err)
	}
	if err := os.Mkdir(filepath.Join(dir, "later"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := p.Reload(t.Context()); err != nil || p.Status().Err != nil {
		t.Errorf("once there is room: %v, %+v", err, p.Status())
	}
	if _, err := os.Stat(cfg.Bundle.Kept); err != nil {
		t.Error(err)
	}
}

// Run asks by itself, soon after a failure, and says what is ready.
func TestBundleIsPolled(t *testing.T) {
	by, at := newSigner(t), newShelf(t)
	cfg := at.config(t, by, t.TempDir())
	cfg.Bundle.Poll = policy.MinPoll
	var log lockedBuffer
	cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
	p := open(t, cfg)
	at.set(nil, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusServiceUnavailable)
		at.put(by.sign(t, made(t, "v1", nil), iat(0)))
	})
	done := make(chan error)
	ctx, cancel := contextFor(t)
	go func() { done <- p.Run(ctx) }()
	select {
	case <-p.Ready():
	case <-time.After(patience):
		t.Fatalf("no bundle: %+v", p.Status())
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if !strings.Contains(log.String(), "503") || !strings.Contains(log.String(), "revision=v1@sha256:") {
		t.Errorf("log:\n%s", &log)
	}
}

func TestBundleConfig(t *testing.T) {
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	by := newSigner(t)
	for want, b := range map[string]policy.Bundle{
		"no key":             {URL: "https://x", Kept: "/k"},
		"https":              {URL: "http://bundles.example.org/x", Kept: "/k", Keys: by.keys()},
		"no user":            {URL: "https://u:p@x", Kept: "/k", Keys: by.keys()},
		"absolute URL":       {URL: "bundle.tar.gz", Kept: "/k", Keys: by.keys()},
		"Kept":               {URL: "https://x", Keys: by.keys()},
		"Poll":               {URL: "https://x", Kept: "/k", Keys: by.keys(), Poll: time.Millisecond},
		"MaxSize":            {URL: "https://x", Kept: "/k", Keys: by.keys(), MaxSize: 1 << 40},
		"RSA key of 1024":    {URL: "https://x", Kept: "/k", Keys: map[string]crypto.PublicKey{"a": weak.Public()}},
		"exactly one source": {},
	} {
		cfg := policy.Config{Bundle: &b}
		if want == "exactly one source" {
			cfg.Dir = "/p"
		}
		if _, err := policy.Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	for _, u := range []string{"http://127.0.0.1:8181/b", "http://[::1]/b", "http://localhost/b", "https://x/b?c=d"} {
		if err := policy.CheckBundleURL(u); err != nil {
			t.Errorf("%s: %v", u, err)
		}
	}
}

func TestParseBundleKey(t *testing.T) {
	by := newSigner(t)
	der, err := x509.MarshalPKIXPublicKey(by.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	public := string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	if key, err := policy.ParseBundleKey([]byte(public)); err != nil || !by.key.PublicKey.Equal(key) {
		t.Errorf("got %v, %v", key, err)
	}
	for want, text := range map[string]string{
		"private": by.private, "not PEM": "x", "more than one": public + public,
		"CERTIFICATE": "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n",
	} {
		if _, err := policy.ParseBundleKey([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}

// A bundle in a file can be checked and tried out, signed or not.
func TestBundleFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "b.tar.gz")
	if err := os.WriteFile(path, packed(t, made(t, "v3", nil)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := policy.Check(path); err != nil {
		t.Error(err)
	}
	if d := demoAsks(t, load(t, policy.Config{File: path})); !d.Allow || !strings.HasPrefix(d.Revision, "v3@") {
		t.Errorf("got %+v", d)
	}
}

// Whatever a stranger does to a signed bundle, it is refused or means what was signed.
func FuzzBundle(f *testing.F) {
	by := newSigner(f)
	good := by.sign(f, made(f, "v1", nil), iat(0))
	revision, files, err := policy.ReadBundle(good, by.keys())
	if err != nil {
		f.Fatal(err)
	}
	z, err := gzip.NewReader(bytes.NewReader(good))
	if err != nil {
		f.Fatal(err)
	}
	unpacked, err := io.ReadAll(z)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(unpacked)
	f.Add(unpacked[:len(unpacked)/2])
	f.Add([]byte{})
	f.Add(bytes.Replace(unpacked, []byte(`"allow"`), []byte(`"alloW"`), 1))
	f.Fuzz(func(t *testing.T, unpacked []byte) {
		var out bytes.Buffer
		gz := gzip.NewWriter(&out)
		_, _ = gz.Write(unpacked)
		_ = gz.Close()
		got, again, err := policy.ReadBundle(out.Bytes(), by.keys())
		if err != nil {
			return
		}
		if got != revision || len(files) != len(again) {
			t.Fatalf("verified as %s with %d files, signed was %s", got, len(again), revision)
		}
	})
}
