package spiffetest_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/dayflyhq/dayfly/sdk/spiffetest"
)

var (
	domain   = spiffeid.RequireTrustDomainFromString("example.org")
	other    = spiffeid.RequireTrustDomainFromString("other.test")
	payments = spiffeid.RequireFromString("spiffe://example.org/payments")
	orders   = spiffeid.RequireFromString("spiffe://example.org/orders")
)

func newDomain(t *testing.T) *spiffetest.TrustDomain {
	t.Helper()
	return spiffetest.ForTest(t, spiffetest.Config{TrustDomain: domain})
}

func workloadAddr(t *testing.T, td *spiffetest.TrustDomain, id spiffeid.ID) string {
	t.Helper()
	addr, err := td.Workload(id)
	if err != nil {
		t.Fatalf("Workload(%s): %v", id, err)
	}
	return addr
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// testContext is generous: only a hang should end it.
func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func client(t *testing.T, addr string) *workloadapi.Client {
	t.Helper()
	c, err := workloadapi.New(testContext(t), workloadapi.WithAddr(addr))
	must(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// impatient retries at once, so that recovery is tested without waiting for
// go-spiffe's backoff.
type impatient struct{}

func (impatient) NewBackoff() workloadapi.Backoff { return impatient{} }
func (impatient) Next() time.Duration             { return time.Millisecond }
func (impatient) Reset()                          {}

func newSource(t *testing.T, addr string) *workloadapi.X509Source {
	t.Helper()
	source, err := workloadapi.NewX509Source(testContext(t), workloadapi.WithClientOptions(
		workloadapi.WithAddr(addr), workloadapi.WithBackoffStrategy(impatient{})))
	must(t, err)
	t.Cleanup(func() { source.Close() })
	return source
}

// waitFor waits for updates of the source until cond holds.
func waitFor(t *testing.T, source *workloadapi.X509Source, what string, cond func() bool) {
	t.Helper()
	ctx := testContext(t)
	for !cond() {
		select {
		case <-source.Updated():
		case <-ctx.Done():
			t.Fatalf("never saw: %s", what)
		}
	}
}

func leaf(t *testing.T, source x509svid.Source) *x509svid.SVID {
	t.Helper()
	svid, err := source.GetX509SVID()
	must(t, err)
	return svid
}

func TestSocketIsTheIdentity(t *testing.T) {
	td := newDomain(t)
	for _, id := range []spiffeid.ID{payments, orders} {
		source := newSource(t, workloadAddr(t, td, id))
		svid := leaf(t, source)
		if svid.ID != id {
			t.Errorf("socket of %s gives %s", id, svid.ID)
		}
		if got, _, err := x509svid.Verify(svid.Certificates, source); err != nil || got != id {
			t.Errorf("Verify = %v, %v, want %v", got, err, id)
		}
	}
	if a, b := workloadAddr(t, td, payments), workloadAddr(t, td, payments); a != b {
		t.Errorf("asked twice: %s, then %s", a, b)
	}
	if _, err := td.Workload(spiffeid.RequireFromString("spiffe://other.test/x")); err == nil {
		t.Error("a foreign identity was served")
	}
	if _, err := td.Workload(domain.ID()); err == nil {
		t.Error("the trust domain's own ID was served as a workload")
	}
}

func TestManyIdentities(t *testing.T) {
	td := newDomain(t)
	for i := range 200 {
		id := spiffeid.RequireFromPathf(domain, "/ns/n%d", i)
		svid, err := client(t, workloadAddr(t, td, id)).FetchX509SVID(testContext(t))
		must(t, err)
		if svid.ID != id {
			t.Fatalf("got %s, want %s", svid.ID, id)
		}
	}
	if got := len(td.Identities()); got != 200 {
		t.Errorf("%d identities, want 200", got)
	}
}

func TestRotatePushesNewKeyAndSerial(t *testing.T) {
	td := newDomain(t)
	source := newSource(t, workloadAddr(t, td, payments))
	before := leaf(t, source)
	must(t, td.Rotate(payments))
	waitFor(t, source, "another serial number", func() bool {
		return leaf(t, source).Certificates[0].SerialNumber.Cmp(before.Certificates[0].SerialNumber) != 0
	})
	after := leaf(t, source)
	if bytes.Equal(after.Certificates[0].RawSubjectPublicKeyInfo, before.Certificates[0].RawSubjectPublicKeyInfo) {
		t.Error("the key is the same after rotation")
	}
	if err := td.Rotate(orders); err == nil {
		t.Error("rotating an unknown identity succeeded")
	}
}

func TestRotatesByItselfAtHalfLife(t *testing.T) {
	td := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: domain, SVIDTTL: 500 * time.Millisecond})
	source := newSource(t, workloadAddr(t, td, payments))
	first := leaf(t, source)
	waitFor(t, source, "a renewed SVID", func() bool {
		return !leaf(t, source).Certificates[0].Equal(first.Certificates[0])
	})
}

func TestSourceInBubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		td := newDomain(t)
		source := td.Source(payments)
		first := leaf(t, source)
		if got, want := first.Certificates[0].NotBefore, time.Now().Add(-10*time.Second).UTC(); !got.Equal(want) {
			t.Errorf("NotBefore = %v, want %v", got, want)
		}
		time.Sleep(29 * time.Minute)
		if got := leaf(t, source); got != first {
			t.Error("rotated before half of its life")
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		renewed := leaf(t, source)
		if renewed == first {
			t.Error("not rotated after half of its life")
		}
		if _, _, err := x509svid.Verify(renewed.Certificates, source); err != nil {
			t.Error(err)
		}
		time.Sleep(30 * time.Minute)
		if _, _, err := x509svid.Verify(first.Certificates, source); err == nil {
			t.Error("an SVID outlived its TTL")
		}
	})
}

