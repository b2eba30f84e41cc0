package agent

import (
	"fmt"
	"strings"
	"time"

	"github.com/dayflyhq/dayfly/agent/deliver"
	"github.com/dayflyhq/dayfly/sdk"
)

// filesRequests lists what the files hold, to be kept fresh.
func filesRequests(targets []deliver.Target) []Request {
	var out []Request
	for _, t := range targets {
		for _, f := range t.Files {
			for _, r := range f.Credentials {
				out = append(out, fileRequest(r))
			}
		}
	}
	return out
}

func fileRequest(r sdk.Request) Request {
	return Request{Audience: r.Audience, Scopes: r.Scopes, TTL: r.TTL, Binding: r.Binding}
}

// deliverer returns what keeps the files, from the credentials in memory.
func (a *Agent) deliverer() (*deliver.Deliverer, error) {
	return deliver.New(deliver.Config{
		Targets: a.live.Load().Files,
		Newest:  a.Newest,
		Changed: a.changedOf,
		Alive:   a.Alive,
		Run:     a.cfg.Run,

		Delivered: a.cache.delivered,

		Now: a.cfg.Now, Log: a.cfg.Log,
	})
}

// changedOf is Changed of these alone.
func (a *Agent) changedOf(requests []sdk.Request) func() <-chan struct{} {
	h := a.cache.hear()
	for _, r := range requests {
		if want := fileRequest(r); want.normalize() == nil {
			h.of[want.key()] = true
		}
	}
	return h.changed
}

func (a *Agent) checkFiles() Check {
	var wrong []string
	state := Ready
	for _, s := range a.files.Status() {
		switch {
		case s.Err == nil && s.Present && s.ChangeErr == nil:
		case s.Present:
			state = worse(state, Serving)
		default:
			state = Failed
		}
		switch {
		case s.Err != nil && s.Present:
			wrong = append(wrong, fmt.Sprintf("%s: %v; what is there is good until %s", s.Path, s.Err, s.Until.UTC().Format(time.RFC3339)))
		case s.Err != nil:
			wrong = append(wrong, fmt.Sprintf("%s: %v", s.Path, s.Err))
		case !s.Present:
			wrong = append(wrong, s.Path+": waits for its credentials")
		case s.ChangeErr != nil:
			wrong = append(wrong, fmt.Sprintf("%s: telling of the change: %v", s.Path, s.ChangeErr))
		}
	}
	return Check{Name: "files", State: state, Message: strings.Join(wrong, "; ")}
}

// present and failing count files for the metrics.
func (a *Agent) present() (n uint64) {
	for _, s := range a.files.Status() {
		if s.Present {
			n++
		}
	}
	return n
}

func (a *Agent) failing() (n uint64) {
	for _, s := range a.files.Status() {
		if s.Err != nil || s.ChangeErr != nil {
			n++
		}
	}
	return n
}
