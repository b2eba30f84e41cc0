package clients_test

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// bin is where the built commands are.
var bin string

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "dayfly-bin")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	bin = dir
	// As the product's own go.mod says: this module's versions may be other ones.
	build := exec.Command("go", "build", "-C", "../..", "-o", dir, "./cmd/...")
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "building the commands:", err)
		return 1
	}
	return m.Run()
}

// box is a dayfly made of the built commands, with its broker started.
type box struct {
	*sandbox.Sandbox
	clients map[spiffeid.ID]*sdk.Client
}

// newBox starts one, with more of the broker's configuration and more policy data. Copies
// of its JWK set are good for a second, so that outside audiences wait no longer for a key.
func newBox(t *testing.T, brokerConfig, data string) *box {
	t.Helper()
	b := &box{Sandbox: must(sandbox.New(sandbox.Config{
		Broker:       []string{filepath.Join(bin, "dayfly-broker")},
		Agent:        []string{filepath.Join(bin, "dayfly-agent")},
		BrokerConfig: "jwks_max_age: 1s\n" + brokerConfig,
	}))(t), clients: map[spiffeid.ID]*sdk.Client{}}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(b.Log("broker"))
		}
		b.Close()
	})
	if data != "" {
		if err := os.WriteFile(filepath.Join(b.PolicyDir(), "more.yaml"), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.StartBroker(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := b.AwaitSpread(t.Context()); err != nil {
		t.Fatal(err)
	}
	return b
}

// client is an identity's, by gRPC.
func (b *box) client(t *testing.T, id spiffeid.ID) *sdk.Client {
	t.Helper()
	if b.clients[id] == nil {
		b.clients[id] = must(b.Client(t.Context(), id, b.Info.GRPC))(t)
	}
	return b.clients[id]
}

// issue gets a credential as an identity, by gRPC, as soon as its key may sign for the
// audience.
func (b *box) issue(t *testing.T, id spiffeid.ID, req sdk.Request) *sdk.Credential {
	t.Helper()
	for {
		cred, err := b.client(t, id).Issue(t.Context(), req)
		var refused *sdk.Error
		if !errors.As(err, &refused) || refused.Reason != "KEY_NOT_SPREAD_YET" {
			return must(cred, err)(t)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// http returns a client that verifies the issuer by its web certificate and shows the
// identity's X.509-SVID; none with the zero ID.
func (b *box) http(t *testing.T, id spiffeid.ID) *http.Client {
	t.Helper()
	return must(b.HTTP(t.Context(), id))(t)
}

// dayfly runs the command as an identity, and returns what it printed.
func (b *box) dayfly(t *testing.T, id spiffeid.ID, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "dayfly"), args...)
	cmd.Env = append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET="+must(b.TD.Workload(id))(t),
		"DAYFLY_BROKER="+b.Info.GRPC, "DAYFLY_BROKER_ID="+sandbox.Broker.String())
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// must unwraps a result, or ends the test: must(f())(t).
func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}
