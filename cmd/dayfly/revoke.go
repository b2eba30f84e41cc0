package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"
	"unicode/utf8"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/revocation"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	// maxReason is the protocol's, in characters.
	maxReason = 1024
	// defaultWait is twice the default staleness bound: by then it is contained or
	// it is known who keeps it from being.
	defaultWait = time.Minute
)

// revokeFlags is one revocation as it is asked for.
type revokeFlags struct {
	selectors selectorFlags
	lock      lockFlags
	tokenFile string
	reason    string
	dryRun    bool
	seenFrom  string
	yes       bool
	wait      time.Duration
	key       string
}

func (a *app) revokeCmd() *cobra.Command {
	var flags revokeFlags
	cmd := &cobra.Command{
		Use:   "revoke",
		Short: "Kill credentials and everything derived from them, and prove it",
		Long: `Record one revocation: whatever it matches is dead, with all that was derived from
it, as soon as a verifier knows. Then wait for the receipts of the verifiers.

What is matched is said by flags, several of them if need be: it is one record. A
leaked token comes from a file or from stdin; it is read here and never leaves this
machine. Its grant is looked up and compared with it.

Identities, subtrees, trust domains and SVIDs are also locked, unless --lock says
otherwise:

  quarantine  nobody with that identity gets credentials, until lifted (default)
  reissue     only SVIDs issued after the revocation do: the workload heals itself
  none        everyone does: a token leaked, not an identity

Everything takes two persons: the first call proposes and says how another operator
confirms; root on the broker's host needs nobody else (--break-glass).

Exit codes: 0 contained, 3 recorded but somebody may still accept it, 4 refused,
5 the broker could not be reached, 6 proposed: nothing is revoked yet.
docs/incident.md is the page for an emergency.`,
		Example: `  dayfly revoke --identity spiffe://example.org/payments --dry-run
  dayfly revoke --identity spiffe://example.org/payments --dry-run --seen-from 203.0.113.9
  dayfly revoke --identity spiffe://example.org/payments --reason "host owned, INC-7"
  dayfly revoke --token-file leaked.jwt --reason "found in a ticket" --yes
  dayfly revoke --subtree 'spiffe://example.org/ns/prod/*' --lock reissue --lock-for 2h --reason "rotated the nodes"
  sudo dayfly revoke --break-glass unix:///run/dayfly/break-glass.sock --everything --reason "INC-8"`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.revoke(cmd.Context(), &flags) },
	}
	f := cmd.Flags()
	flags.selectors.add(f)
	addTokenFile(f, &flags.tokenFile, "")
	f.StringVarP(&flags.reason, "reason", "r", "", "why, for the records (required)")
	f.StringVar(&flags.lock.mode, "lock", "", "who gets new credentials: quarantine, reissue or none")
	f.DurationVar(&flags.lock.last, "lock-for", 0, "when the lock ends by itself; 0: when it is lifted")
	f.StringVar(&flags.lock.until, "lock-until", "", "the same as a `time`: 2026-11-23T15:00:00Z")
	f.BoolVar(&flags.dryRun, "dry-run", false, "show what would die and break, and change nothing")
	f.StringVar(&flags.seenFrom, "seen-from", "", "suspicious network `address`: does one SVID alone come from there?")
	f.BoolVarP(&flags.yes, "yes", "y", false, "don't ask; needed where stdin is no terminal")
	f.DurationVar(&flags.wait, "wait", defaultWait, "how long to wait for containment; 0: don't")
	f.StringVar(&flags.key, "idempotency-key", "", "`key` of an attempt whose outcome is unknown: repeated, it is recorded once")
	a.conn.addBreakGlass(f)
	complete(cmd, "lock", "quarantine", "reissue", "none")
	return cmd
}

