package agentd

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/dayflyhq/dayfly/agent"
	"github.com/dayflyhq/dayfly/cmd/internal/config"
	"github.com/spf13/cobra"
)

// Exit codes of status, beside 1 (the agent can't be asked) and 2 (usage).
const (
	exitServing = 3
	exitFailed  = 4
)

const (
	// defaultSocket is where deploy/agent.yaml has the HTTP socket.
	defaultSocket = "/run/dayfly/agent-http.sock"
	// statusTimeout bounds one question: the agent answers from memory.
	statusTimeout = 5 * time.Second
	// maxReport bounds the answer: 1,024 credentials with 32 scopes each are below it.
	maxReport = 8 << 20
	// minWatch keeps --watch from being a load.
	minWatch = 100 * time.Millisecond
)

// A statusError makes the exit code of a state that isn't ready.
type statusError struct {
	state agent.State
	code  int
}

func (e statusError) Error() string { return "the agent's state is " + string(e.state) }
func (e statusError) ExitCode() int { return e.code }

type statusFlags struct {
	socket, output string
	watch          time.Duration
}

func statusCommand() *cobra.Command {
	var f statusFlags
	cmd := &cobra.Command{
		Use:   "status",
		Short: "say how a running agent is, and what it holds",
		Long: "Asks a running agent over its HTTP socket (sockets.http) how it is: the state, the SVID,\n" +
			"each credential with its age and its next renewal, files, the feed and requests. No token\n" +
			"is shown. Whoever may ask for credentials there may ask for this.\n\n" +
			"Exit codes: 0 ready, 1 the agent can't be asked, 2 the command line is wrong, 3 serving\n" +
			"(what is held is valid, but something can't be renewed), 4 failed. With --watch: 0 it was\n" +
			"told to stop.",
		Example: "  dayfly-agent status\n" +
			"  dayfly-agent status --socket /run/dayfly/agent-http.sock --output json | jq .state\n" +
			"  dayfly-agent status --watch 2s",
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.check(); err != nil {
				return config.UsageError{Err: err}
			}
			return f.run(cmd.Context(), cmd.OutOrStdout())
		},
	}
	fs := cmd.Flags()
	fs.StringVarP(&f.socket, "socket", "s", defaultSocket, "`path` of the agent's HTTP socket")
	fs.StringVarP(&f.output, "output", "o", "text", "text or json")
	fs.DurationVarP(&f.watch, "watch", "w", 0, "ask again so often, until it is interrupted")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp)) // the flag is there
	return cmd
}

func (f *statusFlags) check() error {
	f.socket = strings.TrimPrefix(f.socket, "unix://")
	var errs []error
	if f.output != "text" && f.output != "json" {
		errs = append(errs, fmt.Errorf("--output %q: text or json", f.output))
	}
	if f.watch != 0 && f.watch < minWatch {
		errs = append(errs, fmt.Errorf("--watch %v: at least %v", f.watch, minWatch))
	}
	if f.socket == "" {
		errs = append(errs, errors.New("--socket: the path of sockets.http in the agent's configuration"))
	}
	return errors.Join(errs...)
}

func (f *statusFlags) run(ctx context.Context, stdout io.Writer) error {
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", f.socket)
	}}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: statusTimeout}
	for {
		raw, r, err := ask(ctx, client)
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil:
			err = f.print(stdout, raw, r)
		case f.watch > 0: // it may come back
			_, err = fmt.Fprintf(stdout, "the agent at %s can't be asked: %s\n\n", f.socket, plain(err.Error()))
		default:
			return fmt.Errorf("asking the agent at %s: %w (is it running, and is this its HTTP socket? see --socket)", f.socket, err)
		}
		if err != nil || f.watch == 0 {
			return cmp.Or(err, stateError(r))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(f.watch):
		}
	}
}

func stateError(r *agent.Report) error {
	switch r.State {
	case agent.Ready:
		return nil
	case agent.Serving:
		return statusError{r.State, exitServing}
	}
	return statusError{r.State, exitFailed}
}

// ask returns the answer as it came, and as it was read.
func ask(ctx context.Context, client *http.Client) ([]byte, *agent.Report, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent/v1/status", nil)
	if err != nil {
		return nil, nil, err
	}
	resp, err := client.Do(req)
	var call *url.Error
	switch {
	case errors.As(err, &call) && strings.Contains(err.Error(), "malformed HTTP"):
		return nil, nil, errors.New("it doesn't speak HTTP")
	case errors.As(err, &call):
		return nil, nil, call.Err
	case err != nil:
		return nil, nil, err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxReport))
	if err != nil {
		return nil, nil, err
	}
	if resp.StatusCode != http.StatusOK {
		var refusal struct{ Reason, Message, Hint string }
		if json.Unmarshal(raw, &refusal) != nil || refusal.Reason == "" {
			return nil, nil, fmt.Errorf("it answers with status %d", resp.StatusCode)
		}
		return nil, nil, fmt.Errorf("%s: %s (%s)", plain(refusal.Reason), plain(refusal.Message), plain(refusal.Hint))
	}
	r := new(agent.Report)
	if err := json.Unmarshal(raw, r); err != nil || r.State == "" {
		return nil, nil, errors.New("its answer is no status")
	}
	return raw, r, nil
}

