package clients_test

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// MinIO is AGPL: it is built and run beside us, and linked into nothing of ours.
const (
	minioModule  = "github.com/minio/minio"
	minioVersion = "v0.0.0-20260212201848-7aac2a2c5b7c"
)

// minioData is docs/federation/minio.md's example: an audience of its own for each workload
// of the shop, and for others one that means a role of MinIO's, or a policy by its name.
const minioData = `
audiences:
  "minio/{segment.3}": {owner: storage team, verified_by: external}
  minio-reader: {owner: storage team, verified_by: external}
  minio-scopes: {owner: storage team, verified_by: external}
entitlements:
  spiffe://dayfly.test/ns/shop/*:
    "minio/{segment.3}": {scopes: [], ttl: 10m, binding: none}
  spiffe://dayfly.test/ns/shop/payments:
    minio-reader: {scopes: [], ttl: 10m, binding: none}
    minio-scopes: {scopes: [readwrite, readonly], ttl: 10m, binding: none}
  spiffe://dayfly.test/ns/other/reports:
    minio-reader: {scopes: [], ttl: 5m, binding: none}
`

// TestMinIO uses a real token service: its sessions may do what the role of the token's
// audience says, end with our token unless somebody asks for longer, and can't be called
// back, which dayfly says.
func TestMinIO(t *testing.T) {
	b := newBox(t, "", minioData)
	m := startMinIO(t, b)
	ctx := t.Context()
	root := m.client(t, credentials.NewStaticV4(m.user, m.password, ""))
	if err := root.MakeBucket(ctx, "orders", minio.MakeBucketOptions{}); err != nil {
		t.Fatal(err)
	}
	writer := b.issue(t, sandbox.Payments, sdk.Request{Audience: "minio/payments"})
	wrote := m.client(t, m.assume(writer, roleARN("minio/payments"), 0))
	reader := b.issue(t, sandbox.Reports, sdk.Request{Audience: "minio-reader"})
	session := m.assume(reader, roleARN("minio-reader"), 0)

	t.Run("policy is enforced", func(t *testing.T) {
		put(t, wrote, nil)
		if got := get(t, wrote, nil); got != "7 shoes" {
			t.Errorf("read %q", got)
		}
		get(t, m.client(t, session), nil)
		put(t, m.client(t, session), errDenied)
		// The same identity in the lesser role: both sessions keep what is theirs.
		less := m.client(t, m.assume(b.issue(t, sandbox.Payments, sdk.Request{Audience: "minio-reader"}), roleARN("minio-reader"), 0))
		put(t, less, errDenied)
		put(t, wrote, nil)
	})
	t.Run("refused", func(t *testing.T) {
		orders := b.issue(t, sandbox.Payments, sdk.Request{Audience: "orders"})
		for what, creds := range map[string]*credentials.Credentials{
			"a token for orders":          m.assume(orders, roleARN("minio/payments"), 0),
			"a token for the lesser role": m.assume(reader, roleARN("minio/payments"), 0),
			"a token for a role, without": m.assume(writer, "", 0),
			"no secret's signature":       m.assumeRaw(forge(b.Issuer, ""), "", 0),
		} {
			if _, err := open(creds); err == nil {
				t.Errorf("%s got a session", what)
			}
		}
		// Whoever has the client secret may sign whatever they like: that is what it is.
		must(open(m.assumeRaw(forge(b.Issuer, m.secret), "", 0)))(t)
		for _, other := range []spiffeid.ID{sandbox.Orders, sandbox.Reports} {
			if _, err := b.client(t, other).Issue(ctx, sdk.Request{Audience: "minio/payments"}); !errors.Is(err, sdk.ErrPolicyDenied) {
				t.Errorf("%s asked for payments' role: %v", other, err)
			}
		}
	})
	t.Run("policies by scope", func(t *testing.T) {
		ask := func(scope string) *minio.Client {
			return m.client(t, m.assume(b.issue(t, sandbox.Payments, sdk.Request{Audience: "minio-scopes", Scopes: []string{scope}}), "", 0))
		}
		all := ask("readwrite")
		put(t, all, nil)
		put(t, ask("readonly"), errDenied)
		put(t, all, errDenied) // MinIO keeps one set of policies for each sub: the last session's
		if _, err := open(m.assume(b.issue(t, sandbox.Payments, sdk.Request{Audience: "minio-scopes"}), "", 0)); err == nil {
			t.Error("two scopes are no name of a policy")
		}
	})
	t.Run("expiry", func(t *testing.T) {
		if got := must(open(session))(t); !got.Expiration.Equal(reader.Expires) {
			t.Errorf("the session ends at %s, the token at %s", got.Expiration, reader.Expires)
		}
		// Brief, but on a slow machine long enough to be used.
		var brief *sdk.Credential
		var ends, outlives credentials.Value
		for ttl, err := 3*time.Second, error(io.EOF); err != nil; ttl *= 2 {
			brief = b.issue(t, sandbox.Payments, sdk.Request{Audience: "minio/payments", TTL: ttl})
			if ends, err = open(m.assume(brief, roleARN("minio/payments"), 0)); err == nil {
				outlives, err = open(m.assume(brief, roleARN("minio/payments"), 15*time.Minute))
			}
			if err != nil && time.Now().Before(brief.Expires) {
				t.Fatal(err)
			}
		}
		if outlives.Expiration.Sub(brief.Expires) < 14*time.Minute {
			t.Errorf("asked for 15m, the session ends at %s: docs/federation/minio.md says that it outlives the token", outlives.Expiration)
		}
		time.Sleep(time.Until(brief.Expires) + 1500*time.Millisecond)
		if _, err := open(m.assume(brief, roleARN("minio/payments"), 0)); err == nil {
			t.Error("an expired token got a session")
		}
		put(t, m.static(t, ends), errEnded)
		put(t, m.static(t, outlives), nil)
	})
	t.Run("AWS's SDK", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "minio.jwt")
		if err := os.WriteFile(file, []byte(writer.Token.Reveal()), 0o600); err != nil {
			t.Fatal(err)
		}
		for name, value := range map[string]string{ // docs/federation/aws.md
			"AWS_ROLE_ARN": roleARN("minio/payments"), "AWS_WEB_IDENTITY_TOKEN_FILE": file, "AWS_ROLE_SESSION_NAME": "payments",
			"AWS_ENDPOINT_URL_STS": "http://" + m.addr, "AWS_REGION": "us-east-1",
			"AWS_CONFIG_FILE": os.DevNull, "AWS_SHARED_CREDENTIALS_FILE": os.DevNull, "AWS_EC2_METADATA_DISABLED": "true",
		} {
			t.Setenv(name, value)
		}
		got := must(must(config.LoadDefaultConfig(ctx))(t).Credentials.Retrieve(ctx))(t)
		put(t, m.static(t, credentials.Value{AccessKeyID: got.AccessKeyID, SecretAccessKey: got.SecretAccessKey, SessionToken: got.SessionToken}), nil)
		if !got.CanExpire || got.Expires.After(writer.Expires) {
			t.Errorf("the session ends at %s, the token at %s", got.Expires, writer.Expires)
		}
	})
	t.Run("revoked", func(t *testing.T) {
		said, err := b.dayfly(t, sandbox.Alice, "revoke", "--identity", sandbox.Payments.String(), "--reason", "found in a ticket", "--yes", "--wait", "5s")
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 3 || !strings.Contains(said, "not beyond it") || !strings.Contains(said, "minio/payments") {
			t.Errorf("dayfly revoke: %v: %s", err, said)
		}
		put(t, wrote, nil) // and so it is
		if _, err := b.client(t, sandbox.Payments).Issue(ctx, sdk.Request{Audience: "minio/payments"}); !errors.Is(err, sdk.ErrIdentityLocked) {
			t.Errorf("another token: %v", err)
		}
		m.endSessions(t, b.Issuer, sandbox.Payments)
		put(t, wrote, errEnded)
		get(t, m.client(t, session), nil) // somebody else's
	})
}

