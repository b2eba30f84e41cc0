package e2e_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/asn1"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"hash"
	"math/big"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
)

// What a forgery comes to, at the broker and at a service.
type outcome struct {
	code    codes.Code
	reason  string
	service verify.Reason
}

var (
	accepted  = outcome{}
	malformed = outcome{codes.InvalidArgument, "SUBJECT_TOKEN_MALFORMED", verify.TokenMalformed}
	unsigned  = outcome{codes.PermissionDenied, "SUBJECT_TOKEN_SIGNATURE_INVALID", verify.SignatureInvalid}
	unknown   = outcome{codes.PermissionDenied, "SUBJECT_TOKEN_KEY_UNKNOWN", verify.KeyUnknown}
)

// TestForgedTokens presents the known forgeries of a JWT, made of a good token and of what
// is public, to the built broker and to a service.
func TestForgedTokens(t *testing.T) {
	ctx := t.Context()
	box := newBox(t)
	client := func(id spiffeid.ID) *sdk.Client { return must(box.Client(ctx, id, box.Info.GRPC))(t) }
	payments, orders, ledger := client(sandbox.Payments), client(sandbox.Orders), client(sandbox.Ledger)
	ordersService := must(box.StartService(ctx, sandbox.ServiceConfig{ID: sandbox.Orders, Audience: "orders", Feed: orders}))(t)
	ledgerService := must(box.StartService(ctx, sandbox.ServiceConfig{ID: sandbox.Ledger, Audience: "ledger", Feed: ledger}))(t)
	root := must(payments.Issue(ctx, sdk.Request{Audience: "orders"}))(t).Token
	derived := must(orders.Exchange(ctx, root, sdk.Request{Audience: "ledger"}))(t).Token.Reveal()
	good := root.Reveal()

	parts := strings.Split(good, ".")
	var head struct{ Kid string }
	if err := json.Unmarshal(decode(t, parts[0]), &head); err != nil {
		t.Fatal(err)
	}
	public := publicKey(ctx, t, box, head.Kid)
	check := func(name, raw string, want outcome, presenter spiffeid.ID, svc *sandbox.Service, deputy *sdk.Client, audience string) {
		t.Run(name, func(t *testing.T) {
			_, err := deputy.Exchange(t.Context(), token.NewSecret(raw), sdk.Request{Audience: audience})
			if want == accepted {
				if err != nil {
					t.Errorf("the broker: %v", err)
				}
			} else {
				wantError(t, err, want.code, want.reason)
			}
			_, err = box.Call(t.Context(), presenter, svc, token.NewSecret(raw))
			if want == accepted {
				if err != nil {
					t.Errorf("the service: %v", err)
				}
				return
			}
			var refused *sandbox.Refused
			if !errors.As(err, &refused) || refused.Status != http.StatusUnauthorized || refused.Reason != string(want.service) {
				t.Errorf("the service answers %v, want 401 %s", err, want.service)
			}
		})
	}
	for name, f := range forgeries(t, good, head.Kid, public) {
		check(name, f.raw, f.want, sandbox.Payments, ordersService, orders, "ledger")
	}
	for name, raw := range editedLineages(t, derived) {
		check(name, raw, unsigned, sandbox.Orders, ledgerService, ledger, "web")
	}
	jwtSVID := must(box.TD.IssueJWTSVID(sandbox.Payments, []string{"orders"}, spiffetest.SVIDOptions{}))(t)
	check("a JWT-SVID", jwtSVID, malformed, sandbox.Payments, ordersService, orders, "ledger")
	// Of another broker: the same issuer, audience and trust domain by name.
	twin := newBox(t)
	foreign := must(must(twin.Client(ctx, sandbox.Payments, twin.Info.GRPC))(t).Issue(ctx, sdk.Request{Audience: "orders"}))(t)
	check("of another broker", foreign.Token.Reveal(), unknown, sandbox.Payments, ordersService, orders, "ledger")

	// And ours where a JWT-SVID belongs, to one who even knows our key as an authority.
	authorities := jwtbundle.FromJWTAuthorities(sandbox.TrustDomain, map[string]crypto.PublicKey{head.Kid: public})
	if svid, err := jwtsvid.ParseAndValidate(good, authorities, []string{"orders"}); err == nil {
		t.Errorf("taken for the JWT-SVID of %s", svid.ID)
	}
	must(box.Call(ctx, sandbox.Payments, ordersService, root))(t) // as good as ever
}

