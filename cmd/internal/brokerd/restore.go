package brokerd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/boltstore"
	"github.com/dayflyhq/dayfly/cmd/internal/config"
	"github.com/spf13/cobra"
)

// A restore is what "dayfly-broker restore" is asked for.
type restore struct {
	from, store, locksFrom string
	verifiersAt, reason    string
	acceptLost             bool
}

func restoreCommand(name string) *cobra.Command {
	var r restore
	var output string
	cmd := &cobra.Command{
		Use:   "restore --from BACKUP --store PATH (--locks-from COPY | --accept-lost-locks --reason TEXT)",
		Short: "make a store of a backup, in a new era",
		Long: "Make a store of a backup, in a new era: every key and every token of earlier eras is dead, and workloads\n" +
			"fetch anew by themselves. Stop the broker first, and move a file at PATH away: it is never overwritten.\n\n" +
			"Locks made since the backup would be forgotten, so the command wants the newest other copy there is: the\n" +
			"store as it was last, damaged or not, or a later backup. If there is none, or not all of it can be read,\n" +
			"say that you accept what is lost, and why: it is recorded and audited.",
		Example: "  " + name + " restore --from monday.db --locks-from /var/lib/dayfly/broken.db --store /var/lib/dayfly/dayfly.db\n" +
			"  " + name + " restore --from monday.db --store /var/lib/dayfly/dayfly.db --accept-lost-locks --reason \"disk lost, INC-9\"",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case r.from == "":
				return config.UsageError{Err: errors.New("--from BACKUP is missing: what the store is made of")}
			case r.store == "":
				return config.UsageError{Err: errors.New("--store PATH is missing: where the store is made")}
			}
			if err := checkOutput(output); err != nil {
				return err
			}
			done, err := r.run(cmd.Context(), time.Now())
			if err != nil {
				return err
			}
			if output == "json" {
				return printJSON(cmd.OutOrStdout(), done)
			}
			done.print(cmd.OutOrStdout())
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&r.from, "from", "", "the `backup`, or any other copy of a store")
	f.StringVar(&r.store, "store", "", "the `path` of the store to make; there must be nothing yet")
	f.StringVar(&r.locksFrom, "locks-from", "", "the newest other `copy`, which locks made since the backup are carried over from")
	f.BoolVar(&r.acceptLost, "accept-lost-locks", false, "go on although locks may be lost; needs --reason")
	f.StringVar(&r.reason, "reason", "", "why, for the records")
	f.StringVar(&r.verifiersAt, "verifiers-at", "", "a `position` that verifiers know, as their logs say it: ERA/NUMBER/SUM or its beginning")
	f.StringVarP(&output, "output", "o", "text", "text or json")
	return cmd
}

// restored says what a restore did.
type restored struct {
	Store   string           `json:"store"`
	Backup  string           `json:"backup"` // position
	Era     string           `json:"era"`
	First   uint64           `json:"first"` // number of the era's record
	Fork    uint64           `json:"fork,omitempty"`
	Agree   uint64           `json:"agree,omitempty"`
	Kept    int              `json:"kept"` // locks of the backup, by their old numbers
	Carried []carried        `json:"carried"`
	Lost    bool             `json:"locksLost"`
	Notes   []string         `json:"notes"`
	Report  boltstore.Report `json:"report"`
}

// carried is one record that was carried over from an earlier era.
type carried struct {
	Number uint64   `json:"number"`
	Was    uint64   `json:"was,omitempty"`
	What   string   `json:"what"` // "lock", "lift" or "keys"
	Names  []string `json:"names"`
	Actor  string   `json:"actor"`
	Reason string   `json:"reason"`
}

func (r *restore) run(ctx context.Context, now time.Time) (*restored, error) {
	ask, err := r.read(ctx, now)
	if err != nil {
		return nil, err
	}
	plan, err := broker.PlanRestore(ask)
	switch {
	case errors.Is(err, broker.ErrConsent) && r.locksFrom == "":
		return nil, fmt.Errorf("restoring store: %w\nhint: name the store as it was last, or the newest other backup, with --locks-from COPY; if there is none: --accept-lost-locks --reason TEXT", err)
	case errors.Is(err, broker.ErrConsent):
		return nil, fmt.Errorf("restoring store: %w\nhint: name a newer or a better copy with --locks-from; if there is none, add: --accept-lost-locks --reason TEXT", err)
	case err != nil:
		return nil, fmt.Errorf("restoring store: %w", err)
	}
	report, err := boltstore.Restore(ctx, boltstore.RestoreConfig{From: r.from, Path: r.store, Restoration: plan})
	if errors.Is(err, boltstore.ErrExists) {
		return nil, fmt.Errorf("%w\nhint: move it away: it may be what --locks-from needs", err)
	}
	if err != nil {
		return nil, err
	}
	return summary(r.store, ask, plan, report), nil
}

