package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/dayflyhq/dayfly/sdk"
	"github.com/spf13/pflag"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// connFlags say whom to call, and as whom.
type connFlags struct {
	broker, brokerID, agent       string
	svidSocket                    string
	svidCert, svidKey, svidBundle string
	breakGlass                    string
}

func (c *connFlags) add(f *pflag.FlagSet) {
	f.StringVar(&c.broker, "broker", "", "`address` of the broker, host:port (DAYFLY_BROKER)")
	f.StringVar(&c.brokerID, "broker-id", "", "SPIFFE `ID` that the broker must prove (DAYFLY_BROKER_ID)")
	f.StringVar(&c.agent, "agent", "", "`socket` of the agent, unix:///path (DAYFLY_AGENT)")
	f.StringVar(&c.svidSocket, "svid-socket", "", "`socket` of the Workload API, unix:///path (SPIFFE_ENDPOINT_SOCKET)")
	f.StringVar(&c.svidCert, "svid-cert", "", "PEM `file` with your SVID, instead of a socket")
	f.StringVar(&c.svidKey, "svid-key", "", "PEM `file` with its key")
	f.StringVar(&c.svidBundle, "svid-bundle", "", "PEM `file` with the authorities of the broker's trust domain")
}

// addBreakGlass adds the flag of the verbs that work when everything else is broken.
// It has no variable: nobody uses that socket without meaning to.
func (c *connFlags) addBreakGlass(f *pflag.FlagSet) {
	f.StringVar(&c.breakGlass, "break-glass", "", "root's `socket` on the broker's host, unix:///path: no SVID, no policy, loudly recorded")
}

// dialTokens connects to whoever gives out credentials: the agent, else the broker.
func (a *app) dialTokens(ctx context.Context) (*sdk.Client, error) {
	c := &a.conn
	if c.agent != "" && c.broker != "" {
		return nil, usagef("give one of the two", "both --agent and --broker are given")
	}
	if agent := a.agent(); agent != "" {
		return a.dialSocket("the agent's socket", agent)
	}
	return a.dialBroker(ctx, tokensHint)
}

const tokensHint = "name an agent (DAYFLY_AGENT or --agent), or a broker with its SPIFFE ID (DAYFLY_BROKER and DAYFLY_BROKER_ID)"

// agent is the agent's socket, "" where the broker is to be asked.
func (a *app) agent() string {
	if a.conn.agent == "" && a.conn.broker == "" {
		return a.env("DAYFLY_AGENT")
	}
	return a.conn.agent
}

// dialOperator connects to the broker, as an operator or through the break-glass
// socket.
func (a *app) dialOperator(ctx context.Context) (*sdk.Client, error) {
	c := &a.conn
	if c.breakGlass == "" {
		return a.dialBroker(ctx, "set DAYFLY_BROKER and DAYFLY_BROKER_ID, or --broker and --broker-id; root on the broker's host can use --break-glass for revoke, lift, locks and revocations")
	}
	if c.broker != "" {
		return nil, usagef("give one of the two", "both --break-glass and --broker are given")
	}
	return a.dialSocket("the break-glass socket", c.breakGlass)
}

// sameWay is what must be added to a command so that it goes the way that this one went.
func (a *app) sameWay() string {
	if a.conn.breakGlass == "" {
		return ""
	}
	return " --break-glass " + quote(a.conn.breakGlass)
}

func (a *app) dialSocket(what, address string) (*sdk.Client, error) {
	client, err := a.socketClient(what, address)
	if err != nil {
		return nil, err
	}
	// gRPC would say the same only after all its attempts.
	path := strings.TrimPrefix(address, "unix://")
	switch _, err := os.Stat(path); {
	case errors.Is(err, fs.ErrNotExist):
		return nil, failf(exitUnavailable, "is the path right, and does its owner run?", "%s isn't there: %s", what, path)
	case errors.Is(err, fs.ErrPermission):
		return nil, failf(exitRefused, "who may use a socket is its folder's and its own permissions", "%s may not be used by you: %s", what, path)
	}
	return client, nil
}

// socketClient connects at the first call: who owns the socket may come later.
func (a *app) socketClient(what, address string) (*sdk.Client, error) {
	if path, ok := strings.CutPrefix(address, "unix://"); !ok || !strings.HasPrefix(path, "/") {
		return nil, usagef("write unix:// and an absolute path: unix:///run/dayfly/agent.sock", "%s can't be %q", what, address)
	}
	return sdk.New(sdk.Config{Address: address, Timeout: a.timeout, Now: a.now})
}

// broker is the address of the broker, and whom it must prove to be.
func (a *app) broker(hint string) (string, spiffeid.ID, error) {
	c := &a.conn
	address, id := a.or(c.broker, "DAYFLY_BROKER"), a.or(c.brokerID, "DAYFLY_BROKER_ID")
	if address == "" {
		return "", spiffeid.ID{}, usagef(hint, "no broker is named")
	}
	if id == "" {
		return "", spiffeid.ID{}, usagef("set DAYFLY_BROKER_ID or --broker-id: without it any workload of the trust domain could pose as the broker", "the broker's SPIFFE ID isn't given")
	}
	brokerID, err := spiffeid.FromString(id)
	if err != nil {
		return "", spiffeid.ID{}, usagef("it looks like spiffe://example.org/dayfly/broker", "the broker's SPIFFE ID %q: %v", id, err)
	}
	return address, brokerID, nil
}

