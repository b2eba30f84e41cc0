package main

import (
	"context"
	"fmt"
	"io"
	"strconv"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
)

// planRows bounds each table of a plan: whoever decides reads the first ones, and
// --output json has them all.
const planRows = 20

func (a *app) plan(ctx context.Context, client dayflyv1.RevocationServiceClient, req *dayflyv1.RevokeRequest, seenFrom string) (*dayflyv1.PlanResponse, error) {
	ctx, cancel := a.call(ctx)
	defer cancel()
	return client.Plan(ctx, &dayflyv1.PlanRequest{Selectors: req.GetSelectors(), LockMode: req.GetLockMode(), SeenFrom: seenFrom})
}

// writePlan says what would die and what would break.
func (a *app) writePlan(w io.Writer, p *dayflyv1.PlanResponse) {
	fmt.Fprintf(w, "%s would die, %d of them derived; as of number %d of the log.\n",
		count(p.GetLiveGrants(), "live grant", "live grants"), p.GetDerivedGrants(), p.GetPosition().GetSequence())
	if p.GetLiveGrants() == 0 {
		fmt.Fprintln(w, "Nothing alive matches now. A revocation would still be recorded, and so would its lock, if it has one.")
	}
	section(w, "IDENTITY\tPRESENTS\tIN THE CHAIN OF", p.GetIdentities(), func(i *dayflyv1.AffectedIdentity) {
		row(w, i.GetIdentity(), strconv.FormatUint(i.GetPresents(), 10), strconv.FormatUint(i.GetDerives(), 10))
	})
	writeAudiences(w, "AUDIENCE", p.GetAudiences())
	if len(p.GetWorkflows()) > 0 {
		fmt.Fprintln(w, "\nIn use within the last day, and would break:")
	}
	section(w, "CALLER\tCALLEE\tVERIFIER\tCALLS\tLAST SEEN\tFALLBACK", p.GetWorkflows(), func(f *dayflyv1.AffectedWorkflow) {
		row(w, f.GetCaller(), f.GetCallee(), orDash(verifierName(f.GetVerifier(), f.GetClaimedVerifier())), strconv.FormatUint(f.GetCount(), 10), at(f.GetLastSeen()), fallbackText(f.GetFallback()))
	})
	for _, n := range p.GetNarrower() {
		fmt.Fprintf(w, "\nNarrower would do: %s\n  %s\n", clean(selectorTexts(n.GetSelectors())), clean(n.GetWhy()))
	}
	if len(p.GetStandingLocks()) > 0 {
		fmt.Fprintln(w, "\nLocks that stand already:")
		writeLocks(w, p.GetStandingLocks())
	}
}

// writeAudiences lists audiences with who answers for them and until when what is
// verified without the feed is accepted.
func writeAudiences(w io.Writer, title string, list []*dayflyv1.AffectedAudience) {
	section(w, title+"\tLIVE GRANTS\tVERIFIED BY\tLAST EXPIRY\tOWNER\tFALLBACK", list, func(u *dayflyv1.AffectedAudience) {
		row(w, u.GetAudience(), strconv.FormatUint(u.GetLiveGrants(), 10), orDash(u.GetVerifiedBy()), at(u.GetLastExpiry()), orDash(u.GetOwner()), fallbackText(u.GetFallback()))
	})
}

// section writes a table with its head, if there is anything in it.
func section[T any](w io.Writer, head string, rows []T, write func(T)) {
	if len(rows) == 0 {
		return
	}
	fmt.Fprintln(w, "\n"+head)
	for i, r := range rows {
		if i == planRows {
			fmt.Fprintf(w, "and %d more: --output json has them all\n", len(rows)-i)
			return
		}
		write(r)
	}
}

func fallbackText(f *dayflyv1.Fallback) string {
	text := f.GetText()
	for _, more := range []string{f.GetLink(), f.GetOwner()} {
		switch {
		case more == "":
		case text == "":
			text = more
		default:
			text += ", " + more
		}
	}
	return orDash(text)
}