type forgery struct {
	raw  string
	want outcome
}

// forgeries of a token that ES256 signed with a key of which the public half is known.
func forgeries(t *testing.T, good, kid string, public *ecdsa.PublicKey) map[string]forgery {
	t.Helper()
	out := map[string]forgery{}
	parts := strings.Split(good, ".")
	payload := string(decode(t, parts[1]))
	edited := encode(strings.Replace(payload, "orders.read", "orders.root", 1))
	header := func(alg, kid, more string) string {
		return encode(fmt.Sprintf(`{"alg":%q,"kid":%q,"typ":"at+jwt"%s}`, alg, kid, more))
	}
	for _, alg := range []string{"none", "None", "NONE", "nOnE", "none ", ""} {
		input := header(alg, kid, "") + "." + edited
		out[fmt.Sprintf("alg %q", alg)] = forgery{input + ".", malformed}
		out[fmt.Sprintf("alg %q with a signature", alg)] = forgery{input + "." + parts[2], malformed}
	}
	for name, secret := range encodings(t, public, kid) {
		for alg, h := range map[string]func() hash.Hash{"HS256": sha256.New, "HS384": sha512.New384, "HS512": sha512.New} {
			for _, said := range []string{alg, "ES256"} { // the true one, and the one that passes
				input := header(said, kid, "") + "." + edited
				mac := hmac.New(h, secret)
				mac.Write([]byte(input))
				want := malformed // ES256: of 32 or 48 bytes
				if said == "ES256" && alg == "HS512" {
					want = unsigned
				}
				out[alg+" as "+said+" with the public key: "+name] = forgery{input + "." + encode(string(mac.Sum(nil))), want}
			}
		}
	}
	for _, alg := range []string{"ES384", "ES512", "ES256K", "RS256", "PS256", "EdDSA", "Ed25519", "dir", "RSA-OAEP"} {
		out["alg "+alg] = forgery{header(alg, kid, "") + "." + parts[1] + "." + parts[2], malformed}
	}
	edPublic, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	edID := must(token.NewPublicKey(token.EdDSA, edPublic))(t).ID.String()
	ed := func(input string) string { return input + "." + encode(string(ed25519.Sign(edKey, []byte(input)))) }
	out["a stranger's EdDSA under our kid"] = forgery{ed(header("EdDSA", kid, "") + "." + edited), malformed}
	out["a stranger's EdDSA"] = forgery{ed(header("EdDSA", edID, "") + "." + encode(strings.ReplaceAll(payload, kid, edID))), unknown}

	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	mine := func(h, payload string) string { return h + "." + payload + "." + signES256(t, key, h+"."+payload) }
	for name, more := range map[string]string{
		"jwk": `,"jwk":` + jwk(t, &key.PublicKey), "x5u": `,"x5u":"https://stranger.test/cert"`, "x5t#S256": `,"x5t#S256":"AAAA"`,
		"crit": `,"crit":["exp"]`, "empty crit": `,"crit":[]`, "zip": `,"zip":"DEF"`, "cty": `,"cty":"JWT"`, "p2c": `,"p2c":2147483647`,
		"a second kid": fmt.Sprintf(`,"kid":%q`, kid), "a second alg": `,"alg":"none"`, "ALG": `,"ALG":"none"`, "a second typ": `,"typ":"JWT"`,
		"deep nesting": `,"x":` + strings.Repeat("[", 200) + strings.Repeat("]", 200),
	} {
		out[name+" in the header"] = forgery{mine(header("ES256", kid, more), edited), malformed}
	}
	for name, kid := range map[string]string{
		"empty": "", "path": "../../../../dev/null", "SQL": "x' UNION SELECT 'AAAA", "shell": "|sleep 9;", "URL": "https://stranger.test/keys", "long": strings.Repeat("A", 700),
	} {
		out["kid: "+name] = forgery{mine(header("ES256", kid, ""), edited), malformed}
	}
	for _, typ := range []string{"JWT", "JOSE", "AT+JWT", "application/at+jwt", "dpop+jwt", "id+jwt", ""} {
		out["typ "+typ] = forgery{mine(encode(fmt.Sprintf(`{"alg":"ES256","kid":%q,"typ":%q}`, kid, typ)), edited), malformed}
	}
	b64 := header("ES256", kid, `,"b64":false,"crit":["b64"]`)
	out["b64 false"] = forgery{b64 + "." + payload + "." + signES256(t, key, b64+"."+payload), malformed}
	out["as a JWE"] = forgery{encode(`{"alg":"dir","enc":"A256GCM"}`) + "..AAAA." + parts[1] + ".AAAA", malformed}
	out["a JWS in a JWS"] = forgery{mine(header("ES256", kid, ""), encode(good)), unsigned}
	out["as JSON"] = forgery{fmt.Sprintf(`{"protected":%q,"payload":%q,"signature":%q}`, parts[0], parts[1], parts[2]), malformed}
	out["padded"] = forgery{good + "==", malformed}
	out["in the other alphabet"] = forgery{parts[0] + "." + parts[1] + "." + strings.Repeat("+/", 43), malformed}
	out["twice"] = forgery{good + "." + good, malformed}
	out["with a comma"] = forgery{good + "," + good, malformed}

	signed := func(sig []byte) string { return parts[0] + "." + parts[1] + "." + encode(string(sig)) }
	n := elliptic.P256().Params().N
	sig := decode(t, parts[2])
	r, s := new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:])
	raw := func(r, s *big.Int) []byte {
		return append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)
	}
	der, err := asn1.Marshal(struct{ R, S *big.Int }{r, s})
	if err != nil {
		t.Fatal(err)
	}
	out["psychic signature"] = forgery{signed(make([]byte, 64)), unsigned}
	out["psychic signature of an edited token"] = forgery{parts[0] + "." + edited + "." + encode(string(make([]byte, 64))), unsigned}
	out["signature of the order"] = forgery{signed(raw(n, n)), unsigned}
	out["signature with s zero"] = forgery{signed(raw(r, new(big.Int))), unsigned}
	out["signature in ASN.1"] = forgery{signed(der), malformed}
	out["signature cut off"] = forgery{signed(sig[:63]), malformed}
	out["signature swapped"] = forgery{signed(raw(s, r)), unsigned}
	// The same token: its fingerprint is of what was signed.
	out["the other signature, n - s"] = forgery{signed(raw(r, new(big.Int).Sub(n, s))), accepted}
	return out
}