const object = "2026/shoes.txt"

var (
	errDenied = errors.New("AccessDenied")
	errEnded  = errors.New("InvalidAccessKeyId") // MinIO has forgotten the session
)

func put(t *testing.T, c *minio.Client, want error) {
	t.Helper()
	text := "7 shoes"
	_, err := c.PutObject(t.Context(), "orders", object, strings.NewReader(text), int64(len(text)), minio.PutObjectOptions{})
	wantCode(t, "writing", err, want)
}

func get(t *testing.T, c *minio.Client, want error) string {
	t.Helper()
	o := must(c.GetObject(t.Context(), "orders", object, minio.GetObjectOptions{}))(t)
	defer o.Close()
	text, err := io.ReadAll(o)
	wantCode(t, "reading", err, want)
	return string(text)
}

func wantCode(t *testing.T, what string, err, want error) {
	t.Helper()
	code := ""
	if err != nil {
		code = minio.ToErrorResponse(err).Code
	}
	if (err == nil) != (want == nil) || want != nil && code != want.Error() {
		t.Errorf("%s: %v (%s), want %v", what, err, code, want)
	}
}

// roleARN is the name that MinIO gives to the role of a client ID.
func roleARN(clientID string) string {
	sum := sha1.Sum([]byte(clientID))
	return "arn:minio:iam:::role/" + base64.RawURLEncoding.EncodeToString(sum[:])
}