func (a *app) revoke(ctx context.Context, flags *revokeFlags) error {
	selectors, mode, err := flags.check(a)
	if err != nil {
		return err
	}
	var leaked *token.Token
	if flags.tokenFile != "" {
		if _, leaked, err = a.readToken(flags.tokenFile); err != nil {
			return err
		}
		selectors = append(selectors, revocation.Grant(leaked.Grant()))
	}
	client, err := a.dialOperator(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	if leaked != nil {
		if err := a.checkLeaked(ctx, client, leaked); err != nil {
			return err
		}
	}
	req := &dayflyv1.RevokeRequest{
		Selectors: wire.Selectors(selectors), LockMode: mode, Reason: flags.reason,
		IdempotencyKey: flags.key, AllowEverything: flags.selectors.everything,
	}
	if flags.dryRun {
		return a.dryRun(ctx, client, req, flags.seenFrom)
	}
	if !flags.yes {
		if err := a.confirmRevoke(ctx, client, selectors, req, flags.seenFrom); err != nil {
			return err
		}
	}
	if req.LockEndsAt, err = flags.lock.end(a.now()); err != nil { // here, so that a long look doesn't shorten it
		return err
	}
	return a.record(ctx, client, req, flags.wait)
}

// check finds every mistake that needs no broker to find.
func (r *revokeFlags) check(a *app) ([]revocation.Selector, dayflyv1.LockMode, error) {
	selectors, err := r.selectors.parse()
	if err != nil {
		return nil, 0, err
	}
	if len(selectors) == 0 && r.tokenFile == "" {
		return nil, 0, usagef("name an --identity, a --grant, a --token-file, or see --help", "nothing is named that could be revoked")
	}
	if len(selectors) > maxSelectors {
		return nil, 0, usagef("revoke them in several goes", "%d selectors are too many: one revocation holds %d", len(selectors), maxSelectors)
	}
	mode, err := r.lock.parse(selectors, a.now())
	if err != nil {
		return nil, 0, err
	}
	if r.wait < 0 {
		return nil, 0, usagef("write a duration such as 30s, or 0", "--wait is negative")
	}
	if r.seenFrom != "" {
		if _, err := netip.ParseAddr(r.seenFrom); err != nil {
			return nil, 0, usagef("--seen-from 203.0.113.9", "--seen-from %q is no network address: it has no port", short(r.seenFrom))
		}
		if r.yes && !r.dryRun {
			return nil, 0, usagef("look with --dry-run --seen-from first", "--seen-from changes what is shown, and --yes shows nothing")
		}
	}
	if r.key == "" {
		r.key = rand.Text()
	}
	if r.dryRun {
		return selectors, mode, nil
	}
	if err := checkReason(r.reason); err != nil {
		return nil, 0, err
	}
	if !r.yes && !isTerminal(a.stdin) {
		return nil, 0, usagef("look with --dry-run, then add --yes", "stdin is no terminal to confirm on")
	}
	return selectors, mode, nil
}

func checkReason(reason string) error {
	n := utf8.RuneCountInString(reason)
	switch {
	case strings.TrimSpace(reason) == "":
		return usagef(`--reason "INC-7: host owned"`, "--reason is missing: whoever reads the records must know why")
	case n > maxReason:
		return usagef("put the rest into the ticket", "--reason has %d characters, at most %d are kept", n, maxReason)
	}
	return nil
}

func (a *app) dryRun(ctx context.Context, client *sdk.Client, req *dayflyv1.RevokeRequest, seenFrom string) error {
	plan, err := a.plan(ctx, dayflyv1.NewRevocationServiceClient(client.Conn()), req, seenFrom)
	if err != nil {
		return err
	}
	return a.print(plan, func(w io.Writer) {
		a.writePlan(w, plan)
		fmt.Fprintln(w, "\nDry run: nothing was changed.")
	})
}

// checkLeaked compares a token with the record of its grant: a token that bears
// somebody else's grant ID must not make us kill that one.
func (a *app) checkLeaked(ctx context.Context, client *sdk.Client, t *token.Token) error {
	ctx, cancel := a.call(ctx)
	defer cancel()
	resp, err := dayflyv1.NewGrantServiceClient(client.Conn()).GetGrant(ctx, &dayflyv1.GetGrantRequest{Grant: t.Grant().String()})
	var refused *sdk.Error
	switch {
	case errors.As(err, &refused) && refused.Code == codes.Unimplemented:
		a.notef("the records can't be asked here: grant %s is taken from the token, unchecked", t.Grant())
		return nil
	case errors.As(err, &refused) && refused.Code == codes.NotFound:
		return failf(exitFailure, fmt.Sprintf("it is of another broker, or expired long ago, or forged; forged and yet accepted somewhere means a stolen key: dayfly revoke --key %s", t.Self().Key), "no record of this token's grant %s: %w", t.Grant(), plain(refused))
	case err != nil:
		return err
	case !bytes.Equal(resp.GetGrant().GetFingerprint(), t.Fingerprint[:]):
		return failf(exitFailure, fmt.Sprintf("it is forged, and bears the ID of an innocent grant; if it is accepted anywhere, a key is stolen: dayfly revoke --key %s", t.Self().Key), "this token is not the one that was recorded as grant %s", t.Grant())
	}
	a.notef("the token is grant %s of %s for %s", t.Grant(), clean(t.Presenter().String()), clean(t.Audience))
	if !a.now().Before(t.Expires) {
		a.notef("it expired %s ago, and nothing derived from it lives longer", span(a.now().Sub(t.Expires)))
	}
	return nil
}

// plain is a refusal without reason and hint, for a sentence of ours.
func plain(e *sdk.Error) error { return errors.New(e.Message) }

// confirmRevoke shows what would die and break, and has the operator type what is to be
// revoked. The plan gets half the time of a call: a revocation doesn't wait long for a
// scan of the records.
func (a *app) confirmRevoke(ctx context.Context, client *sdk.Client, selectors []revocation.Selector, req *dayflyv1.RevokeRequest, seenFrom string) error {
	quick, cancel := context.WithTimeout(ctx, a.timeout/2)
	plan, err := a.plan(quick, dayflyv1.NewRevocationServiceClient(client.Conn()), req, seenFrom)
	cancel()
	if err != nil {
		a.notef("what would die isn't known (%s); that keeps nothing from being revoked", clean(reportOf(err).Message))
	} else {
		_ = tableTo(a.stderr, func(w io.Writer) { a.writePlan(w, plan) })
		a.notef("")
	}
	for _, s := range selectors {
		a.notef("  %s", clean(s.String()))
	}
	return a.confirm(ctx, confirmation(selectors))
}

// confirmation is what is typed: the thing itself, so that a wrong one is noticed.
func confirmation(selectors []revocation.Selector) string {
	switch {
	case len(selectors) > 1:
		return fmt.Sprintf("revoke %d selectors", len(selectors))
	case selectors[0].Value() != "":
		return selectors[0].Value()
	}
	return selectors[0].String()
}

// record revokes and waits for the receipts.
func (a *app) record(ctx context.Context, client *sdk.Client, req *dayflyv1.RevokeRequest, wait time.Duration) error {
	began := a.now()
	resp, err := a.revokeOnce(ctx, client, req)
	if err != nil {
		return err
	}
	if p := resp.GetProposal(); p != nil {
		waiting := proposed{"nothing is revoked until a second person confirms: everything takes two", revokeVerb(req), p}
		if err := a.print(resp, func(w io.Writer) { a.writeProposed(w, waiting) }); err != nil {
			return err
		}
		return waiting.waits()
	}
	r := resp.GetRevocation()
	sequence := r.GetPosition().GetSequence()
	a.noteOther(fmt.Sprintf("revocation %d", sequence), req.GetReason(), r.GetReason(), r.GetProposal())
	if a.output == outputText {
		if err := a.table(func(w io.Writer) { a.writeRecorded(w, r) }); err != nil {
			return err
		}
	}
	if resp.GetContainment().GetContained() {
		wait = max(wait, sdk.DefaultTimeout) // for who accepts outside the feed
	}
	watched := ctx
	if wait > 0 {
		var cancel context.CancelFunc
		watched, cancel = context.WithTimeout(ctx, wait)
		defer cancel()
		show := a.progress(began)
		show(resp.GetContainment())
		resp.Containment, err = a.follow(watched, client, sequence, resp.GetContainment(), show)
	}
	if printErr := a.print(resp, func(w io.Writer) { a.writeContainment(w, r, resp.GetContainment()) }); printErr != nil {
		return printErr
	}
	a.noteNothing(ctx, client, req.GetSelectors())
	if err != nil {
		return failf(exitIncomplete, fmt.Sprintf("dayfly revocations show %d", sequence)+a.sameWay(), "revocation %d is recorded, but its receipts can't be watched: %w", sequence, err)
	}
	return a.complete(sequence, resp.GetContainment())
}

// noteOther says so when the answer is what the same key recorded earlier, with a reason
// that isn't the one given now: a record is never changed.
func (a *app) noteOther(what, given, recorded string, p *dayflyv1.Proposal) {
	if recorded != given && (p == nil || p.GetReason() != given) {
		a.notef("this --idempotency-key was used before: %s stands as it was recorded, with the reason %q; the reason given now is not on record", what, clean(recorded))
	}
}

// noteNothing says so when nothing alive matched what was revoked: at 3 a.m. a typo
// must not look like success. It is asked after the revoke, so it delays nothing, and
// says nothing where it can't be known.
func (a *app) noteNothing(ctx context.Context, client *sdk.Client, selectors []*dayflyv1.Selector) {
	limited, cancel := a.call(ctx)
	defer cancel()
	grants := dayflyv1.NewGrantServiceClient(client.Conn())
	for _, s := range selectors {
		page, err := grants.ListGrants(limited, &dayflyv1.ListGrantsRequest{DerivedFrom: s, PageSize: 1})
		if err != nil || len(page.GetGrants()) > 0 {
			return
		}
	}
	a.notef("no live grant matched: if you expected some, check the spelling (dayfly grants list)")
}

// revokeOnce sends the same request until it is answered or the timeout is over; its
// key makes that one record.
func (a *app) revokeOnce(ctx context.Context, client *sdk.Client, req *dayflyv1.RevokeRequest) (*dayflyv1.RevokeResponse, error) {
	var resp *dayflyv1.RevokeResponse
	err := a.repeat(ctx, req.GetIdempotencyKey(), func(ctx context.Context) (err error) {
		resp, err = dayflyv1.NewRevocationServiceClient(client.Conn()).Revoke(ctx, req)
		return err
	})
	if f := (*failure)(nil); errors.As(err, &f) && req.GetLockEndsAt() != nil {
		f.hint += "; with --lock-until " + at(req.GetLockEndsAt()) + " as its end, or it is another request"
	}
	return resp, err
}

// repeat makes a call that bears an idempotency key, again and again while the other
// end is away, within the timeout.
func (a *app) repeat(ctx context.Context, key string, do func(context.Context) error) error {
	limited, cancel := a.call(ctx)
	defer cancel()
	for attempt := 0; ; attempt++ {
		err := do(limited)
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return unknownOutcome(exitFailure, key, err)
		case !again(err):
			return err
		}
		if attempt == 0 && isTerminal(a.stderr) {
			a.notef("trying for %s: %s", a.timeout, clean(reportOf(err).Message))
		}
		if !pause(limited, attempt) {
			return unknownOutcome(exitUnavailable, key, err)
		}
	}
}

