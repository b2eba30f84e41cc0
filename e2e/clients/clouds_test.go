package clients_test

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apiserver/pkg/apis/apiserver"
	"k8s.io/apiserver/pkg/apis/apiserver/install"
	"k8s.io/apiserver/pkg/apis/apiserver/validation"
	authenticationcel "k8s.io/apiserver/pkg/authentication/cel"
	"k8s.io/apiserver/pkg/cel/environment"
	"k8s.io/apiserver/plugin/pkg/authenticator/token/oidc"
)

// cloud is what a token service that nobody can run here says that it wants.
type cloud struct {
	name, audience string
	algorithms     []string
	life           time.Duration // from iat to exp, at most
	subject        int           // bytes of sub, at most
	discovery      []string      // what its document must name
}

// Of docs/federation/*.md, which say where each is from.
var clouds = []cloud{
	{"AWS", "sts.amazonaws.com", []string{"RS256", "RS384", "RS512", "ES256", "ES384", "ES512"}, 24 * time.Hour, 255,
		[]string{"issuer", "jwks_uri", "claims_supported", "response_types_supported", "subject_types_supported", "id_token_signing_alg_values_supported"}},
	{"Google Cloud", "https://iam.googleapis.com/projects/123456789012/locations/global/workloadIdentityPools/dayfly/providers/dayfly", []string{"RS256", "ES256"}, 24 * time.Hour, 127,
		[]string{"issuer", "jwks_uri", "response_types_supported", "subject_types_supported", "id_token_signing_alg_values_supported"}},
	{"Azure", "api://AzureADTokenExchange", []string{"RS256"}, time.Hour, 600,
		[]string{"issuer", "jwks_uri", "response_types_supported", "subject_types_supported", "id_token_signing_alg_values_supported"}},
}

// TestDiscoveryForClouds holds the documents and a token against what each cloud requires.
func TestDiscoveryForClouds(t *testing.T) {
	data := "audiences:\n"
	for _, c := range clouds {
		data += "  " + c.audience + ": {owner: cloud team, verified_by: external}\n"
	}
	data += "entitlements:\n  " + sandbox.Payments.String() + ":\n"
	for _, c := range clouds {
		data += "    " + c.audience + ": {scopes: [], ttl: 1h, binding: none}\n"
	}
	for _, algorithm := range []string{"ES256", "RS256"} {
		t.Run(algorithm, func(t *testing.T) {
			b := newBox(t, "algorithm: "+algorithm+"\n", data)
			orders := must(b.StartService(t.Context(), sandbox.ServiceConfig{ID: sandbox.Orders, Audience: "orders", Feed: b.client(t, sandbox.Orders)}))(t)
			must(b.Call(t.Context(), sandbox.Payments, orders, b.issue(t, sandbox.Payments, sdk.Request{Audience: "orders"}).Token))(t) // our own verifier
			document := getJSON(t, b, b.Issuer+"/.well-known/openid-configuration")
			keys := getJSON(t, b, document["jwks_uri"].(string))["keys"].([]any)
			for _, c := range clouds {
				if slices.Contains(c.algorithms, algorithm) {
					c.check(t, b, document, keys)
				}
			}
		})
	}
}

func (c *cloud) check(t *testing.T, b *box, document map[string]any, keys []any) {
	t.Helper()
	for _, field := range c.discovery {
		switch value := document[field].(type) {
		case string:
			if !strings.HasPrefix(value, "https://") {
				t.Errorf("%s: %s is %q", c.name, field, value)
			}
		case []any:
			if len(value) == 0 {
				t.Errorf("%s: %s is empty", c.name, field)
			}
		default:
			t.Errorf("%s: discovery has no %s", c.name, field)
		}
	}
	if document["issuer"] != b.Issuer {
		t.Errorf("%s: the document is of %v", c.name, document["issuer"])
	}
	parts := strings.Split(b.issue(t, sandbox.Payments, sdk.Request{Audience: c.audience}).Token.Reveal(), ".")
	header, claims := decodePart(t, parts[0]), decodePart(t, parts[1])
	alg, _ := header["alg"].(string)
	if !slices.Contains(c.algorithms, alg) || !slices.Contains(document["id_token_signing_alg_values_supported"].([]any), any(alg)) {
		t.Errorf("%s: alg %q", c.name, alg)
	}
	if !slices.ContainsFunc(keys, func(k any) bool {
		key := k.(map[string]any)
		return key["kid"] == header["kid"] && key["alg"] == alg && key["use"] == "sig" && key["kty"] != ""
	}) {
		t.Errorf("%s: no key %v among %v", c.name, header["kid"], keys)
	}
	sub, _ := claims["sub"].(string)
	if claims["iss"] != b.Issuer || claims["aud"] != c.audience || sub != sandbox.Payments.String() || len(sub) > c.subject {
		t.Errorf("%s: iss %v, aud %v, sub %v", c.name, claims["iss"], claims["aud"], sub)
	}
	iat, exp := claims["iat"].(float64), claims["exp"].(float64)
	if life := time.Duration(exp-iat) * time.Second; life <= 0 || life > c.life || iat > float64(time.Now().Unix()) || iat != float64(int64(iat)) {
		t.Errorf("%s: issued at %v, lives for %s", c.name, iat, life)
	}
	for name := range claims {
		if !slices.Contains(document["claims_supported"].([]any), any(name)) && name != "dfy" {
			t.Errorf("%s: claim %s is not announced", c.name, name)
		}
	}
}

