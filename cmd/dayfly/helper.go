package main

import (
	"context"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"strings"

	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/spf13/cobra"
)

const helperLong = `Credential helpers: each speaks the protocol that a program already has for asking
another one for a credential, and answers with a fresh token. Nothing is kept: the
agent keeps tokens in its memory.

They need DAYFLY_AGENT (or --agent) in the environment of the program that runs them.
What those programs send on is a bearer token, so policy must say "binding: none" of
the audience; a helper refuses to hand out a token that its reader would find bound
to somebody else, unless --binding says that nobody looks.`

func (a *app) helperCmd() *cobra.Command {
	return group("helper", "Speak the credential protocols of git, docker, kubectl and the clouds", helperLong,
		`  dayfly helper kubernetes --audience cluster
  git config --global credential.helper 'dayfly --server git.example.org=git'`,
		a.helperKubernetesCmd(), a.helperGitCmd(), a.helperDockerCmd(), a.helperGCPCmd(), a.helperAWSCmd())
}

// calledAs puts the verb in front of the arguments of a program whose name is what git
// and docker look for: a link of that name to dayfly is a helper.
func calledAs(program string, args []string) []string {
	switch filepath.Base(program) {
	case "git-credential-dayfly":
		return append([]string{"helper", "git"}, args...)
	case "docker-credential-dayfly":
		return append([]string{"helper", "docker"}, args...)
	}
	return args
}

// maxHelperInput is far more than any program writes to a helper.
const maxHelperInput = 64 << 10

// addHelper adds the flags of tokens that are sent on as bearers.
func (r *requestFlags) addHelper(cmd *cobra.Command) {
	r.addRest(cmd)
	bearer := cmd.Flags().Lookup("binding")
	bearer.DefValue, r.binding = string(token.BindingNone), string(token.BindingNone)
	bearer.Usage = "none: refuse to hand out a token that is bound to somebody; spiffe: whoever checks it doesn't look"
}

// bearer gets a token that whoever holds it may present, as far as --binding insists.
func (a *app) bearer(ctx context.Context, flags *requestFlags) (*sdk.Credential, error) {
	cred, err := a.issue(ctx, flags)
	if err != nil {
		return nil, err
	}
	if flags.binding == string(token.BindingNone) && cred.Binding != token.BindingNone {
		return nil, failf(exitRefused, "let policy say binding: none of this audience; --binding "+string(cred.Binding)+" if whoever checks the token doesn't look at bindings",
			"policy binds a token for %s to its presenter (%s), and a helper's token is sent by others", clean(cred.Audience), cred.Binding)
	}
	return cred, nil
}

// sentence is an error in one line, for the protocols that have room for one.
func sentence(err error) string {
	r := reportOf(err)
	text := clean(r.Message)
	if r.Reason != "" {
		text += " (" + clean(r.Reason) + ")"
	}
	if r.Hint != "" {
		text += "; " + clean(r.Hint)
	}
	return text
}

// servers are the audiences of the servers that a helper knows: there is no token for
// any other, so an address that somebody else wrote gets nothing.
type servers map[string]string // host:port

const serverUsage = "`HOST[:PORT]=AUDIENCE`: the audience of a server's tokens, repeatable; there is nothing for others"

// parseServers reads them; hint says how one is written.
func parseServers(list []string, hint string) (servers, error) {
	out := servers{}
	for _, text := range list {
		host, audience, _ := strings.Cut(text, "=")
		key, ok := hostPort("https", host)
		if !ok || audience == "" {
			return nil, usagef(hint, "%q is no HOST[:PORT]=AUDIENCE", short(text))
		}
		if err := token.ValidateAudience(audience); err != nil {
			return nil, usagef("an audience is a name or a SPIFFE ID", "--server %q: %v", short(text), err)
		}
		if _, twice := out[key]; twice {
			return nil, usagef("give each server once", "--server names %s twice", clean(key))
		}
		out[key] = audience
	}
	if len(out) == 0 {
		return nil, usagef(hint, "no server is named: there is no token for anyone")
	}
	return out, nil
}

// audience returns that of the server at a scheme and host[:port]; "" for one that isn't
// named. Only https is safe to send a token over, and what doesn't leave this machine.
func (s servers) audience(scheme, host string) (string, error) {
	key, ok := hostPort(scheme, host)
	audience := s[key]
	if !ok || audience == "" {
		return "", nil
	}
	if name, _, _ := net.SplitHostPort(key); scheme != "https" && !loopback(name) {
		return "", failf(exitRefused, "use https", "a token for %s would go over the network in the clear, by %s", clean(key), clean(scheme))
	}
	return audience, nil
}

// hostPort gives one spelling to the addresses of one server.
func hostPort(scheme, host string) (string, bool) {
	port, ok := map[string]string{"https": "443", "http": "80"}[scheme]
	if !ok {
		return "", false
	}
	u, err := url.Parse(scheme + "://" + host)
	if err != nil || u.Host != host || u.Hostname() == "" {
		return "", false
	}
	if p := u.Port(); p != "" {
		port = p
	}
	return net.JoinHostPort(strings.ToLower(u.Hostname()), port), true
}

// loopback reports whether a name or an address is this machine's own.
func loopback(host string) bool {
	addr, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && addr.IsLoopback()
}