// unknownOutcome is for a call that was made and never answered.
func unknownOutcome(code int, key string, err error) error {
	return &failure{err: err, code: code, hint: "it may have been recorded all the same; run it again with --idempotency-key " + key + ", which never records twice"}
}

func (a *app) writeRecorded(w io.Writer, r *dayflyv1.Revocation) {
	number := r.GetPosition().GetSequence()
	fmt.Fprintf(w, "%s %d recorded at %s: %s\n", a.paint(a.stdout, bold, "Revocation"), number, at(r.GetTime()), clean(selectorTexts(r.GetSelectors())))
	if p := r.GetProposal(); p != nil {
		fmt.Fprintf(w, "Proposed by %s, confirmed by %s.\n", clean(p.GetActor()), clean(r.GetActor()))
	}
	switch r.GetLockMode() {
	case dayflyv1.LockMode_LOCK_MODE_QUARANTINE:
		fmt.Fprintf(w, "Locked (quarantine): no new credentials %s\n", lockEnd(number, r.GetLockEndsAt()))
	case dayflyv1.LockMode_LOCK_MODE_REISSUE:
		fmt.Fprintf(w, "Locked (reissue): new credentials only for SVIDs issued after %s, %s\n", at(r.GetLockCut()), lockEnd(number, r.GetLockEndsAt()))
	}
}

func lockEnd(number uint64, end *timestamppb.Timestamp) string {
	if end == nil {
		return fmt.Sprintf("until somebody runs: dayfly lift %d --reason ...", number)
	}
	return fmt.Sprintf("until %s, or until somebody runs: dayfly lift %d --reason ...", at(end), number)
}
