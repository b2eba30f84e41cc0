package clients_test

import (
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// TestPython: a service in Python, with nothing but its standard library.
func TestPython(t *testing.T) {
	b := newBox(t, "", "")
	wantStories(t, b, b.tell(t, "python3", "python/client.py"))
}

// TestNode: a service in Node, with openid-client and jose.
func TestNode(t *testing.T) {
	b := newBox(t, "", "")
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS("node")); err != nil {
		t.Fatal(err)
	}
	install := exec.CommandContext(t.Context(), "npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier")
	install.Dir = dir
	if out, err := install.CombinedOutput(); err != nil {
		t.Fatalf("npm ci: %v: %s", err, out)
	}
	stories := b.tell(t, "node", filepath.Join(dir, "client.js"))
	wantStories(t, b, stories)
	for way, s := range stories {
		if len(s.Claims) != 2 || s.Claims[0].Subject != sandbox.Payments.String() || s.Claims[1].Act.Subject != sandbox.Orders.String() {
			t.Errorf("%s: verified %+v", way, s.Claims)
		}
		if s.Errors["verified"] != "ERR_JWT_CLAIM_VALIDATION_FAILED" {
			t.Errorf("%s: verified for another audience: %q", way, s.Errors["verified"])
		}
	}
}

// TestCurl: a shell, with curl and a certificate or a JWT-SVID in files.
func TestCurl(t *testing.T) {
	b := newBox(t, "", "")
	b.svids(t)
	stories := map[string]*story{}
	for _, way := range []string{"x509", "jwt"} {
		s := &story{Errors: map[string]string{}}
		root := b.curl(t, way, "payments", "token", "grant_type=client_credentials", "audience=orders", "scope=orders.read ledger.read")
		exchange := func() answer {
			return b.curl(t, way, "orders", "token", "grant_type=urn:ietf:params:oauth:grant-type:token-exchange", "audience=ledger",
				"subject_token="+root.Token, "subject_token_type="+typeAccess)
		}
		derived := exchange()
		introspect := func() []map[string]any {
			return []map[string]any{b.curl(t, way, "orders", "introspect", "token="+root.Token).all, b.curl(t, way, "ledger", "introspect", "token="+derived.Token).all}
		}
		s.Root, s.Derived, s.Before = root, derived, introspect()
		b.curl(t, way, "payments", "revoke", "token="+root.Token)
		s.After = introspect()
		s.Errors["nobody"] = b.curl(t, way, "payments", "token", "grant_type=client_credentials", "audience=nobody").Error
		s.Errors["wider"] = b.curl(t, way, "payments", "token", "grant_type=client_credentials", "audience=orders", "scope=orders.rule").Error
		s.Errors["dead"] = exchange().Error
		stories[way] = s
	}
	wantStories(t, b, stories)
	for _, endpoint := range []string{"token", "introspect", "revoke"} {
		if got := b.curl(t, "", "", endpoint, "grant_type=client_credentials", "audience=orders", "token=x").Error; got != "invalid_client" {
			t.Errorf("a stranger at %s: %q", endpoint, got)
		}
	}
}

// curl calls an endpoint as an identity, by a certificate or by a JWT-SVID.
func (b *box) curl(t *testing.T, way, name, endpoint string, form ...string) answer {
	t.Helper()
	args := []string{"-sS", "--cacert", b.WebCA()}
	switch way {
	case "x509":
		args = append(args, "--cert", filepath.Join(b.Dir, "svids", name, "svid.pem"), "--key", filepath.Join(b.Dir, "svids", name, "key.pem"))
	case "jwt":
		args = append(args, "-d", "client_assertion_type="+typeAssertion, "--data-urlencode", "client_assertion@"+filepath.Join(b.Dir, "svids", name, "jwt-svid"))
	}
	for _, f := range form {
		args = append(args, "--data-urlencode", f)
	}
	out, err := exec.CommandContext(t.Context(), "curl", append(args, b.Issuer+"/"+endpoint)...).Output()
	if err != nil {
		var exit *exec.ExitError
		errors.As(err, &exit)
		t.Fatalf("curl %s: %v: %s", endpoint, err, exit.Stderr)
	}
	var a answer
	if len(out) == 0 {
		return a
	}
	if err := errors.Join(json.Unmarshal(out, &a), json.Unmarshal(out, &a.all)); err != nil {
		t.Fatalf("curl %s: %v: %s", endpoint, err, out)
	}
	return a
}