func (f *statusFlags) print(w io.Writer, raw []byte, r *agent.Report) error {
	if f.output == "json" {
		_, err := w.Write(raw) // one line, for whoever watches
		return err
	}
	table := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	printReport(table, r)
	if f.watch > 0 {
		fmt.Fprintln(table)
	}
	return table.Flush()
}

// line prints cells that are one line of printable text, whatever is in them.
func line(w io.Writer, cells ...string) {
	for i := range cells {
		cells[i] = plain(cells[i])
	}
	fmt.Fprintln(w, strings.Join(cells, "\t"))
}

func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, s)
}

func printReport(w io.Writer, r *agent.Report) {
	line(w, "state", string(r.State))
	for _, c := range r.Checks {
		if c.State != agent.Ready {
			line(w, "", fmt.Sprintf("%s is %s: %s", c.Name, c.State, c.Message))
		}
	}
	if id := r.Identity; id != nil {
		line(w, "identity", id.SPIFFEID, "SVID valid for "+span(id.ExpiresInS))
	} else {
		line(w, "identity", "none yet")
	}
	line(w, "broker", upstreamText(&r.Upstream))
	if feed := r.Feed; feed != nil {
		line(w, "feed", feedText(feed))
	}
	if c := r.Configuration; c != nil && c.ReloadFailedSince != nil {
		line(w, "configuration", "of "+c.ReadAt.Format(time.RFC3339)+"; reload failed since "+c.ReloadFailedSince.Format(time.RFC3339)+", the log says why")
	}
	line(w, "agent", r.Version, "up "+span(r.UptimeS))
	if len(r.Credentials) > 0 {
		fmt.Fprintln(w)
		line(w, "AUDIENCE", "SCOPES", "BINDING", "AGE", "EXPIRES", "NEXT", "GRANT", "FAILED")
	}
	for _, c := range r.Credentials {
		line(w, credentialCells(&c)...)
	}
	if len(r.Files) > 0 {
		fmt.Fprintln(w)
		line(w, "FILE", "THERE", "UNTIL", "FAILED")
	}
	for _, one := range r.Files {
		until := ""
		if one.Until != nil {
			until = one.Until.Format(time.RFC3339)
		}
		line(w, one.Path, yes(one.Present), until, cmp.Or(one.Error, one.ChangeError))
	}
	if len(r.Listeners) > 0 {
		fmt.Fprintln(w)
		line(w, "LISTENER", "ADDRESS", "REQUESTS")
	}
	for _, l := range r.Listeners {
		var counts []string
		for _, outcome := range slices.Sorted(maps.Keys(l.Requests)) {
			counts = append(counts, fmt.Sprintf("%s %d", outcome, l.Requests[outcome]))
		}
		line(w, l.Name, l.Address, strings.Join(counts, ", "))
	}
}

func credentialCells(c *agent.CredentialInfo) []string {
	audience, scopes := c.Audience, cmp.Or(strings.Join(c.Scopes, " "), "-")
	if !c.Configured {
		audience += " (asked for)"
	}
	cells := []string{audience, scopes, cmp.Or(c.Binding, "-"), "-", "not there", "in " + span(c.RenewInS), "-", ""}
	if c.Held {
		cells[3], cells[4], cells[6] = span(c.AgeS), "in "+span(c.ExpiresInS), c.Grant
	}
	if f := c.Failure; f != nil {
		cells[7] = fmt.Sprintf("%s, %d times since %s", f.Reason, f.Count, f.Since.Format(time.RFC3339))
	}
	return cells
}

func upstreamText(u *agent.UpstreamInfo) string {
	switch {
	case u.Reachable:
		return "reachable"
	case u.UnreachableSince != nil:
		return "not reachable since " + u.UnreachableSince.Format(time.RFC3339)
	}
	return "not reached yet"
}

func feedText(f *agent.FeedInfo) string {
	if !f.Known {
		return "no proof yet"
	}
	text := fmt.Sprintf("at %s, %v old (bound %v)", f.Position, time.Duration(f.AgeMS)*time.Millisecond, time.Duration(f.BoundMS)*time.Millisecond)
	if f.Relays {
		text += fmt.Sprintf(", relays to %d", f.Verifiers)
	}
	return text
}

func span(seconds int64) string { return (time.Duration(seconds) * time.Second).String() }

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