func (a *app) dialBroker(ctx context.Context, hint string) (*sdk.Client, error) {
	address, brokerID, err := a.broker(hint)
	if err != nil {
		return nil, err
	}
	source, err := a.svidSource(ctx, brokerID.TrustDomain())
	if err != nil {
		return nil, err
	}
	client, err := sdk.New(sdk.Config{Address: address, Source: source, BrokerID: brokerID, Timeout: a.timeout, Now: a.now})
	if err != nil {
		return nil, usagef("write host:port", "%v", err)
	}
	return client, nil
}

func (a *app) or(flag, variable string) string {
	if flag != "" {
		return flag
	}
	return a.env(variable)
}

// identity is an SVID and the bundles that verify the broker, fetched once: a command
// is over before they rotate, and one that watches for longer dials anew.
type identity struct {
	*x509svid.SVID
	x509bundle.Source
}

// svidSource returns the caller's identity: PEM files where any is named, else the
// Workload API.
func (a *app) svidSource(ctx context.Context, td spiffeid.TrustDomain) (sdk.Source, error) {
	if a.conn.filesNamed() {
		return a.fileSource(td)
	}
	address, err := a.workloadAPI()
	if err != nil {
		return nil, err
	}
	ctx, cancel := a.call(ctx)
	defer cancel()
	found, err := workloadapi.FetchX509Context(ctx, workloadapi.WithAddr(address))
	if err != nil {
		return nil, workloadError(address, err)
	}
	return identity{found.DefaultSVID(), found.Bundles}, nil
}

func (c *connFlags) filesNamed() bool {
	return c.svidCert != "" || c.svidKey != "" || c.svidBundle != ""
}

// workloadAPI is the address of the Workload API.
func (a *app) workloadAPI() (string, error) {
	address := a.or(a.conn.svidSocket, "SPIFFE_ENDPOINT_SOCKET")
	if address == "" {
		return "", usagef("set SPIFFE_ENDPOINT_SOCKET or --svid-socket, or name PEM files with --svid-cert, --svid-key and --svid-bundle", "there is no SVID to call the broker with")
	}
	if err := workloadapi.ValidateAddress(address); err != nil {
		return "", usagef("a socket is written unix:///path", "the Workload API can't be %q: %v", address, err)
	}
	return address, nil
}

func workloadError(address string, err error) error {
	switch status.Code(err) {
	case codes.PermissionDenied:
		return failf(exitRefused, "is there a registration entry for this process?", "the Workload API at %s has no identity for you", address)
	case codes.DeadlineExceeded:
		return failf(exitUnavailable, "does the SPIFFE agent run? --timeout waits longer", "the Workload API at %s gave no SVID in time", address)
	}
	return failf(exitUnavailable, "is the path right, and does the SPIFFE agent run?", "asking the Workload API at %s: %s", address, status.Convert(err).Message())
}

func (a *app) fileSource(td spiffeid.TrustDomain) (sdk.Source, error) {
	c := &a.conn
	if c.svidCert == "" || c.svidKey == "" || c.svidBundle == "" {
		return nil, usagef("all three are needed: --svid-cert, --svid-key and --svid-bundle", "an SVID in files is incomplete")
	}
	for _, f := range []struct{ what, path string }{{"SVID", c.svidCert}, {"key", c.svidKey}, {"bundle", c.svidBundle}} {
		if _, err := os.Stat(f.path); err != nil {
			return nil, fileError("the "+f.what+" file", f.path, err)
		}
	}
	svid, err := x509svid.Load(c.svidCert, c.svidKey)
	if err != nil {
		return nil, failf(exitFailure, "both must be PEM and belong together", "reading the SVID %s and its key %s: %w", c.svidCert, c.svidKey, err)
	}
	if end := svid.Certificates[0].NotAfter; a.now().After(end) {
		return nil, failf(exitRefused, "fetch a new one from your SPIFFE agent", "the SVID in %s has expired: %s", c.svidCert, end.UTC().Format("2006-01-02T15:04:05Z"))
	}
	bundle, err := x509bundle.Load(td, c.svidBundle)
	if err != nil {
		return nil, failf(exitFailure, "it wants the authorities of "+td.Name()+" as PEM", "reading the bundle %s: %w", c.svidBundle, err)
	}
	if bundle.Empty() {
		return nil, failf(exitFailure, "it wants the authorities of "+td.Name()+" as PEM", "the bundle %s holds no certificate", c.svidBundle)
	}
	return identity{svid, bundle}, nil
}

// call gives one call its deadline.
func (a *app) call(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, a.timeout, fmt.Errorf("no answer within %s: %w", a.timeout, context.DeadlineExceeded))
}