// forge makes a token that anybody can who knows the secret: MinIO takes HMAC with the
// client secret too, under the client ID as the key's name.
func forge(issuer, secret string) string {
	part := func(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }
	signed := part(`{"alg":"HS256","kid":"minio-scopes"}`) + "." + part(fmt.Sprintf(
		`{"iss":%q,"sub":"mallory","aud":"minio-scopes","scope":"readwrite","exp":%d}`, issuer, time.Now().Add(time.Hour).Unix()))
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write([]byte(signed))
	return signed + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// minioServer is one MinIO on loopback.
type minioServer struct{ addr, user, password, secret string }

func (m *minioServer) client(t *testing.T, creds *credentials.Credentials) *minio.Client {
	t.Helper()
	return must(minio.New(m.addr, &minio.Options{Creds: creds, MaxRetries: 1}))(t)
}

// endSessions ends an identity's sessions, as docs/federation/minio.md does at 3 a.m.
func (m *minioServer) endSessions(t *testing.T, issuer string, id spiffeid.ID) {
	t.Helper()
	sum := sha256.Sum256([]byte("openid:" + id.String() + ":" + issuer))
	out, err := exec.CommandContext(t.Context(), "curl", "-sS", "--fail-with-body", "--aws-sigv4", "aws:amz:us-east-1:s3", "--user", m.user+":"+m.password,
		"-H", "x-amz-content-sha256: "+hex.EncodeToString(sha256.New().Sum(nil)), "-X", "POST", "http://"+m.addr+"/minio/admin/v3/revoke-tokens/builtin?fullRevoke=true&user="+base64.RawURLEncoding.EncodeToString(sum[:])).CombinedOutput()
	if err != nil {
		t.Fatalf("ending sessions: %v: %s", err, out)
	}
}

// static is a client with a session as it is, that never asks for another.
func (m *minioServer) static(t *testing.T, v credentials.Value) *minio.Client {
	t.Helper()
	return m.client(t, credentials.NewStaticV4(v.AccessKeyID, v.SecretAccessKey, v.SessionToken))
}

// assume is AssumeRoleWithWebIdentity with a token of ours, as minio-go does it.
func (m *minioServer) assume(c *sdk.Credential, role string, duration time.Duration) *credentials.Credentials {
	return m.assumeRaw(c.Token.Reveal(), role, duration)
}

func (m *minioServer) assumeRaw(token, role string, duration time.Duration) *credentials.Credentials {
	return credentials.New(&credentials.STSWebIdentity{
		Client: http.DefaultClient, STSEndpoint: "http://" + m.addr, RoleARN: role,
		GetWebIDTokenExpiry: func() (*credentials.WebIdentityToken, error) {
			return &credentials.WebIdentityToken{Token: token, Expiry: int(duration / time.Second)}, nil
		},
	})
}

// open asks for the session itself.
func open(c *credentials.Credentials) (credentials.Value, error) {
	return c.GetWithContext(&credentials.CredContext{Client: http.DefaultClient})
}

// startMinIO starts a MinIO that trusts the issuer, as docs/federation/minio.md says.
func startMinIO(t *testing.T, b *box) *minioServer {
	t.Helper()
	m := &minioServer{addr: freePort(t), user: "root-of-test", password: rand.Text(), secret: rand.Text()}
	var log bytes.Buffer
	certs := t.TempDir()
	if err := errors.Join(os.Mkdir(filepath.Join(certs, "CAs"), 0o700), os.Link(b.WebCA(), filepath.Join(certs, "CAs", "issuer.pem"))); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(minioBinary(t), "server", "--quiet", "--certs-dir", certs, "--address", m.addr, t.TempDir())
	discovery := b.Issuer + "/.well-known/openid-configuration"
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir(),
		"MINIO_ROOT_USER="+m.user, "MINIO_ROOT_PASSWORD="+m.password, "MINIO_BROWSER=off", "MINIO_UPDATE=off",
		"MINIO_IDENTITY_OPENID_CONFIG_URL_WRITER="+discovery, "MINIO_IDENTITY_OPENID_ROLE_POLICY_WRITER=readwrite",
		"MINIO_IDENTITY_OPENID_CLIENT_ID_WRITER=minio/payments", "MINIO_IDENTITY_OPENID_CLIENT_SECRET_WRITER="+m.secret,
		"MINIO_IDENTITY_OPENID_CONFIG_URL_READER="+discovery, "MINIO_IDENTITY_OPENID_ROLE_POLICY_READER=readonly",
		"MINIO_IDENTITY_OPENID_CLIENT_ID_READER=minio-reader", "MINIO_IDENTITY_OPENID_CLIENT_SECRET_READER="+m.secret,
		"MINIO_IDENTITY_OPENID_CONFIG_URL="+discovery, "MINIO_IDENTITY_OPENID_CLAIM_NAME=scope",
		"MINIO_IDENTITY_OPENID_CLIENT_ID=minio-scopes", "MINIO_IDENTITY_OPENID_CLIENT_SECRET="+m.secret)
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, ended := make(chan error), make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // which Pdeathsig is about
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-ended
		if t.Failed() {
			t.Logf("MinIO: %s", log.String())
		}
	})
	for {
		select {
		case <-ended:
			t.Fatal("MinIO ended instead of serving")
		case <-time.After(50 * time.Millisecond):
		}
		// Ready, and not only alive: its identities load after it listens.
		if resp, err := http.Get("http://" + m.addr + "/minio/health/cluster"); err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return m
			}
		}
	}
}

