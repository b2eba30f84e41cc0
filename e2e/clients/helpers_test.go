package clients_test

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/oauth2/google"
	"k8s.io/client-go/rest"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

const (
	googleProvider = "//iam.googleapis.com/projects/123456789012/locations/global/workloadIdentityPools/dayfly/providers/dayfly"
	helperData     = `
audiences:
  "https:` + googleProvider + `": {owner: cloud team, verified_by: external}
  cluster: {owner: cluster team, verified_by: external}
entitlements:
  spiffe://dayfly.test/ns/shop/payments:
    "https:` + googleProvider + `": {scopes: [], ttl: 5m, binding: none}
    cluster: {scopes: [], ttl: 5m, binding: none}
`
)

// verifier is another's: by discovery and JWK set, for one audience.
func verifier(t *testing.T, b *box, audience string) *oidc.IDTokenVerifier {
	t.Helper()
	ctx := oidc.ClientContext(t.Context(), b.http(t, spiffeid.ID{}))
	provider := must(oidc.NewProvider(ctx, b.Issuer))(t)
	return provider.VerifierContext(ctx, &oidc.Config{ClientID: audience, SupportedSigningAlgs: []string{"ES256"}})
}

// TestAWSHelpers: AWS's own default chain finds sessions of MinIO by the agent's container
// endpoint and by a credential_process, and what it finds may write.
func TestAWSHelpers(t *testing.T) {
	b := newBox(t, "", minioData)
	m := startMinIO(t, b)
	root := m.client(t, credentials.NewStaticV4(m.user, m.password, ""))
	if err := root.MakeBucket(t.Context(), "orders", minio.MakeBucketOptions{}); err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{
		"AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.DevNull, "AWS_SHARED_CREDENTIALS_FILE": os.DevNull,
		"AWS_ACCESS_KEY_ID": "", "AWS_PROFILE": "",
	} {
		t.Setenv(name, value)
	}
	retrieve := func(t *testing.T) {
		t.Helper()
		got := must(must(config.LoadDefaultConfig(t.Context()))(t).Credentials.Retrieve(t.Context()))(t)
		put(t, m.static(t, credentials.Value{AccessKeyID: got.AccessKeyID, SecretAccessKey: got.SecretAccessKey, SessionToken: got.SessionToken}), nil)
		if !got.CanExpire || time.Until(got.Expires) > 10*time.Minute {
			t.Errorf("the session ends at %s, and the token lives 10 minutes", got.Expires)
		}
		t.Log("found by ", got.Source)
	}
	t.Run("container endpoint", func(t *testing.T) {
		dir, listen := t.TempDir(), freePort(t)
		file := filepath.Join(dir, "authorization")
		b.agentWith(t, sandbox.Payments, fmt.Sprintf("aws_container: {listen: %q, audience: minio/payments, role_arn: %q, sts_endpoint: %q, authorization_token_file: %q}\n",
			listen, roleARN("minio/payments"), "http://"+m.addr, file))
		t.Setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://"+listen+"/v1/credentials")
		t.Setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", file)
		retrieve(t)
		if err := os.WriteFile(filepath.Join(dir, "wrong"), []byte("guess"), 0o600); err != nil {
			t.Fatal(err)
		}
		t.Setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", filepath.Join(dir, "wrong"))
		if _, err := must(config.LoadDefaultConfig(t.Context()))(t).Credentials.Retrieve(t.Context()); err == nil || !strings.Contains(err.Error(), "AUTHORIZATION_INVALID") {
			t.Errorf("with a guess: %v", err)
		}
	})
	t.Run("credential_process", func(t *testing.T) {
		t.Setenv("DAYFLY_AGENT", must(b.StartAgent(t.Context(), sandbox.Payments))(t))
		process := func(audience string) {
			file := filepath.Join(t.TempDir(), "config")
			text := fmt.Sprintf("[default]\ncredential_process = %s helper aws --audience %s --role-arn %s --sts-endpoint http://%s\n", filepath.Join(bin, "dayfly"), audience, roleARN("minio/payments"), m.addr)
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			t.Setenv("AWS_CONFIG_FILE", file)
		}
		process("minio/payments")
		retrieve(t)
		process("minio/orders")
		if _, err := must(config.LoadDefaultConfig(t.Context()))(t).Credentials.Retrieve(t.Context()); err == nil || strings.Contains(err.Error(), "eyJ") {
			t.Errorf("another's audience: %v", err)
		}
	})
}