func (r *restore) read(ctx context.Context, now time.Time) (broker.Restore, error) {
	ask := broker.Restore{
		AcceptLost: r.acceptLost, Reason: r.reason, Now: now,
		Actor: fmt.Sprintf("dayfly-broker restore:uid=%d", os.Getuid()),
	}
	var err error
	if r.verifiersAt != "" {
		if ask.Known, err = broker.ParseKnownPosition(r.verifiersAt); err != nil {
			return ask, config.UsageError{Err: fmt.Errorf("--verifiers-at: %w", err)}
		}
	}
	if _, err := os.Lstat(r.store); err == nil {
		return ask, fmt.Errorf("%s: %w\nhint: move it away: it may be what --locks-from needs", r.store, boltstore.ErrExists)
	}
	if ask.Backup, err = readCopy(ctx, "--from", r.from); err != nil {
		return ask, err
	}
	if r.locksFrom == "" {
		return ask, nil
	}
	if ask.LocksFrom, err = readCopy(ctx, "--locks-from", r.locksFrom); errors.Is(err, boltstore.ErrMissing) {
		return ask, err
	} else if err != nil {
		return ask, fmt.Errorf("%w\nhint: if nothing of it can be read, name another copy, or go on without: --accept-lost-locks --reason TEXT", err)
	}
	return ask, nil
}

// readCopy reads a copy that a flag names. A wrong path is no empty store: nothing is to
// be made there.
func readCopy(ctx context.Context, flag, path string) (*broker.LogCopy, error) {
	log, err := boltstore.ReadLog(ctx, path)
	switch {
	case errors.Is(err, boltstore.ErrMissing):
		return log, missingCopy{flag, path}
	case err != nil:
		return log, fmt.Errorf("%s: %w", flag, err)
	}
	return log, nil
}

// missingCopy is ErrMissing in other words.
type missingCopy struct{ flag, path string }

func (e missingCopy) Error() string {
	return fmt.Sprintf("%s: there is no file %s\nhint: name a backup, or another copy of the store; nothing was made", e.flag, e.path)
}
func (e missingCopy) Unwrap() error { return boltstore.ErrMissing }

func summary(store string, ask broker.Restore, plan *broker.Restoration, report boltstore.Report) *restored {
	d := &restored{
		Store: store, Backup: plan.Backup.String(), Fork: plan.Fork, Agree: plan.Agree, Carried: []carried{},
		Notes: plan.Notes, Report: report, First: plan.Behind.Seq + 1, Kept: plan.Kept,
	}
	for i, rec := range plan.Records {
		if rec.Era != nil {
			d.Era, d.Lost = rec.Era.Era.String(), rec.Details.Restored.LocksLost
			continue
		}
		c := carried{Number: d.First + uint64(i), Actor: rec.Details.Actor, Reason: rec.Details.Reason}
		if from := rec.Details.CarriedFrom; from != nil {
			c.Was = from.Number
		}
		switch {
		case rec.Lift != nil:
			c.What, c.Names = "lift", []string{fmt.Sprintf("of lock %d", rec.Lift.Lock)}
		case rec.Details.Lock == broker.LockNone:
			c.What = "keys"
		default:
			c.What = "lock"
		}
		if rec.Revocation != nil {
			for _, s := range rec.Revocation.Selectors {
				c.Names = append(c.Names, s.String())
			}
		}
		d.Carried = append(d.Carried, c)
	}
	return d
}

func (d *restored) print(w io.Writer) {
	fmt.Fprintf(w, "store         %s, checked and on the disk\nfrom          %s\nera           %s, from number %d on\nlocks kept    %d, by their old numbers\n",
		d.Store, d.Backup, d.Era, d.First, d.Kept)
	for _, c := range d.Carried {
		was := ""
		if c.Was > 0 {
			was = fmt.Sprintf(" (was %d)", c.Was)
		}
		fmt.Fprintf(w, "carried over  %d%s: %s %q, by %s: %q\n", c.Number, was, c.What, c.Names, c.Actor, c.Reason)
	}
	for _, n := range d.Notes {
		fmt.Fprintf(w, "note          %s\n", n)
	}
	fmt.Fprintln(w, "next          start the broker; verifiers, agents and workloads follow by themselves")
}
