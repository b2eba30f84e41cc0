package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"strconv"
	"strings"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	defaultLimit = 100
	// maxPage is what one answer holds at most, as the protocol says.
	maxPage = 1000
)

// A listFlags says which part of a list is shown.
type listFlags struct {
	limit int
	page  string
}

func (l *listFlags) add(f *pflag.FlagSet) {
	f.IntVar(&l.limit, "limit", defaultLimit, "how many to show at most; 0: all")
	f.StringVar(&l.page, "page", "", "go on where a list was cut: `token` that it ended with")
}

// pages reads pages until there are no more or the limit is reached, and returns the
// token of the page that would come next.
func (l *listFlags) pages(page func(size int32, token string) (got int, next string, err error)) (string, error) {
	if l.limit < 0 {
		return "", usagef("0 shows all", "--limit is negative")
	}
	next := l.page
	for seen := 0; ; {
		size := maxPage
		if l.limit > 0 {
			size = min(size, l.limit-seen)
		}
		got, following, err := page(int32(size), next)
		if err != nil {
			return "", err
		}
		next, seen = following, seen+got
		if next == "" || l.limit > 0 && seen >= l.limit {
			return next, nil
		}
	}
}

// more says on stderr that a list was cut.
func (a *app) more(next string, list listFlags) {
	if next != "" {
		a.notef("there are more than %d: --limit 0 shows all, --page %s what comes next", list.limit, clean(next))
	}
}

func (a *app) grantsCmd() *cobra.Command {
	return group("grants", "Look at the records of issued credentials", "", `  dayfly grants list --presenter spiffe://example.org/payments
  dayfly grants show 4Xk2…`,
		a.grantsListCmd(), a.grantsShowCmd())
}

// grantFilter says which grants are listed.
type grantFilter struct {
	presenter, derivedFrom, audience string
	expired                          bool
	list                             listFlags
}