func TestOwnClock(t *testing.T) {
	now := time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
	td := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: domain, Now: func() time.Time { return now }})
	first := leaf(t, td.Source(payments))
	if got, want := first.Certificates[0].NotAfter, now.Add(time.Hour); !got.Equal(want) {
		t.Errorf("NotAfter = %v, want %v", got, want)
	}
	now = now.Add(30 * time.Minute)
	if leaf(t, td.Source(payments)) == first {
		t.Error("not replaced when asked for at half of its life by the given clock")
	}
}

func TestFederationComesAndGoes(t *testing.T) {
	td := newDomain(t)
	foreign := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: other})
	source := newSource(t, workloadAddr(t, td, payments))
	trusts := func() bool {
		_, err := source.GetX509BundleForTrustDomain(other)
		return err == nil
	}
	if trusts() {
		t.Fatal("a trust domain is federated before Federate")
	}
	must(t, td.Federate(foreign.Bundle()))
	waitFor(t, source, "the federated bundle", trusts)
	svid := leaf(t, foreign.Source(spiffeid.RequireFromPath(other, "/x")))
	if _, _, err := x509svid.Verify(svid.Certificates, source); err != nil {
		t.Errorf("an SVID of the federated trust domain: %v", err)
	}
	set, err := client(t, workloadAddr(t, td, payments)).FetchX509Bundles(testContext(t))
	must(t, err)
	if !set.Has(domain) || !set.Has(other) {
		t.Errorf("FetchX509Bundles gave %d bundles, not the own and the federated one", set.Len())
	}
	must(t, td.Unfederate(other))
	waitFor(t, source, "the federated bundle gone", func() bool { return !trusts() })
	if err := td.Federate(td.Bundle()); err == nil {
		t.Error("federated with itself")
	}
}

func TestRotateCATwiceEndsTrust(t *testing.T) {
	td := newDomain(t)
	source := newSource(t, workloadAddr(t, td, payments))
	old := leaf(t, source)
	verify := func() error {
		_, _, err := x509svid.Verify(old.Certificates, source)
		return err
	}
	changed := func() bool {
		b, err := source.GetX509BundleForTrustDomain(domain)
		must(t, err)
		return b.Equal(td.Bundle())
	}
	must(t, td.RotateCA())
	waitFor(t, source, "the new authority", changed)
	must(t, verify())
	must(t, td.RotateCA())
	waitFor(t, source, "the newest authority", changed)
	if verify() == nil {
		t.Error("an SVID of an authority that left the bundle verifies")
	}
	if _, _, err := x509svid.Verify(leaf(t, source).Certificates, source); err != nil {
		t.Errorf("the pushed SVID isn't of the new authority: %v", err)
	}
}

