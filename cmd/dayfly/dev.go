package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func (a *app) devCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "dev",
		Short: "Run a whole dayfly in the foreground, to try things by hand",
		Long: `Run what "dayfly demo" runs, in the foreground, until Ctrl-C: a throwaway trust domain, a broker, the agent
of payments, and the services orders, ledger and web. It prints the environment to export and commands to
paste into another terminal. web takes bearer tokens over plain HTTP, for curl and exec. The policy folder
it prints may be edited while it runs. Nothing is left behind.`,
		Example: "  dayfly dev",
		Args:    noArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.dev(cmd.Context()) },
	}
}

func (a *app) dev(ctx context.Context) error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	box, err := sandbox.New(sandbox.Config{Broker: []string{exe, internalBroker}, Agent: []string{exe, internalAgent}})
	if err != nil {
		return err
	}
	defer box.Close()
	env, err := a.startDev(ctx, box, exe)
	if err != nil {
		return err
	}
	fmt.Fprint(a.stdout, env)
	stopFiles := keepFiles(ctx, box, a.stderr)
	defer stopFiles() // before the folder goes
	select {
	case <-ctx.Done():
		fmt.Fprintln(a.stderr, "stopping")
		return nil
	case <-box.BrokerEnded():
		return failf(exitFailure, "start dayfly dev again", "the broker's process ended: %s", box.Log("broker"))
	}
}

// devFilesEvery is how often the SVIDs in files are written anew: a JWT-SVID lives for five
// minutes, and a client should find most of its life left.
const devFilesEvery = time.Minute

// devFiles writes the SVIDs of those whom dev's commands speak as, and returns the folder.
func devFiles(box *sandbox.Sandbox) (string, error) {
	dir := ""
	for _, id := range []spiffeid.ID{sandbox.Payments, sandbox.Orders, sandbox.Ledger} {
		of, err := box.SVIDFiles(id)
		if err != nil {
			return "", fmt.Errorf("writing the SVIDs of %s: %w", id, err)
		}
		dir = filepath.Dir(of)
	}
	return dir, nil
}

// keepFiles writes them again and again, until the function it returns is called.
func keepFiles(ctx context.Context, box *sandbox.Sandbox, stderr io.Writer) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(devFilesEvery)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				if _, err := devFiles(box); err != nil {
					fmt.Fprintln(stderr, err)
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return func() { cancel(); <-done }
}

// startDev starts everything and returns what to print.
func (a *app) startDev(ctx context.Context, box *sandbox.Sandbox, exe string) (string, error) {
	if err := box.StartBroker(ctx); err != nil {
		return "", err
	}
	agent, err := box.StartAgent(ctx, sandbox.Payments)
	if err != nil {
		return "", err
	}
	services := map[string]*sandbox.Service{}
	for _, cfg := range []sandbox.ServiceConfig{
		{ID: sandbox.Orders, Audience: "orders"},
		{ID: sandbox.Ledger, Audience: "ledger"},
		{ID: sandbox.Web, Audience: "web", Plain: true},
	} {
		if cfg.Feed, err = box.Client(ctx, cfg.ID, box.Info.GRPC); err != nil {
			return "", err
		}
		if services[cfg.Audience], err = box.StartService(ctx, cfg); err != nil {
			return "", err
		}
	}
	payments, err := sdk.New(sdk.Config{Address: agent})
	if err != nil {
		return "", err
	}
	defer payments.Close()
	if _, err := payments.Issue(ctx, sdk.Request{Audience: "web"}); err != nil {
		return "", fmt.Errorf("getting a first token through the agent: %w", err)
	}
	alice, err := box.TD.Workload(sandbox.Alice)
	if err != nil {
		return "", err
	}
	bob, err := box.TD.Workload(sandbox.Bob)
	if err != nil {
		return "", err
	}
	orders, err := box.TD.Workload(sandbox.Orders)
	if err != nil {
		return "", err
	}
	paymentsSVID, err := box.TD.Workload(sandbox.Payments)
	if err != nil {
		return "", err
	}
	host, err := box.TD.Workload(sandbox.Host)
	if err != nil {
		return "", err
	}
	if err := box.TD.SetOthers(sandbox.Host, sandbox.Payments, sandbox.Reports); err != nil {
		return "", err
	}
	svids, err := devFiles(box)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf(devText, filepath.Dir(exe), box.Info.GRPC, sandbox.Broker, agent, alice,
		services["web"].URL, sandbox.Payments, orders, services["orders"].URL, services["ledger"].URL,
		box.PolicyDir(), box.AuditPath(), box.Issuer, box.Info.Admin, box.Info.BreakGlass, bob, os.Getpid(), box.AgentHTTP(sandbox.Payments), box.AgentPID(sandbox.Payments), box.WebCA(), svids, paymentsSVID, host), nil
}

