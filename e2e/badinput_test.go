package e2e_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/boltstore"
	"github.com/dayflyhq/dayfly/e2e/sandbox"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/feed"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"go.etcd.io/bbolt"
	"google.golang.org/grpc/codes"
)

// TestStrangersTokens presents what a stranger can make out of a good token and of what
// is public, to the broker for an exchange and to a service as a credential.
func TestStrangersTokens(t *testing.T) {
	ctx := t.Context()
	box := newBox(t)
	payments := must(box.Client(ctx, sandbox.Payments, box.Info.GRPC))(t)
	orders := must(box.Client(ctx, sandbox.Orders, box.Info.GRPC))(t)
	alice := must(box.Client(ctx, sandbox.Alice, box.Info.GRPC))(t)
	service := must(box.StartService(ctx, sandbox.ServiceConfig{ID: sandbox.Orders, Audience: "orders", Feed: orders}))(t)
	issue := func(r sdk.Request) *sdk.Credential { return must(payments.Issue(ctx, r))(t) }

	good := issue(sdk.Request{Audience: "orders"}).Token.Reveal()
	parts := strings.Split(good, ".")
	var head struct{ Kid string }
	if err := json.Unmarshal(decode(t, parts[0]), &head); err != nil {
		t.Fatal(err)
	}
	public := publicKey(ctx, t, box, head.Kid)
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	ours := must(token.NewPublicKey(token.ES256, &key.PublicKey))(t)
	header := func(alg, kid, more string) string {
		return encode(`{"alg":"` + alg + `","kid":"` + kid + `","typ":"at+jwt"` + more + `}`)
	}
	sign := func(input string) string { return input + "." + signES256(t, key, input) }
	payload := string(decode(t, parts[1]))
	edited := encode(strings.Replace(payload, "orders.read", "orders.root", 1))

	expired := issue(sdk.Request{Audience: "orders", TTL: time.Second})
	revoked := issue(sdk.Request{Audience: "orders"})
	position := must(dayflyv1.NewRevocationServiceClient(alice.Conn()).Revoke(ctx, &dayflyv1.RevokeRequest{
		Selectors: []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Grant{Grant: revoked.Grant}}}, Reason: "test",
	}))(t).GetRevocation().GetPosition()
	watch := must(dayflyv1.NewRevocationServiceClient(alice.Conn()).WatchContainment(ctx, &dayflyv1.WatchContainmentRequest{Sequence: position.GetSequence()}))(t)
	for !must(watch.Recv())(t).GetContainment().GetContained() {
	}
	<-time.After(time.Until(expired.Expires))

	for _, tc := range []struct {
		name    string
		token   string
		code    codes.Code // of an exchange
		reason  string
		service verify.Reason
	}{
		{"no token", "hunter2", codes.InvalidArgument, "SUBJECT_TOKEN_MALFORMED", verify.TokenMalformed},
		{"longer than any token", strings.Repeat("a", 4<<10), codes.InvalidArgument, "SUBJECT_TOKEN_MALFORMED", verify.TokenMalformed},
		{"expired", expired.Token.Reveal(), codes.PermissionDenied, "SUBJECT_TOKEN_EXPIRED", verify.TokenExpired},
		{"revoked", revoked.Token.Reveal(), codes.PermissionDenied, "SUBJECT_TOKEN_REVOKED", verify.TokenRevoked},
		{"for somebody else", issue(sdk.Request{Audience: "web"}).Token.Reveal(), codes.PermissionDenied, "SUBJECT_TOKEN_NOT_ADDRESSED", verify.AudienceMismatch},
		{"tampered", parts[0] + "." + edited + "." + parts[2], codes.PermissionDenied, "SUBJECT_TOKEN_SIGNATURE_INVALID", verify.SignatureInvalid},
		{"alg none", header("none", head.Kid, "") + "." + edited + ".", codes.InvalidArgument, "SUBJECT_TOKEN_MALFORMED", verify.TokenMalformed},
		{"alg none with a signature", header("none", head.Kid, "") + "." + edited + "." + parts[2], codes.InvalidArgument, "SUBJECT_TOKEN_MALFORMED", verify.TokenMalformed},
		{"HS256 with the public key", signHS256(t, public, header("HS256", head.Kid, "")+"."+edited), codes.InvalidArgument, "SUBJECT_TOKEN_MALFORMED", verify.TokenMalformed},
		{"a stranger's key under our kid", sign(header("ES256", head.Kid, "") + "." + edited), codes.PermissionDenied, "SUBJECT_TOKEN_SIGNATURE_INVALID", verify.SignatureInvalid},
		{"an unknown kid", sign(header("ES256", ours.ID.String(), "") + "." + encode(strings.ReplaceAll(payload, head.Kid, ours.ID.String()))), codes.PermissionDenied, "SUBJECT_TOKEN_KEY_UNKNOWN", verify.KeyUnknown},
		{"jku", sign(header("ES256", head.Kid, `,"jku":"https://stranger.test/jwks.json"`) + "." + edited), codes.InvalidArgument, "SUBJECT_TOKEN_MALFORMED", verify.TokenMalformed},
		{"an embedded key", sign(header("ES256", ours.ID.String(), `,"jwk":`+jwk(t, &key.PublicKey)) + "." + edited), codes.InvalidArgument, "SUBJECT_TOKEN_MALFORMED", verify.TokenMalformed},
		{"an embedded chain", sign(header("ES256", head.Kid, `,"x5c":["MIIB"]`) + "." + edited), codes.InvalidArgument, "SUBJECT_TOKEN_MALFORMED", verify.TokenMalformed},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := orders.Exchange(t.Context(), token.NewSecret(tc.token), sdk.Request{Audience: "ledger"})
			wantError(t, err, tc.code, tc.reason)
			if strings.Contains(err.Error(), parts[1]) || strings.Contains(err.Error(), "hunter2") {
				t.Error("the refusal quotes the token")
			}
			_, err = box.Call(t.Context(), sandbox.Payments, service, token.NewSecret(tc.token))
			var refused *sandbox.Refused
			if !errors.As(err, &refused) || refused.Status != http.StatusUnauthorized || refused.Reason != string(tc.service) {
				t.Errorf("the service answers %v, want 401 %s", err, tc.service)
			}
		})
	}
	// What all of them were made of is as good as ever.
	must(box.Call(ctx, sandbox.Payments, service, token.NewSecret(good)))(t)
	must(orders.Exchange(ctx, token.NewSecret(good), sdk.Request{Audience: "ledger"}))(t)
}