func TestDenied(t *testing.T) {
	td := newDomain(t)
	c := client(t, workloadAddr(t, td, payments))
	ctx := testContext(t)
	_, err := c.FetchX509SVID(ctx)
	must(t, err)

	conn, err := grpc.NewClient(workloadAddr(t, td, payments), grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer conn.Close()
	stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(withHeader(ctx), &workload.X509SVIDRequest{})
	must(t, err)
	_, err = stream.Recv()
	must(t, err)

	must(t, td.SetDenied(payments, true))
	if _, err := stream.Recv(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("an open stream ended with %v, want PermissionDenied", err)
	}
	_, fetchErr := c.FetchX509SVID(ctx)
	_, jwtErr := c.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "a"})
	_, bundleErr := c.FetchX509Bundles(ctx)
	for name, err := range map[string]error{"SVID": fetchErr, "JWT-SVID": jwtErr, "bundles": bundleErr} {
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: %v, want PermissionDenied", name, err)
		}
	}
	if _, err := td.Source(payments).GetX509SVID(); !errors.Is(err, spiffetest.ErrDenied) {
		t.Errorf("source: %v, want ErrDenied", err)
	}
	must(t, td.SetDenied(payments, false))
	if _, err := c.FetchX509SVID(ctx); err != nil {
		t.Errorf("after the denial ended: %v", err)
	}
}

// One socket may return several SVIDs: each rotates, is denied and comes back by itself.
func TestOthers(t *testing.T) {
	td := newDomain(t)
	addr := workloadAddr(t, td, payments)
	must(t, td.SetOthers(payments, orders))
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer conn.Close()
	stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(withHeader(testContext(t)), &workload.X509SVIDRequest{})
	must(t, err)
	last := map[string]string{}
	next := func(want ...spiffeid.ID) (changed []string) {
		t.Helper()
		m, err := stream.Recv()
		must(t, err)
		if len(m.GetSvids()) != len(want) {
			t.Fatalf("%d SVIDs, want %v", len(m.GetSvids()), want)
		}
		for i, s := range m.GetSvids() {
			if s.GetSpiffeId() != want[i].String() {
				t.Errorf("SVID %d is of %s, want %s", i, s.GetSpiffeId(), want[i])
			}
			if last[s.GetSpiffeId()] != string(s.GetX509Svid()) {
				changed = append(changed, s.GetSpiffeId())
			}
			last[s.GetSpiffeId()] = string(s.GetX509Svid())
		}
		return changed
	}
	next(payments, orders)
	must(t, td.Rotate(orders))
	if changed := next(payments, orders); len(changed) != 1 || changed[0] != orders.String() {
		t.Errorf("%v changed, want orders", changed)
	}
	must(t, td.SetDenied(payments, true))
	next(orders)
	must(t, td.SetDenied(payments, false))
	next(payments, orders)
	must(t, td.SetOthers(payments))
	next(payments)
	must(t, td.SetDenied(payments, true))
	if _, err := stream.Recv(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("%v, want PermissionDenied", err)
	}
}

func TestSecurityHeader(t *testing.T) {
	td := newDomain(t)
	conn, err := grpc.NewClient(workloadAddr(t, td, payments), grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer conn.Close()
	api, ctx := workload.NewSpiffeWorkloadAPIClient(conn), testContext(t)
	stream, err := api.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	must(t, err)
	_, streamErr := stream.Recv()
	_, unaryErr := api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}})
	for name, err := range map[string]error{"stream": streamErr, "unary": unaryErr} {
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s without the header: %v, want InvalidArgument", name, err)
		}
	}
}

func TestSocketStopsAndStarts(t *testing.T) {
	td := newDomain(t)
	addr := workloadAddr(t, td, payments)
	source := newSource(t, addr)
	path := strings.TrimPrefix(addr, "unix://")

	must(t, td.StopSocket(payments))
	must(t, td.StopSocket(payments))
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket file is still there: %v", err)
	}
	must(t, td.Rotate(payments))
	want := leaf(t, td.Source(payments)).Certificates[0]
	if leaf(t, source).Certificates[0].Equal(want) {
		t.Error("a stopped socket pushed an SVID")
	}
	must(t, td.StartSocket(payments))
	must(t, td.StartSocket(payments))
	waitFor(t, source, "the SVID made while the socket was away", func() bool {
		return leaf(t, source).Certificates[0].Equal(want)
	})
	if got := workloadAddr(t, td, payments); got != addr {
		t.Errorf("address %s after a restart, want %s", got, addr)
	}
}

