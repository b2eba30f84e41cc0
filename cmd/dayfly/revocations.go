package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/spf13/cobra"
)

func (a *app) revocationsCmd() *cobra.Command {
	return group("revocations", "Look at what was revoked, and who has confirmed it", "", `  dayfly revocations list
  dayfly revocations show 1043 --watch`,
		a.revocationsListCmd(), a.revocationsShowCmd())
}

func (a *app) revocationsListCmd() *cobra.Command {
	var (
		list      listFlags
		givenBack bool
	)
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List revocations, newest first",
		Example: "  dayfly revocations list --limit 10\n  dayfly revocations list --given-back\n  dayfly revocations list --output json",
		Args:    noArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.revocationsList(cmd.Context(), list, givenBack) },
	}
	list.add(cmd.Flags())
	cmd.Flags().BoolVar(&givenBack, "given-back", false, "also credentials that their holders gave back early")
	a.conn.addBreakGlass(cmd.Flags())
	return cmd
}

func (a *app) revocationsList(ctx context.Context, list listFlags, givenBack bool) error {
	client, err := a.dialOperator(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	service := dayflyv1.NewRevocationServiceClient(client.Conn())
	all := &dayflyv1.ListRevocationsResponse{}
	all.NextPageToken, err = list.pages(func(size int32, page string) (int, string, error) {
		ctx, cancel := a.call(ctx)
		defer cancel()
		resp, err := service.ListRevocations(ctx, &dayflyv1.ListRevocationsRequest{PageSize: size, PageToken: page, GivenBack: givenBack})
		all.Revocations = append(all.Revocations, resp.GetRevocations()...)
		return len(resp.GetRevocations()), resp.GetNextPageToken(), err
	})
	if err != nil {
		return err
	}
	defer a.more(all.GetNextPageToken(), list)
	return a.print(all, func(w io.Writer) {
		if len(all.GetRevocations()) == 0 {
			fmt.Fprintln(w, "Nothing was ever revoked.")
			return
		}
		fmt.Fprintln(w, "NUMBER\tTIME\tSELECTORS\tLOCK\tBY\tREASON")
		for _, r := range all.GetRevocations() {
			row(w, strconv.FormatUint(r.GetPosition().GetSequence(), 10), at(r.GetTime()), selectorTexts(r.GetSelectors()), a.lockState(r), r.GetActor(), r.GetReason())
		}
	})
}

func (a *app) lockState(r *dayflyv1.Revocation) string {
	switch {
	case r.GetLift() != nil && r.GetLift().GetSequence() > 0:
		return lockName(r.GetLockMode()) + ", lifted"
	case r.GetLockEndsAt() != nil && r.GetLockEndsAt().AsTime().Before(a.now()) && !slices.ContainsFunc(r.GetSelectors(), isSVID):
		return lockName(r.GetLockMode()) + ", ended " + at(r.GetLockEndsAt())
	case r.GetLockEndsAt() != nil:
		return lockName(r.GetLockMode()) + " until " + at(r.GetLockEndsAt())
	}
	return lockName(r.GetLockMode())
}

// isSVID: a lock on an SVID stands until that has expired, whatever its end.
func isSVID(s *dayflyv1.Selector) bool { return s.GetSvid() != "" }

func (a *app) revocationsShowCmd() *cobra.Command {
	var watch bool
	cmd := &cobra.Command{
		Use:   "show NUMBER",
		Short: "Show one revocation with its receipts",
		Long: `Show one revocation, who has confirmed it, and what verifiers saw of its
credentials since: refused, because somebody still presents them, or accepted, before the
verifier knew or although it did. With --watch, stay until it is
contained: exit code 0 says that it is, 3 that nobody waited long enough.`,
		Example: "  dayfly revocations show 1043\n  dayfly revocations show 1043 --watch",
		Args:    oneArg("the number of a revocation"),
		RunE: func(cmd *cobra.Command, args []string) error {
			number, err := parseNumber("revocation", args[0])
			if err != nil {
				return err
			}
			return a.revocationsShow(cmd.Context(), number, watch)
		},
	}
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "wait until it is contained")
	a.conn.addBreakGlass(cmd.Flags())
	return cmd
}

func (a *app) revocationsShow(ctx context.Context, number uint64, watch bool) error {
	client, err := a.dialOperator(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	short, cancel := a.call(ctx)
	resp, err := dayflyv1.NewRevocationServiceClient(client.Conn()).GetRevocation(short, &dayflyv1.GetRevocationRequest{Sequence: number})
	cancel()
	if err != nil {
		return err
	}
	var broken error
	if watch {
		show := a.progress(a.now())
		show(resp.GetContainment())
		resp.Containment, broken = a.follow(ctx, client, number, resp.GetContainment(), show)
	}
	if err := a.print(resp, func(w io.Writer) {
		a.writeRevocation(w, resp.GetRevocation())
		a.writeContainment(w, resp.GetRevocation(), resp.GetContainment())
	}); err != nil {
		return err
	}
	switch {
	case broken != nil:
		return broken
	case watch:
		return a.complete(number, resp.GetContainment())
	}
	return nil
}

func (a *app) writeRevocation(w io.Writer, r *dayflyv1.Revocation) {
	row(w, "revocation", fmt.Sprintf("%d of era %s", r.GetPosition().GetSequence(), r.GetPosition().GetEra()))
	for _, s := range r.GetSelectors() {
		row(w, "revokes", selectorText(s))
	}
	row(w, "time", at(r.GetTime()))
	row(w, "by", actors(r.GetActor(), r.GetProposal()))
	row(w, "reason", r.GetReason())
	row(w, "lock", a.lockState(r))
	if l := r.GetLift(); l != nil {
		row(w, "lifted", fmt.Sprintf("%s by %s: %s", at(l.GetTime()), actors(l.GetActor(), l.GetProposal()), l.GetReason()))
	}
	fmt.Fprintln(w)
}

// actors names who did something, both where it took two persons.
func actors(actor string, p *dayflyv1.Proposal) string {
	if p == nil {
		return actor
	}
	return actor + ", proposed by " + p.GetActor()
}