const devText = `A whole dayfly is running; Ctrl-C ends it, or: kill %[17]d. In another terminal:

  export PATH="%[1]s:$PATH"
  export DAYFLY_BROKER=%[2]s
  export DAYFLY_BROKER_ID=%[3]s
  export DAYFLY_AGENT=%[4]s            # payments' agent
  export SPIFFE_ENDPOINT_SOCKET=%[5]s  # you are the operator alice
  export DAYFLY_ISSUER=%[13]s
  export DAYFLY_WEB_CA=%[20]s  # vouches for the issuer's certificate
  export DAYFLY_SVIDS=%[21]s  # SVIDs in files, written anew every minute
  export BOB=%[16]s                     # for a second person
  export PAYMENTS=%[22]s  # Workload API of payments, for an agent of your own
  export WEB=%[6]s              # a service that takes bearers; orders and ledger want mTLS
  export ORDERS=%[8]s   # Workload API of orders
  export ORDERS_URL=%[9]s       # the service orders, by its SVID
  export WORKLOADS=%[23]s  # Workload API of a host with two workloads, payments and reports
  export BREAK_GLASS=unix://%[15]s
  export AGENT_PID=%[19]d               # kill -STOP freezes payments' agent, kill -CONT thaws it

As the workload payments, through its agent:

  dayfly token get --audience web | dayfly token inspect
  curl -H "Authorization: Bearer $(dayfly token get --audience web)" $WEB/
  curl --unix-socket %[18]s 'http://agent/v1/token?audience=web'
  dayfly exec --audience web -- sh -c 'curl -s -H "Authorization: Bearer $DAYFLY_TOKEN" $WEB/'

As orders, exchange payments' token for one of ledger:

  dayfly token get --audience orders | SPIFFE_ENDPOINT_SOCKET=%[8]s DAYFLY_AGENT= dayfly token exchange --audience ledger | dayfly token inspect

Without our SDK, by OAuth. As payments with a certificate, then with a JWT-SVID:

  curl -s --cacert $DAYFLY_WEB_CA --cert $DAYFLY_SVIDS/payments/svid.pem --key $DAYFLY_SVIDS/payments/key.pem $DAYFLY_ISSUER/token -d grant_type=client_credentials -d audience=orders
  curl -s --cacert $DAYFLY_WEB_CA $DAYFLY_ISSUER/token -d grant_type=client_credentials -d audience=web -d client_assertion_type=urn:ietf:params:oauth:client-assertion-type:jwt-spiffe --data-urlencode client_assertion@$DAYFLY_SVIDS/payments/jwt-svid

As orders, exchange payments' token:

  curl -s --cacert $DAYFLY_WEB_CA --cert $DAYFLY_SVIDS/orders/svid.pem --key $DAYFLY_SVIDS/orders/key.pem $DAYFLY_ISSUER/token -d grant_type=urn:ietf:params:oauth:grant-type:token-exchange -d audience=ledger -d subject_token_type=urn:ietf:params:oauth:token-type:access_token -d subject_token=$(dayfly token get --audience orders)

As anybody, see where the rest is:

  curl -s --cacert $DAYFLY_WEB_CA $DAYFLY_ISSUER/.well-known/openid-configuration
  curl -s --cacert $DAYFLY_WEB_CA $DAYFLY_ISSUER/.well-known/oauth-authorization-server
  curl -s --cacert $DAYFLY_WEB_CA $DAYFLY_ISSUER/jwks.json

As the security team (docs/incident.md goes through it all):

  dayfly grants list
  dayfly policy explain --dir %[11]s --as %[7]s --audience web
  dayfly revoke --identity %[7]s --dry-run
  dayfly revoke --identity %[7]s --reason "trying it" --yes
  dayfly locks
  dayfly revocations list
  dayfly lift 3 --reason "tried it"    # the number that revoke printed

Everything takes two persons: alice proposes, and bob confirms.

  dayfly revoke --everything --reason "trying it" --yes || SPIFFE_ENDPOINT_SOCKET=$BOB dayfly revoke --everything --reason "trying it" --yes

orders  %[9]s   (mTLS)
ledger  %[10]s   (mTLS)
policy  %[11]s   (edit it: it is reloaded)
audit   %[12]s
issuer  %[13]s
admin   http://%[14]s/metrics
break-glass  dayfly locks --break-glass $BREAK_GLASS
`