// freePort finds a loopback address that nobody listens on.
func freePort(t *testing.T) string {
	t.Helper()
	l := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	defer l.Close()
	return l.Addr().String()
}

// minioBinary builds MinIO, once on each machine for each version of it and of Go.
func minioBinary(t *testing.T) string {
	t.Helper()
	cache := filepath.Join(must(os.UserCacheDir())(t), "dayfly-tools")
	binary := filepath.Join(cache, fmt.Sprintf("minio-%s-%s", minioVersion, runtime.Version()))
	if _, err := os.Stat(binary); err == nil {
		return binary
	}
	t.Logf("building MinIO, once: some minutes")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		t.Fatal(err)
	}
	dir := must(os.MkdirTemp(cache, "build"))(t) // on the same disk as the binary will be
	defer os.RemoveAll(dir)
	install := exec.CommandContext(context.WithoutCancel(t.Context()), "nice", "go", "install", minioModule+"@"+minioVersion)
	install.Dir = dir
	install.Env = append(os.Environ(), "GOBIN="+dir)
	if out, err := install.CombinedOutput(); err != nil {
		t.Fatalf("building MinIO: %v: %s", err, out)
	}
	if err := os.Rename(filepath.Join(dir, "minio"), binary); err != nil {
		t.Fatal(err)
	}
	return binary
}