func TestJWTSVID(t *testing.T) {
	td := newDomain(t)
	foreign := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: other})
	c, ctx := client(t, workloadAddr(t, td, payments)), testContext(t)

	svid, err := c.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "https://broker"})
	must(t, err)
	bundles, err := c.FetchJWTBundles(ctx)
	must(t, err)
	if got, err := jwtsvid.ParseAndValidate(svid.Marshal(), bundles, []string{"https://broker"}); err != nil || got.ID != payments {
		t.Errorf("go-spiffe's validation: %v, %v", got, err)
	}
	if _, err := c.ValidateJWTSVID(ctx, svid.Marshal(), "https://broker"); err != nil {
		t.Errorf("the Workload API's validation: %v", err)
	}
	if _, err := c.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "a", Subject: orders}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a JWT-SVID of another identity: %v, want PermissionDenied", err)
	}

	stranger := spiffeid.RequireFromPath(other, "/x")
	now := time.Now()
	mint := func(td *spiffetest.TrustDomain, id spiffeid.ID, opts spiffetest.SVIDOptions) string {
		token, err := td.IssueJWTSVID(id, []string{"https://broker"}, opts)
		must(t, err)
		return token
	}
	expired := mint(td, orders, spiffetest.SVIDOptions{NotBefore: now.Add(-time.Hour), NotAfter: now.Add(-time.Minute)})
	foreignToken := mint(foreign, stranger, spiffetest.SVIDOptions{})
	for name, bad := range map[string][2]string{
		"audience": {svid.Marshal(), "https://elsewhere"},
		"expired":  {expired, "https://broker"},
		"foreign":  {foreignToken, "https://broker"},
		"tampered": {svid.Marshal()[:len(svid.Marshal())-8] + "AAAAAAAA", "https://broker"},
		"garbage":  {"x", "https://broker"},
	} {
		if _, err := c.ValidateJWTSVID(ctx, bad[0], bad[1]); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v, want InvalidArgument", name, err)
		}
	}
	must(t, td.FederateJWT(foreign.JWTBundle()))
	if _, err := c.ValidateJWTSVID(ctx, foreignToken, "https://broker"); err != nil {
		t.Errorf("a JWT-SVID of a federated trust domain: %v", err)
	}
}

func TestIssueSVIDAtAnyTime(t *testing.T) {
	td := newDomain(t)
	now := time.Now().Truncate(time.Second)
	for _, c := range []struct {
		name  string
		opts  spiffetest.SVIDOptions
		valid bool
	}{
		{"default", spiffetest.SVIDOptions{}, true},
		{"expired", spiffetest.SVIDOptions{NotBefore: now.Add(-2 * time.Hour), NotAfter: now.Add(-time.Hour)}, false},
		{"from the future", spiffetest.SVIDOptions{NotBefore: now.Add(time.Hour), NotAfter: now.Add(2 * time.Hour)}, false},
	} {
		svid, err := td.IssueSVID(orders, c.opts)
		must(t, err)
		if _, _, err := x509svid.Verify(svid.Certificates, td); (err == nil) != c.valid {
			t.Errorf("%s: Verify = %v, want valid %v", c.name, err, c.valid)
		}
		if !c.opts.NotBefore.IsZero() && !svid.Certificates[0].NotBefore.Equal(c.opts.NotBefore) {
			t.Errorf("%s: NotBefore %v, want %v", c.name, svid.Certificates[0].NotBefore, c.opts.NotBefore)
		}
	}
}

func TestMutualTLS(t *testing.T) {
	td := newDomain(t)
	p, o := td.Source(payments), td.Source(orders)
	a, b := net.Pipe()
	server := tls.Server(a, tlsconfig.MTLSServerConfig(o, o, tlsconfig.AuthorizeID(payments)))
	clientConn := tls.Client(b, tlsconfig.MTLSClientConfig(p, p, tlsconfig.AuthorizeID(orders)))
	done := make(chan error, 1)
	go func() { done <- server.HandshakeContext(testContext(t)) }()
	must(t, clientConn.HandshakeContext(testContext(t)))
	must(t, <-done)
}