// encodings are the bytes that somebody could take for a secret.
func encodings(t *testing.T, key *ecdsa.PublicKey, kid string) map[string][]byte {
	t.Helper()
	der := must(x509.MarshalPKIXPublicKey(key))(t)
	block := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	point := must(key.Bytes())(t)
	return map[string][]byte{
		"DER": der, "PEM": block, "PEM without its line break": bytes.TrimSpace(block), "base64 of DER": []byte(encode(string(der))),
		"point": point, "x and y": point[1:], "x": point[1:33], "compressed": append([]byte{2 + point[64]&1}, point[1:33]...),
		"JWK": []byte(jwk(t, key)), "kid": []byte(kid), "nothing": {},
	}
}

// editedLineages of a derived token of two members, by who has no key.
func editedLineages(t *testing.T, derived string) map[string]string {
	t.Helper()
	parts := strings.Split(derived, ".")
	edit := func(change func(m, dfy map[string]any, lin []any)) string {
		m := map[string]any{}
		d := json.NewDecoder(bytes.NewReader(decode(t, parts[1])))
		d.UseNumber()
		if err := d.Decode(&m); err != nil {
			t.Fatal(err)
		}
		dfy := m["dfy"].(map[string]any)
		change(m, dfy, dfy["lin"].([]any))
		return parts[0] + "." + encode(string(must(json.Marshal(m))(t))) + "." + parts[2]
	}
	return map[string]string{
		"lineage reordered": edit(func(_, _ map[string]any, lin []any) { lin[0], lin[1] = lin[1], lin[0] }),
		"lineage without its root": edit(func(m, dfy map[string]any, lin []any) {
			m["sub"] = sandbox.Orders.String()
			delete(m, "act")
			dfy["lin"] = lin[1:]
		}),
		"lineage extended": edit(func(m, dfy map[string]any, lin []any) {
			m["act"] = map[string]any{"sub": sandbox.Web.String(), "act": m["act"]}
			dfy["lin"] = append(lin, lin[1])
		}),
		"another's root":         edit(func(m, _ map[string]any, _ []any) { m["sub"] = sandbox.Alice.String() }),
		"another presenter":      edit(func(m, _ map[string]any, _ []any) { m["client_id"] = sandbox.Web.String() }),
		"rev inflated":           edit(func(_, dfy map[string]any, _ []any) { dfy["rev"] = uint64(1) << 62 }),
		"an era to come":         edit(func(_, dfy map[string]any, _ []any) { dfy["era"] = "ffffffff" }),
		"unbound":                edit(func(_, dfy map[string]any, _ []any) { dfy["bnd"] = "none" }),
		"alive for ever":         edit(func(m, _ map[string]any, _ []any) { m["exp"] = 253402300799 }),
		"for somebody else":      edit(func(m, _ map[string]any, _ []any) { m["aud"] = "orders" }),
		"the payload of another": parts[0] + "." + encode("{}") + "." + parts[2],
	}
}

