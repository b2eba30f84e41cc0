package e2e_test

import (
	"crypto/x509"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/sdk/verify"
)

// TestGitHelper has the real git clone from a server that demands a token of ours, with
// no password anywhere; and a repository that sends git elsewhere gets nothing.
func TestGitHelper(t *testing.T) {
	box := newBox(t)
	agent := must(box.StartAgent(t.Context(), sandbox.Payments))(t)
	feed := must(box.Client(t.Context(), sandbox.Web, box.Info.GRPC))(t)
	service := must(box.StartService(t.Context(), sandbox.ServiceConfig{ID: sandbox.Web, Audience: "web", Feed: feed, Plain: true}))(t)
	repos := makeRepo(t)
	var asked, served atomic.Int64
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name, password, ok := r.BasicAuth()
		if ok {
			asked.Add(1)
		}
		got, err := service.Verifier.Verify(r.Context(), password, verify.Peer{})
		if !ok || err != nil || name != "dayfly" || !strings.Contains(strings.Join(got.Scopes, " "), "web.read") {
			w.Header().Set("WWW-Authenticate", `Basic realm="git"`)
			http.Error(w, "a token is wanted", http.StatusUnauthorized)
			return
		}
		served.Add(1)
		http.FileServer(http.Dir(repos)).ServeHTTP(w, r)
	})
	https, other, plain := httptest.NewTLSServer(handler), httptest.NewTLSServer(handler), httptest.NewServer(handler)
	for _, s := range []*httptest.Server{https, other, plain} {
		t.Cleanup(s.Close)
	}
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, certificate(https.Certificate()), 0o600); err != nil {
		t.Fatal(err)
	}
	host := func(s *httptest.Server) string { _, h, _ := strings.Cut(s.URL, "://"); return h }
	git := func(helper string, args ...string) (string, error) {
		args = append([]string{"-c", "credential.helper=", "-c", "credential.helper=!" + filepath.Join(bin, "dayfly") + " helper git " + helper}, args...)
		cmd := exec.CommandContext(t.Context(), "git", args...)
		cmd.Env = append(os.Environ(), "DAYFLY_AGENT="+agent, "GIT_SSL_CAINFO="+ca, "GIT_TERMINAL_PROMPT=0", "GIT_CONFIG_NOSYSTEM=1", "HOME="+t.TempDir(),
			"http_proxy=", "https_proxy=", "HTTP_PROXY=", "HTTPS_PROXY=", "ALL_PROXY=", "all_proxy=")
		out, err := cmd.CombinedOutput()
		if strings.Contains(string(out), "eyJ") {
			t.Errorf("git's output has a credential")
		}
		return string(out), err
	}

	for _, s := range []*httptest.Server{https, plain} {
		into := filepath.Join(t.TempDir(), "clone")
		if out, err := git("--server "+host(s)+"=web", "clone", s.URL+"/repo.git", into); err != nil {
			t.Fatalf("git clone %s: %v: %s", s.URL, err, out)
		}
		if text := must(os.ReadFile(filepath.Join(into, "README")))(t); string(text) != "shoes\n" {
			t.Errorf("cloned %q", text)
		}
	}
	if served.Load() == 0 {
		t.Fatal("nobody was asked for a token")
	}

	// A server that nobody named: git gets nothing, and sends nothing.
	before := asked.Load()
	if out, err := git("--server "+host(https)+"=web", "clone", other.URL+"/repo.git", filepath.Join(t.TempDir(), "clone")); err == nil || !strings.Contains(out, "terminal prompts disabled") {
		t.Errorf("a clone from elsewhere: %v: %s", err, out)
	}
	// Policy gives no such token: git is told why, and to quit.
	out, err := git("--server "+host(https)+"=ledger", "clone", https.URL+"/repo.git", filepath.Join(t.TempDir(), "clone"))
	if err == nil || !strings.Contains(out, "POLICY_DENIED") || !strings.Contains(out, "told us to quit") {
		t.Errorf("a refused token: %v: %s", err, out)
	}
	// Revoked: the agent drops it, and so the next clone isn't given it either.
	alice := must(box.Client(t.Context(), sandbox.Alice, box.Info.GRPC))(t)
	revocations := dayflyv1.NewRevocationServiceClient(alice.Conn())
	revoked := must(revocations.Revoke(t.Context(), &dayflyv1.RevokeRequest{
		Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Identity{Identity: sandbox.Payments.String()}}}, Reason: "test",
	}))(t).GetRevocation().GetPosition()
	watch := must(revocations.WatchContainment(t.Context(), &dayflyv1.WatchContainmentRequest{Sequence: revoked.GetSequence()}))(t)
	for !must(watch.Recv())(t).GetContainment().GetContained() {
	}
	out, err = git("--server "+host(https)+"=web", "clone", https.URL+"/repo.git", filepath.Join(t.TempDir(), "clone"))
	if err == nil || !strings.Contains(out, "told us to quit") {
		t.Errorf("after the revocation: %v: %s", err, out)
	}
	if asked.Load() != before {
		t.Errorf("%d requests had a password that none should have had", asked.Load()-before)
	}
}

func certificate(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

// makeRepo makes a bare repository that any web server can serve.
func makeRepo(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	run := exec.CommandContext(t.Context(), "sh", "-ec", `
git init -q work && cd work && echo shoes > README && git add README
git -c user.name=t -c user.email=t@example.org commit -qm one
cd .. && git clone -q --bare work repo.git && cd repo.git && git update-server-info`)
	run.Dir, run.Env = dir, append(os.Environ(), "HOME="+dir, "GIT_CONFIG_NOSYSTEM=1")
	if out, err := run.CombinedOutput(); err != nil {
		t.Fatalf("making a repository: %v: %s", err, out)
	}
	return dir
}
