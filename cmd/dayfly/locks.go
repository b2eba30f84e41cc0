package main

import (
	"context"
	"fmt"
	"io"
	"strconv"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/spf13/cobra"
)

func (a *app) locksCmd() *cobra.Command {
	var list listFlags
	cmd := &cobra.Command{
		Use:     "locks",
		Short:   "List the standing locks, newest first",
		Example: "  dayfly locks\n  dayfly locks --output json",
		Args:    noArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.locks(cmd.Context(), list) },
	}
	list.add(cmd.Flags())
	a.conn.addBreakGlass(cmd.Flags())
	return cmd
}

func (a *app) locks(ctx context.Context, list listFlags) error {
	client, err := a.dialOperator(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	service := dayflyv1.NewRevocationServiceClient(client.Conn())
	all := &dayflyv1.ListLocksResponse{}
	all.NextPageToken, err = list.pages(func(size int32, page string) (int, string, error) {
		ctx, cancel := a.call(ctx)
		defer cancel()
		resp, err := service.ListLocks(ctx, &dayflyv1.ListLocksRequest{PageSize: size, PageToken: page})
		all.Locks = append(all.Locks, resp.GetLocks()...)
		return len(resp.GetLocks()), resp.GetNextPageToken(), err
	})
	if err != nil {
		return err
	}
	defer a.more(all.GetNextPageToken(), list)
	return a.print(all, func(w io.Writer) {
		if len(all.GetLocks()) == 0 {
			fmt.Fprintln(w, "No lock stands.")
			return
		}
		writeLocks(w, all.GetLocks())
	})
}

func writeLocks(w io.Writer, locks []*dayflyv1.Lock) {
	fmt.Fprintln(w, "NUMBER\tMODE\tSELECTORS\tSINCE\tENDS\tBY\tREASON")
	for _, l := range locks {
		ends := "when lifted"
		if l.GetEndsAt() != nil {
			ends = at(l.GetEndsAt())
		}
		if p := l.GetProposedLift().GetProposal(); p != nil {
			ends += fmt.Sprintf("; lift proposed by %s, to be confirmed until %s", p.GetActor(), at(p.GetExpiresAt()))
		}
		row(w, strconv.FormatUint(l.GetNumber(), 10), lockName(l.GetMode()), selectorTexts(l.GetSelectors()), at(l.GetTime()), ends, l.GetActor(), l.GetReason())
	}
}
