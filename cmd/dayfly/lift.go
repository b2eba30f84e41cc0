package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"strconv"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/spf13/cobra"
)

func (a *app) liftCmd() *cobra.Command {
	var reason, key string
	cmd := &cobra.Command{
		Use:   "lift NUMBER",
		Short: "End a lock",
		Long: `End one standing lock, named by its number, so that those it matches get new
credentials again. The revocation stays in force: nothing issued before it revives.
Where policy wants two persons, the first call proposes and ends with exit code 6,
and another operator's call confirms.`,
		Example: `  dayfly locks
  dayfly lift 1043 --reason "host rebuilt, INC-7"`,
		Args: oneArg("the number of a lock"),
		RunE: func(cmd *cobra.Command, args []string) error {
			number, err := parseNumber("lock", args[0])
			if err != nil {
				return err
			}
			return a.lift(cmd.Context(), number, reason, key)
		},
	}
	f := cmd.Flags()
	f.StringVarP(&reason, "reason", "r", "", "why, for the records (required)")
	f.StringVar(&key, "idempotency-key", "", "`key` of an attempt whose outcome is unknown: repeated, it is recorded once")
	a.conn.addBreakGlass(f)
	return cmd
}

func parseNumber(what, s string) (uint64, error) {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n == 0 {
		return 0, usagef("dayfly locks and dayfly revocations list show the numbers", "%q is no number of a %s", short(s), what)
	}
	return n, nil
}

func (a *app) lift(ctx context.Context, number uint64, reason, key string) error {
	if err := checkReason(reason); err != nil {
		return err
	}
	if key == "" {
		key = rand.Text()
	}
	client, err := a.dialOperator(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	var resp *dayflyv1.LiftResponse
	err = a.repeat(ctx, key, func(ctx context.Context) (err error) {
		resp, err = dayflyv1.NewRevocationServiceClient(client.Conn()).Lift(ctx, &dayflyv1.LiftRequest{Lock: number, Reason: reason, IdempotencyKey: key})
		return err
	})
	if err != nil {
		return err
	}
	if resp.GetLifted() {
		a.noteOther(fmt.Sprintf("lift %d", resp.GetLift().GetSequence()), reason, resp.GetLift().GetReason(), resp.GetLift().GetProposal())
	}
	waiting := proposed{
		what: fmt.Sprintf("lock %d stands until a second person confirms", number),
		verb: fmt.Sprintf("lift %d --reason %s", number, quote(reason)), proposal: resp.GetLift().GetProposal(),
	}
	if err := a.print(resp, func(w io.Writer) {
		if !resp.GetLifted() {
			a.writeProposed(w, waiting)
			return
		}
		fmt.Fprintf(w, "Lock %d lifted, recorded as number %d. What was revoked stays dead.\n", number, resp.GetLift().GetSequence())
		if p := resp.GetLift().GetProposal(); p != nil {
			fmt.Fprintf(w, "Proposed by %s, confirmed by %s.\n", clean(p.GetActor()), clean(resp.GetLift().GetActor()))
		}
	}); err != nil {
		return err
	}
	if !resp.GetLifted() {
		return waiting.waits()
	}
	return nil
}