// TestImpostors: others who pose as the broker, over real mTLS. No client of ours says a
// word to them: not the SDK, not a verifier, not the built CLI and agent.
func TestImpostors(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	box := makeBox(t, "")
	partner := federate(t, box, spiffeid.RequireTrustDomainFromString("partner.test"))
	forger := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: sandbox.TrustDomain}) // our name, another authority
	for name, as := range map[string]struct {
		td *spiffetest.TrustDomain
		id spiffeid.ID
	}{
		"a workload":                       {box.TD, sandbox.Payments},
		"a name below the broker's":        {box.TD, identity(box.TD, "/dayfly/broker/x")},
		"a name that begins alike":         {box.TD, identity(box.TD, "/dayfly/broker2")},
		"the broker's path in upper case":  {box.TD, identity(box.TD, "/dayfly/Broker")},
		"the broker of a federated domain": {partner, identity(partner, "/dayfly/broker")},
		"our broker by another authority":  {forger, sandbox.Broker},
	} {
		t.Run(name, func(t *testing.T) {
			i := newImpostor(t, box, as.td.Source(as.id))
			address := i.lis.Addr().String()
			payments := must(box.Client(ctx, sandbox.Payments, address))(t)

			_, err := payments.Issue(ctx, sdk.Request{Audience: "orders"})
			wantNoConnection(t, err)
			_, err = payments.Exchange(ctx, token.NewSecret("hunter2"), sdk.Request{Audience: "orders"})
			wantNoConnection(t, err)

			v := must(verify.New(verify.Config{Conn: payments.Conn(), Audiences: []string{"orders"}}))(t)
			running, stop := context.WithCancel(ctx)
			ended := make(chan error, 1)
			go func() { ended <- v.Run(running) }()
			i.wait(ctx, t)
			if _, err := v.Verify(ctx, "x.y.z", verify.Peer{}); v.Status().Fresh || verify.ReasonOf(err) != verify.VerifierStale {
				t.Errorf("a verifier: %+v, %v", v.Status(), err)
			}
			stop()
			if err := <-ended; err != nil {
				t.Error(err)
			}

			cli := exec.CommandContext(ctx, filepath.Join(bin, "dayfly"), "locks",
				"--broker", address, "--broker-id", sandbox.Broker.String(), "--svid-socket", must(box.TD.Workload(sandbox.Alice))(t))
			out, err := cli.CombinedOutput()
			if cli.ProcessState.ExitCode() != 5 || !strings.Contains(string(out), "did not prove to be the broker") {
				t.Errorf("the CLI: %v\n%s", err, out)
			}

			askAgent(ctx, t, box, i)
			if n := i.calls.Load(); n != 0 {
				t.Errorf("%d calls reached the impostor", n)
			}
		})
	}
}