func TestWritePEM(t *testing.T) {
	td := newDomain(t)
	dir := filepath.Join(t.TempDir(), "operator")
	must(t, td.WritePEM(dir, payments))
	must(t, td.Rotate(payments))
	must(t, td.WritePEM(dir, payments))
	for name, want := range map[string]os.FileMode{"": 0o700 | os.ModeDir, "svid.pem": 0o600, "key.pem": 0o600, "bundle.pem": 0o600} {
		info, err := os.Stat(filepath.Join(dir, name))
		must(t, err)
		if info.Mode() != want {
			t.Errorf("mode of %q is %v, want %v", name, info.Mode(), want)
		}
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 3 {
		t.Errorf("%d files, want 3: %v", len(entries), entries)
	}
	svid, err := x509svid.Load(filepath.Join(dir, "svid.pem"), filepath.Join(dir, "key.pem"))
	must(t, err)
	bundle, err := x509bundle.Load(domain, filepath.Join(dir, "bundle.pem"))
	must(t, err)
	if !svid.Certificates[0].Equal(leaf(t, td.Source(payments)).Certificates[0]) {
		t.Error("the files don't hold the current SVID")
	}
	if _, _, err := x509svid.Verify(svid.Certificates, bundle); err != nil {
		t.Error(err)
	}
}

func TestSocketDirectory(t *testing.T) {
	parent, err := os.MkdirTemp("", "df")
	must(t, err)
	defer os.RemoveAll(parent)
	made := filepath.Join(parent, "d")
	td := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: domain, Dir: made})
	path := strings.TrimPrefix(workloadAddr(t, td, payments), "unix://")
	for p, want := range map[string]os.FileMode{made: 0o700 | os.ModeDir, path: 0o600 | os.ModeSocket} {
		info, err := os.Stat(p)
		must(t, err)
		if info.Mode() != want {
			t.Errorf("mode of %s is %v, want %v", p, info.Mode(), want)
		}
	}
	open := filepath.Join(parent, "open")
	must(t, os.Mkdir(open, 0o755))
	if _, err := spiffetest.New(spiffetest.Config{TrustDomain: domain, Dir: open}); err == nil || !strings.Contains(err.Error(), "0700") {
		t.Errorf("a directory open to others: %v, want a refusal that names 0700", err)
	}
	long := spiffetest.ForTest(t, spiffetest.Config{TrustDomain: domain, Dir: filepath.Join(parent, strings.Repeat("x", 100))})
	if _, err := long.Workload(payments); err == nil || !strings.Contains(err.Error(), "Config.Dir") {
		t.Errorf("a path too long for a socket: %v, want an error that names Config.Dir", err)
	}
}

func TestConfigComplaints(t *testing.T) {
	_, err := spiffetest.New(spiffetest.Config{SVIDTTL: -1, JWTSVIDTTL: -1})
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{"TrustDomain", "SVIDTTL", "JWTSVIDTTL"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q doesn't name %s", err, want)
		}
	}
}

func TestCloseLeavesNothing(t *testing.T) {
	td, err := spiffetest.New(spiffetest.Config{TrustDomain: domain})
	must(t, err)
	addr := workloadAddr(t, td, payments)
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer conn.Close()
	stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(withHeader(testContext(t)), &workload.X509SVIDRequest{})
	must(t, err)
	_, err = stream.Recv()
	must(t, err)

	must(t, td.Close())
	must(t, td.Close())
	stacks := make([]byte, 1<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	for _, inner := range []string{"spiffetest.follow", "spiffetest.(*socket)", "spiffetest.(*TrustDomain)", "grpc.(*Server).Serve"} {
		if bytes.Contains(stacks, []byte(inner)) {
			t.Errorf("a goroutine is still in %s after Close:\n%s", inner, stacks)
		}
	}
	if _, err := os.Stat(td.Dir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory is still there: %v", err)
	}
	if _, err := td.Workload(orders); !errors.Is(err, spiffetest.ErrClosed) {
		t.Errorf("Workload after Close: %v, want ErrClosed", err)
	}
	if err := td.StartSocket(payments); !errors.Is(err, spiffetest.ErrClosed) {
		t.Errorf("StartSocket after Close: %v, want ErrClosed", err)
	}
	if err := td.RotateCA(); !errors.Is(err, spiffetest.ErrClosed) {
		t.Errorf("RotateCA after Close: %v, want ErrClosed", err)
	}
}