func encode(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }

func decode(t *testing.T, s string) []byte {
	t.Helper()
	return must(base64.RawURLEncoding.DecodeString(s))(t)
}

func signES256(t *testing.T, key *ecdsa.PrivateKey, input string) string {
	t.Helper()
	digest := sha256.Sum256([]byte(input))
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	return encode(string(r.FillBytes(make([]byte, 32))) + string(s.FillBytes(make([]byte, 32))))
}

// signHS256 uses a public key as a shared secret: the classic confusion.
func signHS256(t *testing.T, key *ecdsa.PublicKey, input string) string {
	t.Helper()
	mac := hmac.New(sha256.New, must(x509.MarshalPKIXPublicKey(key))(t))
	mac.Write([]byte(input))
	return input + "." + encode(string(mac.Sum(nil)))
}

func jwk(t *testing.T, key *ecdsa.PublicKey) string {
	t.Helper()
	point := must(key.Bytes())(t)
	return `{"kty":"EC","crv":"P-256","x":"` + encode(string(point[1:33])) + `","y":"` + encode(string(point[33:])) + `"}`
}

// publicKey fetches the broker's key from where everybody can.
func publicKey(ctx context.Context, t *testing.T, box *sandbox.Sandbox, kid string) *ecdsa.PublicKey {
	t.Helper()
	resp := must(http.DefaultClient.Do(must(http.NewRequestWithContext(ctx, http.MethodGet, "http://"+box.Info.Public+"/jwks.json", nil))(t)))(t)
	defer resp.Body.Close()
	var set struct {
		Keys []struct{ Kid, X, Y string }
	}
	if err := json.NewDecoder(resp.Body).Decode(&set); err != nil {
		t.Fatal(err)
	}
	for _, k := range set.Keys {
		if k.Kid == kid {
			return must(ecdsa.ParseUncompressedPublicKey(elliptic.P256(), slices.Concat([]byte{4}, decode(t, k.X), decode(t, k.Y))))(t)
		}
	}
	t.Fatalf("the JWKS has no key %s", kid)
	return nil
}

