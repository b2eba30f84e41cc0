package main

import (
	"fmt"
	"io"
	"regexp"
	"strings"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/wire"
)

// A proposed call is one that waits for a second person.
type proposed struct {
	what     string // "everything takes two persons: nothing is revoked yet"
	verb     string // with its arguments: "lift 1043"
	proposal *dayflyv1.Proposal
}

// write tells a lone operator at night what to do: who may confirm, how, until when,
// and how to do without.
func (a *app) writeProposed(w io.Writer, p proposed) {
	fmt.Fprintf(w, "%s at %s: %s\n", a.paint(a.stdout, yellow, "PROPOSED"), at(p.proposal.GetTime()), p.what)
	fmt.Fprintf(w, "\nAnother operator confirms it until %s with:\n\n  dayfly %s%s\n\n", at(p.proposal.GetExpiresAt()), p.verb, a.brokerFlags())
	if list := p.proposal.GetConfirmers(); len(list) > 0 {
		fmt.Fprintf(w, "May confirm, by policy data: %s\n", clean(strings.Join(list, ", ")))
	} else {
		fmt.Fprintln(w, "Policy data names nobody else who may confirm: its owner can add somebody under operators.")
	}
	fmt.Fprintf(w, "Root on the broker's host needs no second person:\n\n  sudo dayfly %s --break-glass unix:///run/dayfly/break-glass.sock\n\n", p.verb)
	fmt.Fprintln(w, "(the socket's path is listen.break_glass of the broker's configuration)")
}

// waits is the error of a call that only proposed, with its exit code.
func (p proposed) waits() error {
	return failf(exitProposed, fmt.Sprintf("another operator runs, until %s: dayfly %s", at(p.proposal.GetExpiresAt()), p.verb), "%s", p.what)
}

// brokerFlags name the broker for somebody whose environment doesn't.
func (a *app) brokerFlags() string {
	return " --broker " + quote(a.or(a.conn.broker, "DAYFLY_BROKER")) + " --broker-id " + quote(a.or(a.conn.brokerID, "DAYFLY_BROKER_ID"))
}

// revokeVerb is the command that asks for the same revocation.
func revokeVerb(req *dayflyv1.RevokeRequest) string {
	words := []string{"revoke"}
	for _, m := range req.GetSelectors() {
		s, err := wire.ToSelector(m)
		if err != nil {
			continue // it was made of one
		}
		flag := "--everything"
		for _, k := range selectorKinds {
			if k.kind == s.Kind() {
				flag = "--" + k.flag + " " + quote(s.Value())
			}
		}
		words = append(words, flag)
	}
	if req.GetLockMode() != dayflyv1.LockMode_LOCK_MODE_UNSPECIFIED {
		words = append(words, "--lock "+lockName(req.GetLockMode()))
	}
	if end := req.GetLockEndsAt(); end != nil {
		words = append(words, "--lock-until "+end.AsTime().Format(time.RFC3339))
	}
	return strings.Join(append(words, "--reason "+quote(req.GetReason())), " ")
}

var plainWord = regexp.MustCompile(`^[A-Za-z0-9_@%+=:,./-]+$`)

// quote writes a word for a shell.
func quote(s string) string {
	s = clean(s)
	if plainWord.MatchString(s) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
