package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/sdk"
)

// Pauses between attempts to reach a broker that is away.
const (
	minPause = 100 * time.Millisecond
	maxPause = 2 * time.Second
)

// pause waits, longer after each attempt, and returns false when ctx has ended.
func pause(ctx context.Context, attempt int) bool {
	d := maxPause
	if attempt < 5 {
		d = min(minPause<<attempt, maxPause)
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// again reports whether the same call may succeed a moment later.
func again(err error) bool {
	var e *sdk.Error
	if !errors.As(err, &e) {
		var f *failure
		return errors.As(err, &f) && f.code == exitUnavailable || errors.Is(err, io.EOF)
	}
	return e.Temporary() || errors.Is(err, sdk.ErrSVIDExpired)
}

// follow watches a containment until it is complete or ctx ends, over brokers that
// restart and SVIDs that rotate, and returns the last that is known. show is called
// with each, in order; the given client stays open. The error is one that waiting doesn't
// mend. It watches once at least: who accepts outside the feed is said there alone.
func (a *app) follow(ctx context.Context, given *sdk.Client, sequence uint64, last *dayflyv1.Containment, show func(*dayflyv1.Containment)) (*dayflyv1.Containment, error) {
	client, heard := given, false
	for attempt := 0; !(heard && last.GetContained()) && ctx.Err() == nil; attempt++ {
		var err error
		if client == nil {
			client, err = a.dialOperator(ctx)
		}
		if err == nil {
			err = watch(ctx, client, sequence, func(c *dayflyv1.Containment) {
				last, heard, attempt = c, true, 0
				show(c)
			})
			if client != given {
				client.Close()
			}
			client = nil
		}
		switch {
		case heard && last.GetContained():
			return last, nil
		case ctx.Err() != nil:
			continue // to the end
		case !again(err):
			return last, err
		}
		if isTerminal(a.stderr) {
			a.notef("the broker can't be reached, trying on: %s", clean(reportOf(err).Message))
		}
		pause(ctx, attempt)
	}
	if !heard && last.GetContained() {
		return last, errors.New("who accepts outside the feed wasn't answered")
	}
	return last, nil
}

// watch reads one stream to its end, which is io.EOF for a regular one.
func watch(ctx context.Context, client *sdk.Client, sequence uint64, show func(*dayflyv1.Containment)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := dayflyv1.NewRevocationServiceClient(client.Conn()).WatchContainment(ctx, &dayflyv1.WatchContainmentRequest{Sequence: sequence})
	if err != nil {
		return err
	}
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		show(m.GetContainment())
	}
}

// progress returns a show for follow: on a terminal, a line for each verifier whose
// state has changed. Pending is where all of them begin, and says nothing new.
func (a *app) progress(since time.Time) func(*dayflyv1.Containment) {
	known := map[string]dayflyv1.ReceiptState{}
	return func(c *dayflyv1.Containment) {
		if !isTerminal(a.stderr) {
			return
		}
		for _, r := range c.GetReceipts() {
			key := r.GetIdentity() + "\x00" + r.GetInstance()
			if known[key] == r.GetState() || r.GetState() == dayflyv1.ReceiptState_RECEIPT_STATE_PENDING {
				continue
			}
			known[key] = r.GetState()
			a.notef("%8s  %s  %s", span(a.now().Sub(since)), a.state(a.stderr, r.GetState()), clean(receiptName(r)))
		}
	}
}

// stateName is short enough for a column.
func stateName(s dayflyv1.ReceiptState) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "RECEIPT_STATE_"))
}

func (a *app) state(stream io.Writer, s dayflyv1.ReceiptState) string {
	text := fmt.Sprintf("%-9s", stateName(s))
	switch s {
	case dayflyv1.ReceiptState_RECEIPT_STATE_CONFIRMED, dayflyv1.ReceiptState_RECEIPT_STATE_CLOSED:
		return a.paint(stream, green, text)
	case dayflyv1.ReceiptState_RECEIPT_STATE_PENDING:
		return a.paint(stream, yellow, text)
	}
	return a.paint(stream, red, text)
}

// complete is nil once nobody accepts what was revoked; what no feed reaches counts
// until it has expired. Else it is the error that gives exit code 3.
func (a *app) complete(sequence uint64, c *dayflyv1.Containment) error {
	show := fmt.Sprintf("dayfly revocations show %d --watch", sequence) + a.sameWay()
	if !c.GetContained() {
		return failf(exitIncomplete, show, "revocation %d is recorded, but not contained everywhere yet", sequence)
	}
	// Those that the broker names: this machine's clock ends nothing.
	if open := c.GetExternal(); len(open) > 0 {
		return failf(exitIncomplete, "tell the owners: these tokens can't be called back, they expire", "revocation %d is contained in the feed, but %s outside it accept until expiry", sequence, count(uint64(len(open)), "audience", "audiences"))
	}
	return nil
}