// TestOutsidePolicy asks the built broker, with the demo's policy, for what it doesn't
// give: each refusal has the policy's own reason.
func TestOutsidePolicy(t *testing.T) {
	ctx := t.Context()
	box := newBox(t)
	payments := must(box.Client(ctx, sandbox.Payments, box.Info.GRPC))(t)
	orders := must(box.Client(ctx, sandbox.Orders, box.Info.GRPC))(t)
	alice := must(box.Client(ctx, sandbox.Alice, box.Info.GRPC))(t)
	subject := must(payments.Issue(ctx, sdk.Request{Audience: "orders"}))(t).Token
	issue := func(r sdk.Request) func() error {
		return func() error { _, err := payments.Issue(ctx, r); return err }
	}
	exchange := func(r sdk.Request) func() error {
		return func() error { _, err := orders.Exchange(ctx, subject, r); return err }
	}
	revoke := func(c *sdk.Client, m *dayflyv1.RevokeRequest) func() error {
		return func() error { _, err := dayflyv1.NewRevocationServiceClient(c.Conn()).Revoke(ctx, m); return err }
	}
	nobody := []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Identity{Identity: "spiffe://dayfly.test/ns/nobody"}}}
	everything := []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Everything_{Everything: &dayflyv1.Selector_Everything{}}}}
	subtree := []*dayflyv1.Selector{{Selector: &dayflyv1.Selector_Subtree{Subtree: "spiffe://dayfly.test/ns/sh*"}}}
	for _, tc := range []struct {
		name   string
		call   func() error
		code   codes.Code
		reason string
		policy string
	}{
		{"an audience that isn't declared", issue(sdk.Request{Audience: "orderz"}), codes.PermissionDenied, "POLICY_DENIED", "audience_unknown"},
		{"an audience of others", issue(sdk.Request{Audience: "ledger"}), codes.PermissionDenied, "POLICY_DENIED", "no_entitlement"},
		{"a scope", issue(sdk.Request{Audience: "orders", Scopes: []string{"orders.read", "orders.root"}}), codes.PermissionDenied, "POLICY_DENIED", "scope_not_entitled"},
		{"a ttl", issue(sdk.Request{Audience: "orders", TTL: 6 * time.Minute}), codes.PermissionDenied, "POLICY_DENIED", "ttl_not_entitled"},
		{"a ttl above the cap", issue(sdk.Request{Audience: "orders", TTL: time.Hour + 1}), codes.InvalidArgument, "INVALID_REQUEST", ""},
		{"a negative ttl", issue(sdk.Request{Audience: "orders", TTL: -time.Second}), codes.InvalidArgument, "INVALID_REQUEST", ""},
		{"an exchange that isn't allowed", exchange(sdk.Request{Audience: "web"}), codes.PermissionDenied, "POLICY_DENIED", "exchange_not_allowed"},
		{"a scope of an exchange", exchange(sdk.Request{Audience: "ledger", Scopes: []string{"ledger.root"}}), codes.PermissionDenied, "POLICY_DENIED", "scope_not_entitled"},
		{"a revocation by a workload", revoke(payments, &dayflyv1.RevokeRequest{Selectors: nobody, Reason: "r"}), codes.PermissionDenied, "POLICY_DENIED", "not_operator"},
		{"everything without its flag", revoke(alice, &dayflyv1.RevokeRequest{Selectors: everything, Reason: "r"}), codes.InvalidArgument, "EVERYTHING_NOT_ALLOWED", ""},
		{"a selector of half a segment", revoke(alice, &dayflyv1.RevokeRequest{Selectors: subtree, Reason: "r"}), codes.InvalidArgument, "INVALID_REQUEST", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if e := wantError(t, tc.call(), tc.code, tc.reason); e.Metadata["policy_reason"] != tc.policy {
				t.Errorf("policy says %q, want %q", e.Metadata["policy_reason"], tc.policy)
			}
		})
	}
}

// TestRevokeMatchesNothing: it is recorded all the same, and the operator is told; one
// that matches is not warned of.
func TestRevokeMatchesNothing(t *testing.T) {
	box := newBox(t)
	must(must(box.Client(t.Context(), sandbox.Payments, box.Info.GRPC))(t).Issue(t.Context(), sdk.Request{Audience: "orders"}))(t)
	for id, warned := range map[string]bool{"spiffe://dayfly.test/ns/shop/paymentz": true, sandbox.Payments.String(): false} {
		cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "dayfly"), "revoke", "--identity", id, "--reason", "test", "--yes",
			"--broker", box.Info.GRPC, "--broker-id", sandbox.Broker.String(), "--svid-socket", must(box.TD.Workload(sandbox.Alice))(t))
		var stderr strings.Builder
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil || !strings.Contains(string(out), "recorded") || strings.Contains(stderr.String(), "no live grant matched") != warned {
			t.Errorf("%s: %v\n%s%s", id, err, out, stderr.String())
		}
	}
}