func (a *app) grantsListCmd() *cobra.Command {
	var filter grantFilter
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List grants, newest first within a presenter",
		Example: `  dayfly grants list --presenter spiffe://example.org/payments
  dayfly grants list --derived-from identity:spiffe://example.org/payments
  dayfly grants list --audience ledger --expired --limit 0 --output json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.grantsList(cmd.Context(), &filter) },
	}
	f := cmd.Flags()
	f.StringVar(&filter.presenter, "presenter", "", "only those presented by this SPIFFE `ID`")
	f.StringVar(&filter.derivedFrom, "derived-from", "", "only live ones with this `selector` in their lineage: identity:spiffe://..., grant:..., svid:..., key:..., subtree:..., trust_domain:...")
	f.StringVar(&filter.audience, "audience", "", "only those for this audience")
	f.BoolVar(&filter.expired, "expired", false, "also those that have expired but are still on record")
	filter.list.add(f)
	return cmd
}

func (g *grantFilter) request() (*dayflyv1.ListGrantsRequest, error) {
	req := &dayflyv1.ListGrantsRequest{Presenter: g.presenter, Audience: g.audience, IncludeExpired: g.expired}
	if g.presenter != "" {
		if _, err := spiffeid.FromString(g.presenter); err != nil {
			return nil, usagef("it looks like spiffe://example.org/payments", "--presenter %q: %v", g.presenter, err)
		}
	}
	if g.derivedFrom != "" {
		sel, err := revocation.Parse(g.derivedFrom)
		if err != nil {
			return nil, usagef("it looks like identity:spiffe://example.org/payments", "--derived-from %q: %v", short80(g.derivedFrom), err)
		}
		req.DerivedFrom = wire.Selector(sel)
	}
	return req, nil
}

func (a *app) grantsList(ctx context.Context, filter *grantFilter) error {
	req, err := filter.request()
	if err != nil {
		return err
	}
	client, err := a.dialOperator(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	grants := dayflyv1.NewGrantServiceClient(client.Conn())
	all := &dayflyv1.ListGrantsResponse{}
	all.NextPageToken, err = filter.list.pages(func(size int32, page string) (int, string, error) {
		ctx, cancel := a.call(ctx)
		defer cancel()
		req.PageSize, req.PageToken = size, page
		resp, err := grants.ListGrants(ctx, req)
		all.Grants = append(all.Grants, resp.GetGrants()...)
		return len(resp.GetGrants()), resp.GetNextPageToken(), err
	})
	if err != nil {
		return err
	}
	defer a.more(all.GetNextPageToken(), filter.list)
	return a.print(all, func(w io.Writer) {
		if len(all.GetGrants()) == 0 {
			fmt.Fprintln(w, "No grants.")
			return
		}
		fmt.Fprintln(w, "GRANT\tSTATE\tPRESENTER\tAUDIENCE\tSCOPES\tDEPTH\tISSUED\tEXPIRES")
		for _, g := range all.GetGrants() {
			row(w, g.GetGrant(), a.grantState(g), presenterOf(g), g.GetAudience(), orDash(strings.Join(g.GetScopes(), " ")),
				strconv.Itoa(len(g.GetLineage())), at(g.GetIssuedAt()), at(g.GetExpiresAt()))
		}
	})
}

func presenterOf(g *dayflyv1.Grant) string {
	if n := len(g.GetLineage()); n > 0 {
		return g.GetLineage()[n-1].GetIdentity()
	}
	return "-"
}

func (a *app) grantState(g *dayflyv1.Grant) string {
	state := strings.ToLower(strings.TrimPrefix(g.GetState().String(), "GRANT_STATE_"))
	if g.GetRevokedBy() > 0 {
		state += " by " + strconv.FormatUint(g.GetRevokedBy(), 10)
	}
	return state
}

func (a *app) grantsShowCmd() *cobra.Command {
	return &cobra.Command{
		Use:     "show GRANT",
		Short:   "Show one grant with its lineage, and whether it is alive",
		Example: "  dayfly grants show " + exampleGrant + "\n  dayfly grants show " + exampleGrant + " --output json",
		Args:    oneArg("the ID of a grant"),
		RunE:    func(cmd *cobra.Command, args []string) error { return a.grantsShow(cmd.Context(), args[0]) },
	}
}

const exampleGrant = "q83vEjQAAZrA4wK7m5cRbWk2"

func (a *app) grantsShow(ctx context.Context, text string) error {
	if strings.HasPrefix(text, "eyJ") {
		return usagef("dayfly token inspect < FILE shows its grant; count this one as seen by others", "that is a token, not the ID of a grant")
	}
	id, err := token.ParseGrantID(text)
	if err != nil {
		return usagef("24 characters, as dayfly grants list shows them", "%q is no ID of a grant", short(text))
	}
	client, err := a.dialOperator(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := a.call(ctx)
	defer cancel()
	resp, err := dayflyv1.NewGrantServiceClient(client.Conn()).GetGrant(ctx, &dayflyv1.GetGrantRequest{Grant: id.String()})
	if err != nil {
		return err
	}
	return a.print(resp, func(w io.Writer) { a.writeGrant(w, resp.GetGrant()) })
}

func (a *app) writeGrant(w io.Writer, g *dayflyv1.Grant) {
	row(w, "grant", g.GetGrant())
	row(w, "state", a.grantState(g))
	row(w, "presenter", presenterOf(g))
	row(w, "audience", g.GetAudience())
	row(w, "scopes", orDash(strings.Join(g.GetScopes(), " ")))
	row(w, "binding", strings.ToLower(strings.TrimPrefix(g.GetBinding().String(), "BINDING_")))
	row(w, "issued", at(g.GetIssuedAt()))
	row(w, "expires", at(g.GetExpiresAt()))
	row(w, "position", fmt.Sprintf("era %s, number %d", g.GetPosition().GetEra(), g.GetPosition().GetSequence()))
	row(w, "asked from", orDash(g.GetPeerAddress()))
	row(w, "transaction", orDash(g.GetTransaction()))
	row(w, "fingerprint", hex.EncodeToString(g.GetFingerprint()))
	fmt.Fprintln(w, "\nLINEAGE\tIDENTITY\tGRANT\tKEY\tSVID")
	for i, m := range g.GetLineage() {
		row(w, strconv.Itoa(i+1), m.GetIdentity(), m.GetGrant(), m.GetKeyId(), orDash(m.GetSvid()))
	}
}