func identity(td *spiffetest.TrustDomain, path string) spiffeid.ID {
	return spiffeid.RequireFromPath(td.Name(), path)
}

// An impostor serves whatever is called, as an identity, and counts it.
type impostor struct {
	lis   net.Listener
	calls atomic.Int64
	tries atomic.Int64 // connections that have ended
}

func newImpostor(t *testing.T, box *sandbox.Sandbox, source spiffetest.Source) *impostor {
	t.Helper()
	i := &impostor{lis: must(net.Listen("tcp", "127.0.0.1:0"))(t)}
	server := grpc.NewServer(
		grpc.Creds(credentials.NewTLS(tlsconfig.MTLSServerConfig(source, box.TD, tlsconfig.AuthorizeAny()))),
		grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error {
			i.calls.Add(1)
			return status.Error(codes.Internal, "thank you")
		}))
	served := make(chan struct{})
	go func() { defer close(served); _ = server.Serve(&countingListener{i.lis, &i.tries}) }()
	t.Cleanup(func() { server.Stop(); <-served })
	return i
}

// wait waits until one more has tried, and gone away or made a call.
func (i *impostor) wait(ctx context.Context, t *testing.T) {
	t.Helper()
	for before := i.tries.Load(); i.tries.Load() == before && i.calls.Load() == 0; {
		select {
		case <-ctx.Done():
			t.Fatal("nobody tried")
		case <-time.After(time.Millisecond):
		}
	}
}

// A countingListener counts the ends of its connections.
type countingListener struct {
	net.Listener
	ended *atomic.Int64
}

func (l *countingListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	return &countingConn{Conn: conn, end: sync.OnceFunc(func() { l.ended.Add(1) })}, err
}

type countingConn struct {
	net.Conn
	end func()
}

func (c *countingConn) Close() error {
	defer c.end()
	return c.Conn.Close()
}

// askAgent starts the built agent with an impostor for its broker and asks it for a token
// that it can't get.
func askAgent(ctx context.Context, t *testing.T, box *sandbox.Sandbox, i *impostor) {
	t.Helper()
	broker := i.lis.Addr().String()
	socket := filepath.Join(box.Dir, broker[strings.LastIndexByte(broker, ':')+1:]+".sock")
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "dayfly-agent"), "--broker", broker, "--broker-id", sandbox.Broker.String(),
		"--workload-api", must(box.TD.Workload(sandbox.Payments))(t), "--grpc-socket", socket)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	i.wait(ctx, t)
	client := must(sdk.New(sdk.Config{Address: "unix://" + socket}))(t)
	defer client.Close()
	asked, cancel := context.WithCancel(ctx)
	answer := make(chan error, 1)
	go func() {
		_, err := dayflyv1.NewTokenServiceClient(client.Conn()).Issue(asked, &dayflyv1.IssueRequest{Audience: "orders"}, grpc.WaitForReady(true))
		answer <- err
	}()
	i.wait(ctx, t) // it tries again and again
	cancel()
	if err := <-answer; err == nil {
		t.Error("the agent got a token")
	}
}