// TestServeRefusesStore starts the broker on what is no store of its own: it ends, with
// exit code 1, and says what is wrong and what to do. It never makes one.
func TestServeRefusesStore(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(t *testing.T, path string) error
		want   string
	}{
		{"missing", func(_ *testing.T, path string) error { return os.Remove(path) }, "dayfly-broker init"},
		{"foreign", func(_ *testing.T, path string) error {
			return os.WriteFile(path, []byte(strings.Repeat("not a store\n", 1000)), 0o600)
		}, "not a dayfly store"},
		{"newer", func(t *testing.T, path string) error {
			db := must(bbolt.Open(path, 0o600, nil))(t)
			return errors.Join(db.Update(func(tx *bbolt.Tx) error {
				return tx.Bucket([]byte("dayfly")).Put([]byte("schema"), []byte{0, 0, 0, 7})
			}), db.Close())
		}, "has schema 7, this program knows schema 1: use a newer dayfly-broker"},
		{"corrupt", func(_ *testing.T, path string) error { return os.Truncate(path, 3*4096) }, "corrupt"},
		{"open to others", func(_ *testing.T, path string) error { return os.Chmod(path, 0o644) }, "chmod 600"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			box := makeBox(t, "")
			if err := tc.change(t, box.StorePath()); err != nil {
				t.Fatal(err)
			}
			before, _ := os.ReadFile(box.StorePath())
			err := box.StartBroker(t.Context())
			if err == nil || !strings.Contains(err.Error(), "exit status 1") || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want exit status 1 and %q", err, tc.want)
			}
			if after, _ := os.ReadFile(box.StorePath()); string(after) != string(before) {
				t.Error("the file was changed")
			}
		})
	}
}

// TestClockFarOff starts a broker whose clock is an hour behind the newest record of its
// log: a warning, and no reason to refuse anybody.
func TestClockFarOff(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	box := makeBox(t, "")
	if err := os.Remove(box.StorePath()); err != nil {
		t.Fatal(err)
	}
	ahead := time.Now().Add(time.Hour)
	if err := boltstore.Create(box.StorePath(), broker.Record{
		Event:   feed.Event{Era: &feed.Era{Era: token.NextEra(0, ahead)}},
		Details: broker.Details{Time: ahead.UTC(), Actor: "test", Reason: "a clock that was ahead"},
	}); err != nil {
		t.Fatal(err)
	}
	if err := box.StartBroker(ctx); err != nil {
		t.Fatal(err)
	}
	payments := must(box.Client(ctx, sandbox.Payments, box.Info.GRPC))(t)
	orders := must(box.Client(ctx, sandbox.Orders, box.Info.GRPC))(t)
	service := must(box.StartService(ctx, sandbox.ServiceConfig{ID: sandbox.Orders, Audience: "orders", Feed: orders}))(t)
	cred := must(payments.Issue(ctx, sdk.Request{Audience: "orders"}))(t)
	must(box.Call(ctx, sandbox.Payments, service, cred.Token))(t)
	waitReady(ctx, t, box, func(body string) bool { return strings.Contains(body, "CLOCK_OFF") })
}

// TestBrokenPolicyKeepsTheLastGood breaks the policy folder under a running broker, and
// empties it: the last good policy decides, readiness says so, and mending is enough.
func TestBrokenPolicyKeepsTheLastGood(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	box := newBox(t)
	payments := must(box.Client(ctx, sandbox.Payments, box.Info.GRPC))(t)
	path := filepath.Join(box.PolicyDir(), "policy.rego")
	good := must(os.ReadFile(path))(t)
	for name, change := range map[string]func() error{
		"broken": func() error { return os.WriteFile(path, []byte("package dayfly\n\nallow if {"), 0o600) },
		"empty":  func() error { return os.Remove(path) },
	} {
		if err := change(); err != nil {
			t.Fatal(err)
		}
		waitReady(ctx, t, box, func(body string) bool { return strings.Contains(body, "POLICY_STALE") })
		must(payments.Issue(ctx, sdk.Request{Audience: "orders"}))(t)
		_, err := payments.Issue(ctx, sdk.Request{Audience: "ledger"})
		wantError(t, err, codes.PermissionDenied, "POLICY_DENIED")
		if err := os.WriteFile(path, good, 0o600); err != nil {
			t.Fatal(err)
		}
		waitReady(ctx, t, box, func(body string) bool { return !strings.Contains(body, "POLICY_STALE") })
		t.Logf("%s: kept, and mended", name)
	}
}

// waitReady asks for the broker's readiness until it is as wanted.
func waitReady(ctx context.Context, t *testing.T, box *sandbox.Sandbox, want func(body string) bool) {
	t.Helper()
	for {
		req := must(http.NewRequestWithContext(ctx, http.MethodGet, "http://"+box.Info.Admin+"/readyz", nil))(t)
		resp := must(http.DefaultClient.Do(req))(t)
		var body json.RawMessage
		err := json.NewDecoder(resp.Body).Decode(&body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("readiness: %s %s, %v", resp.Status, body, err)
		}
		if want(string(body)) {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("readiness stays %s", body)
		case <-time.After(20 * time.Millisecond): // there is no event to wait for over HTTP
		}
	}
}