// agentWith runs an agent of an identity with more lines in its configuration, until the
// test ends. When it returns, the agent is ready.
func (b *box) agentWith(t *testing.T, id spiffeid.ID, more string) {
	t.Helper()
	dir := t.TempDir()
	file, socket := filepath.Join(dir, "agent.yaml"), filepath.Join(dir, "h.sock")
	text := fmt.Sprintf("broker: {address: %q, id: %q}\nworkload_api: %q\nsockets: {http: %q}\n%s", b.Info.GRPC, sandbox.Broker, must(b.TD.Workload(id))(t), socket, more)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	cmd := exec.Command(filepath.Join(bin, "dayfly-agent"), "--config", file)
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-ended
		if t.Failed() {
			t.Log(log.String())
		}
	})
	for exec.CommandContext(t.Context(), "curl", "-sf", "--unix-socket", socket, "http://agent/readyz").Run() != nil {
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("the agent ended: %v", err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// TestGoogleHelper: Google's library runs the helper, trades the token at a token service
// of the test's, and reads failures and the output file.
func TestGoogleHelper(t *testing.T) {
	b := newBox(t, "", helperData)
	t.Setenv("DAYFLY_AGENT", must(b.StartAgent(t.Context(), sandbox.Payments))(t))
	t.Setenv("GOOGLE_EXTERNAL_ACCOUNT_ALLOW_EXECUTABLES", "1")
	check := verifier(t, b, "https:"+googleProvider)
	var traded []string
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got, err := check.Verify(r.Context(), r.PostFormValue("subject_token"))
		if err != nil || got.Subject != sandbox.Payments.String() || r.PostFormValue("audience") != googleProvider {
			http.Error(w, `{"error":"invalid_grant"}`, http.StatusBadRequest)
			t.Errorf("the token service got a token that is not good: %v", err)
			return
		}
		traded = append(traded, r.PostFormValue("subject_token"))
		w.Header().Set("Content-Type", "application/json")
		io.WriteString(w, `{"access_token":"google","issued_token_type":"urn:ietf:params:oauth:token-type:access_token","token_type":"Bearer","expires_in":3600}`)
	}))
	t.Cleanup(service.Close)
	ask := func(command string, output string) (string, error) {
		executable := map[string]any{"command": filepath.Join(bin, "dayfly") + " helper gcp" + command, "timeout_millis": 60000}
		if output != "" {
			executable["output_file"] = output
		}
		account := must(json.Marshal(map[string]any{
			"type": "external_account", "audience": googleProvider, "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
			"token_url": service.URL, "credential_source": map[string]any{"executable": executable},
		}))(t)
		creds := must(google.CredentialsFromJSONWithType(t.Context(), account, google.ExternalAccount, "https://www.googleapis.com/auth/cloud-platform"))(t)
		token, err := creds.TokenSource.Token()
		if err != nil {
			return "", err
		}
		return token.AccessToken, nil
	}
	if got := must(ask("", ""))(t); got != "google" {
		t.Errorf("got %q", got)
	}
	if _, err := ask(" --audience ledger", ""); err == nil || !strings.Contains(err.Error(), "POLICY_DENIED") || !strings.Contains(err.Error(), "403") || strings.Contains(err.Error(), "eyJ") {
		t.Errorf("refused: %v", err)
	}
	file := filepath.Join(t.TempDir(), "google.json")
	must(ask("", file))(t)
	must(ask(" --audience never", file))(t) // from the file: nobody is run
	if len(traded) != 3 || traded[1] != traded[2] {
		t.Errorf("%d trades, and the output file wasn't read", len(traded))
	}
}

// TestKubernetesHelper: client-go runs the helper as its exec plugin, once for as long as
// the token lives, and the server can verify the bearer by discovery.
func TestKubernetesHelper(t *testing.T) {
	b := newBox(t, "", helperData)
	agent := must(b.StartAgent(t.Context(), sandbox.Payments))(t)
	check := verifier(t, b, "cluster")
	var asked atomic.Int64
	api := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		bearer, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		got, err := check.Verify(r.Context(), bearer)
		if err != nil {
			http.Error(w, "no", http.StatusUnauthorized)
			return
		}
		io.WriteString(w, got.Subject)
	}))
	t.Cleanup(api.Close)
	host := strings.TrimPrefix(api.URL, "https://")
	get := func(version string, args ...string) (string, error) {
		client, err := rest.HTTPClientFor(&rest.Config{
			Host:            api.URL,
			TLSClientConfig: rest.TLSClientConfig{CAData: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: api.Certificate().Raw})},
			ExecProvider: &clientcmdapi.ExecConfig{
				APIVersion: version, Command: filepath.Join(bin, "dayfly"), Args: append([]string{"helper", "kubernetes"}, args...),
				Env: []clientcmdapi.ExecEnvVar{{Name: "DAYFLY_AGENT", Value: agent}}, InteractiveMode: clientcmdapi.NeverExecInteractiveMode, ProvideClusterInfo: true,
			},
		})
		if err != nil {
			return "", err
		}
		resp, err := client.Get(api.URL)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		return string(body), err
	}
	const v1 = "client.authentication.k8s.io/v1"
	for _, args := range [][]string{{"--audience", "cluster"}, {"--server", host + "=cluster"}} {
		if got := must(get(v1, args...))(t); got != sandbox.Payments.String() {
			t.Errorf("%v: the server saw %q", args, got)
		}
	}
	before := asked.Load()
	for what, refused := range map[string][]string{"another cluster": {v1, "--server", "api.example.org=cluster"}, "no entitlement": {v1, "--audience", "ledger"},
		"an old version": {"client.authentication.k8s.io/v1beta1", "--audience", "cluster"}} {
		if _, err := get(refused[0], refused[1:]...); err == nil {
			t.Errorf("%s: no error", what)
		}
	}
	if asked.Load() != before {
		t.Error("requests went out without a token")
	}
}