// answer is what an endpoint says.
type answer struct {
	Token      string `json:"access_token"`
	Type       string `json:"token_type"`
	IssuedType string `json:"issued_token_type"`
	ExpiresIn  int    `json:"expires_in"`
	Scope      string `json:"scope"`
	Grant      string `json:"dayfly_grant"`
	Error      string `json:"error"`

	all map[string]any
}

// story is what a client of another language saw: see python/client.py.
type story struct {
	Root, Derived answer
	Claims        []struct {
		Subject string `json:"sub"`
		Act     struct {
			Subject string `json:"sub"`
		} `json:"act"`
	}
	Before, After []map[string]any
	Errors        map[string]string
}

// svids writes the SVIDs of the shop into files, and returns their folder.
func (b *box) svids(t *testing.T) string {
	t.Helper()
	var dir string
	for _, id := range []spiffeid.ID{sandbox.Payments, sandbox.Orders, sandbox.Ledger} {
		dir = must(b.SVIDFiles(id))(t)
	}
	return filepath.Dir(dir)
}

// tell runs a client with the environment that "dayfly dev" prints, and returns what it
// saw by each way of proving who it is.
func (b *box) tell(t *testing.T, command ...string) map[string]*story {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), command[0], command[1:]...)
	cmd.Env = append(os.Environ(), "DAYFLY_ISSUER="+b.Issuer, "DAYFLY_WEB_CA="+b.WebCA(), "DAYFLY_SVIDS="+b.svids(t))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v: %s", command, err, out)
	}
	var stories map[string]*story
	if err := json.Unmarshal(out, &stories); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return stories
}

// wantStories checks what a client saw against what everybody must see, and against the
// broker's records.
func wantStories(t *testing.T, b *box, stories map[string]*story) {
	t.Helper()
	if len(stories) != 2 || stories["x509"] == nil || stories["jwt"] == nil {
		t.Fatalf("stories %v, want one of each way", stories)
	}
	grants := dayflyv1.NewGrantServiceClient(b.client(t, sandbox.Alice).Conn())
	for way, s := range stories {
		if !strings.EqualFold(s.Root.Type, "Bearer") || s.Root.ExpiresIn <= 0 || s.Root.Scope != "ledger.read orders.read" {
			t.Errorf("%s: fetched %+v", way, s.Root)
		}
		if !strings.EqualFold(s.Derived.Type, "Bearer") || s.Derived.IssuedType != typeAccess || s.Derived.Scope != "ledger.read" || s.Derived.ExpiresIn > s.Root.ExpiresIn {
			t.Errorf("%s: exchanged %+v", way, s.Derived)
		}
		for i, want := range []map[string]any{
			{"client_id": sandbox.Payments.String(), "aud": "orders", "scope": s.Root.Scope, "jti": s.Root.Grant},
			{"client_id": sandbox.Orders.String(), "aud": "ledger", "scope": s.Derived.Scope, "jti": s.Derived.Grant},
		} {
			want["active"], want["sub"], want["iss"] = true, sandbox.Payments.String(), b.Issuer
			for claim, value := range want {
				if s.Before[i][claim] != value {
					t.Errorf("%s: introspected %s %v, want %v", way, claim, s.Before[i][claim], value)
				}
			}
			if len(s.After[i]) != 1 || s.After[i]["active"] != false {
				t.Errorf("%s: introspected after it was given back: %v", way, s.After[i])
			}
		}
		if s.Errors["nobody"] != "invalid_target" || s.Errors["wider"] != "invalid_scope" || s.Errors["dead"] != "invalid_request" {
			t.Errorf("%s: errors %v", way, s.Errors)
		}
		for _, id := range []string{s.Root.Grant, s.Derived.Grant} {
			g := must(grants.GetGrant(t.Context(), &dayflyv1.GetGrantRequest{Grant: id}))(t).GetGrant()
			if g.GetState() != dayflyv1.GrantState_GRANT_STATE_REVOKED {
				t.Errorf("%s: the records say %s of grant %s", way, g.GetState(), id)
			}
		}
	}
}

// TestStrangers: what is served to strangers is what verifiers need.
func TestStrangers(t *testing.T) {
	b := newBox(t, "", "")
	stranger := b.http(t, spiffeid.ID{})
	for path, want := range map[string]int{
		"/.well-known/openid-configuration": http.StatusOK, "/.well-known/oauth-authorization-server": http.StatusOK, "/jwks.json": http.StatusOK,
		"/": http.StatusNotFound, "/metrics": http.StatusNotFound, "/healthz": http.StatusNotFound, "/token": http.StatusMethodNotAllowed,
	} {
		resp := must(stranger.Get(b.Issuer + path))(t)
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("GET %s: %s, want %d", path, resp.Status, want)
		}
	}
}