// writeContainment is the answer to "is it over?", with who says so.
func (a *app) writeContainment(w io.Writer, r *dayflyv1.Revocation, c *dayflyv1.Containment) {
	sum := fmt.Sprintf("%d confirmed, %d closed, %d pending, %d unbounded", c.GetConfirmed(), c.GetClosed(), c.GetPending(), c.GetUnbounded())
	open := c.GetExternal()
	switch {
	case c.GetContained() && len(open) == 0:
		after := ""
		if r.GetTime() != nil && c.GetContainedAt() != nil {
			after = " after " + span(max(0, c.GetContainedAt().AsTime().Sub(r.GetTime().AsTime())))
		}
		fmt.Fprintf(w, "%s%s: %s.%s\n", a.paint(a.stdout, green, "CONTAINED"), after, sum, slowest(r, c))
	case c.GetContained():
		fmt.Fprintf(w, "%s in the feed (%s), but not beyond it.\n", a.paint(a.stdout, yellow, "CONTAINED"), sum)
	default:
		by := ""
		if c.GetUnbounded() == 0 && c.GetContainedBy() != nil {
			by = "; contained by " + at(c.GetContainedBy()) + " at the latest, whoever stays silent"
		}
		fmt.Fprintf(w, "%s: %s%s.\n", a.paint(a.stdout, red, "NOT CONTAINED YET"), sum, by)
	}
	a.writeReceipts(w, c.GetReceipts())
	if len(open) > 0 {
		fmt.Fprintln(w, "\nOutside the feed, accepted until it expires:")
		writeAudiences(w, "AUDIENCE", open)
	}
	a.writeUsesAfter(w, c.GetUsesAfter())
}

// slowest names the verifier that containment waited for, where there was a choice: the
// last to confirm, or one that never did and had to close.
func slowest(r *dayflyv1.Revocation, c *dayflyv1.Containment) string {
	if len(c.GetReceipts()) < 2 || r.GetTime() == nil || c.GetContainedAt() == nil {
		return ""
	}
	var closed *dayflyv1.Receipt
	for _, x := range c.GetReceipts() {
		switch {
		case x.GetState() == dayflyv1.ReceiptState_RECEIPT_STATE_CLOSED:
			closed = x
		case x.GetState() == dayflyv1.ReceiptState_RECEIPT_STATE_CONFIRMED && x.GetSince().AsTime().Equal(c.GetContainedAt().AsTime()):
			return fmt.Sprintf(" Slowest: %s.", clean(receiptName(x)))
		}
	}
	if closed == nil {
		return ""
	}
	return fmt.Sprintf(" Slowest: %s, which never confirmed.", clean(receiptName(closed)))
}

// writeUsesAfter lists who still presents what is revoked, and who still accepts it.
func (a *app) writeUsesAfter(w io.Writer, uses []*dayflyv1.UseAfter) {
	if len(uses) == 0 {
		return
	}
	fmt.Fprintln(w, "\nUsed after the revocation, as verifiers report:")
	section(w, "VERIFIER\tREFUSED\tACCEPTED BEFORE IT KNEW\tACCEPTED KNOWING\tLAST SEEN\tPRESENTED BY\tFROM", uses, func(u *dayflyv1.UseAfter) {
		more := ""
		if u.GetMore() {
			more = " and more"
		}
		row(w, verifierName(u.GetVerifier(), u.GetClaimedIdentity()), strconv.FormatUint(u.GetRefused(), 10), strconv.FormatUint(u.GetAcceptedUnaware(), 10), strconv.FormatUint(u.GetAcceptedKnowing(), 10),
			at(u.GetLastSeen()), orDash(strings.Join(u.GetPeers(), ",")), orDash(strings.Join(u.GetAddresses(), ","))+more)
	})
	for _, u := range uses {
		if u.GetAcceptedKnowing() > 0 {
			fmt.Fprintf(w, "%s %s accepted what it knew to be revoked: it doesn't do its job. Call its owner.\n", a.paint(a.stdout, red, "BROKEN VERIFIER:"), clean(verifierName(u.GetVerifier(), u.GetClaimedIdentity())))
		}
	}
}

// verifierName is who a verifier is: what it proved to the broker, or what a relay says
// that it proved there. A relay's word is shown as one.
func verifierName(proven, claimed string) string {
	if claimed == "" {
		return proven
	}
	return claimed + ", by the word of " + proven
}

// receiptName is the same of a receipt, and tells one that a relay doesn't name from the
// relay itself.
func receiptName(r *dayflyv1.Receipt) string {
	if r.GetClaimedIdentity() == "" && len(r.GetVia()) > 0 {
		return "unnamed, beside " + r.GetIdentity()
	}
	return verifierName(r.GetIdentity(), r.GetClaimedIdentity())
}

func (a *app) writeReceipts(w io.Writer, receipts []*dayflyv1.Receipt) {
	if len(receipts) == 0 {
		return
	}
	fmt.Fprintln(w, "\nSTATE\tVERIFIER\tINSTANCE\tAUDIENCES\tWHEN")
	for _, r := range receipts {
		when := at(r.GetSince())
		switch r.GetState() {
		case dayflyv1.ReceiptState_RECEIPT_STATE_CLOSED:
			when = "refuses everything since " + when
		case dayflyv1.ReceiptState_RECEIPT_STATE_PENDING:
			when = "closes by " + at(r.GetClosesAt()) + " if it stays silent"
		case dayflyv1.ReceiptState_RECEIPT_STATE_UNBOUNDED:
			when = "accepts when stale: bounded by expiry alone"
		}
		instance := r.GetInstance()
		if len(r.GetVia()) > 0 {
			instance += " via " + strings.Join(r.GetVia(), ", ")
		}
		row(w, stateName(r.GetState()), receiptName(r), instance, orDash(strings.Join(r.GetAudiences(), ",")), when)
	}
}