func decodePart(t *testing.T, part string) map[string]any {
	t.Helper()
	var v map[string]any
	if err := json.Unmarshal(must(base64.RawURLEncoding.DecodeString(part))(t), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func getJSON(t *testing.T, b *box, url string) map[string]any {
	t.Helper()
	resp := must(b.http(t, spiffeid.ID{}).Get(url))(t)
	defer resp.Body.Close()
	var v map[string]any
	if err := json.NewDecoder(resp.Body).Decode(&v); err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("GET %s: %s, %v", url, resp.Status, err)
	}
	return v
}

var yamlBlock = regexp.MustCompile("(?s)```yaml\n(apiVersion: apiserver.*?)```")

// TestKubernetes loads the configuration of docs/federation/kubernetes.md as an API server
// does, and authenticates requests by it.
func TestKubernetes(t *testing.T) {
	b := newBox(t, "", `
audiences:
  kubernetes: {owner: cluster team, verified_by: external}
entitlements:
  spiffe://dayfly.test/ns/shop/*:
    kubernetes: {scopes: [], ttl: 1h, binding: none}
`)
	page := string(must(os.ReadFile("../../docs/federation/kubernetes.md"))(t))
	block := yamlBlock.FindStringSubmatch(page)
	if block == nil {
		t.Fatal("the page has no configuration")
	}
	text := strings.NewReplacer("https://broker.example.org", b.Issuer, "spiffe://example.org/", "spiffe://dayfly.test/").Replace(block[1])
	cfg := kubernetesConfig(t, text)
	cfg.JWT[0].Issuer.CertificateAuthority = string(must(os.ReadFile(b.WebCA()))(t))
	compiler := authenticationcel.NewCompiler(environment.MustBaseEnvSet(environment.DefaultCompatibilityVersion()))
	if problems := validation.ValidateAuthenticationConfiguration(compiler, cfg, nil); len(problems) > 0 {
		t.Fatal(problems.ToAggregate())
	}
	authenticator := must(oidc.New(t.Context(), oidc.Options{
		JWTAuthenticator: cfg.JWT[0], CAContentProvider: caContent(cfg.JWT[0].Issuer.CertificateAuthority), Compiler: compiler, SupportedSigningAlgs: oidc.AllValidSigningAlgorithms(),
	}))(t)
	for authenticator.HealthCheck() != nil { // it reads the discovery document in its own time
		select {
		case <-t.Context().Done():
			t.Fatal(authenticator.HealthCheck())
		case <-time.After(20 * time.Millisecond):
		}
	}

	cred := b.issue(t, sandbox.Payments, sdk.Request{Audience: "kubernetes", TTL: 5 * time.Minute})
	got, ok, err := authenticator.AuthenticateToken(t.Context(), cred.Token.Reveal())
	if err != nil || !ok {
		t.Fatalf("%v, %v", ok, err)
	}
	extra := got.User.GetExtra()
	if got.User.GetName() != "dayfly:"+sandbox.Payments.String() || len(got.User.GetGroups()) > 0 ||
		strings.Join(extra["dayfly.example.org/presenter"], " ") != sandbox.Payments.String() || strings.Join(extra["dayfly.example.org/grant"], " ") != cred.Grant {
		t.Errorf("authenticated %q of %v with %v", got.User.GetName(), got.User.GetGroups(), extra)
	}

	brief := b.issue(t, sandbox.Payments, sdk.Request{Audience: "kubernetes", TTL: time.Second})
	time.Sleep(time.Until(brief.Expires) + time.Second)
	for what, c := range map[string]struct {
		cred *sdk.Credential
		want string
	}{
		"another audience": {b.issue(t, sandbox.Payments, sdk.Request{Audience: "orders"}), "audience"},
		"expired":          {brief, "expired"},
		"too long":         {b.issue(t, sandbox.Payments, sdk.Request{Audience: "kubernetes"}), "10 minutes"},
	} {
		if _, ok, err := authenticator.AuthenticateToken(t.Context(), c.cred.Token.Reveal()); ok || err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, %v, want %q", what, ok, err, c.want)
		}
	}
}

// caContent is a certificateAuthority as the authenticator takes it.
type caContent string

func (c caContent) CurrentCABundleContent() []byte { return []byte(c) }

// kubernetesConfig reads a file of --authentication-config, strictly.
func kubernetesConfig(t *testing.T, text string) *apiserver.AuthenticationConfiguration {
	t.Helper()
	scheme := runtime.NewScheme()
	install.Install(scheme)
	codecs := serializer.NewCodecFactory(scheme, serializer.EnableStrict)
	obj, err := runtime.Decode(codecs.UniversalDecoder(apiserver.SchemeGroupVersion), []byte(text))
	if err != nil {
		t.Fatalf("%v:\n%s", err, text)
	}
	cfg, ok := obj.(*apiserver.AuthenticationConfiguration)
	if !ok {
		t.Fatalf("a %T", obj)
	}
	return cfg
}
