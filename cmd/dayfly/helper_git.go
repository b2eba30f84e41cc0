package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

// defaultUsername goes with a token where a name is wanted: servers that take a token as
// the password look at nothing else.
const defaultUsername = "dayfly"

func (a *app) helperGitCmd() *cobra.Command {
	var (
		flags    requestFlags
		named    []string
		username string
	)
	cmd := &cobra.Command{
		Use:   "git get|store|erase",
		Short: "Be a credential helper of git",
		Long: `Answer as a credential helper of git: "get" gives a user name, and a fresh token as
the password, to the servers that --server names and to no others, over https, or over
http on loopback. There is nothing to store or to erase. A link to dayfly by the name
of git-credential-dayfly makes it "credential.helper dayfly".

If there is no token for a server that is named, git is told to quit: it asks nobody
for a password instead. For other servers git asks its next helper.`,
		Example: `  git config --global credential.https://git.example.org.helper ''   # no other helper keeps the token
  git config --global --add credential.https://git.example.org.helper '!dayfly helper git --server git.example.org=git'`,
		Args: oneArg("get, store or erase"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if args[0] != "get" {
				return nil // git wants what is not known ignored, too
			}
			err := a.helperGit(cmd.Context(), &flags, named, username)
			if err != nil {
				fmt.Fprint(a.stdout, "quit=1\n\n")
			}
			return err
		},
	}
	flags.addHelper(cmd)
	cmd.Flags().StringArrayVar(&named, "server", nil, serverUsage)
	cmd.Flags().StringVar(&username, "username", defaultUsername, "`name` to give with the token, where the URL has none")
	return cmd
}

func (a *app) helperGit(ctx context.Context, flags *requestFlags, named []string, username string) error {
	known, err := parseServers(named, "write --server git.example.org=AUDIENCE")
	if err != nil {
		return err
	}
	if username == "" || clean(username) != username {
		return usagef("a name such as "+defaultUsername, "--username is no name")
	}
	raw, err := a.readInput("request of git", "-", maxHelperInput)
	if err != nil {
		return err
	}
	asked, err := parseGit(raw)
	if err != nil {
		return err
	}
	if flags.audience, err = known.audience(asked["protocol"], asked["host"]); err != nil || flags.audience == "" {
		return err
	}
	cred, err := a.bearer(ctx, flags)
	if err != nil {
		return err
	}
	if asked["username"] != "" {
		username = asked["username"]
	}
	_, err = fmt.Fprintf(a.stdout, "username=%s\npassword=%s\npassword_expiry_utc=%d\n\n", username, cred.Token.Reveal(), cred.Expires.Unix())
	return err
}

// parseGit reads lines of key=value up to an empty one. As in git the last of equal keys
// counts.
func parseGit(raw []byte) (map[string]string, error) {
	asked := map[string]string{}
	for line := range strings.SplitSeq(string(raw), "\n") {
		if line == "" {
			break
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok || key == "" || strings.ContainsAny(line, "\x00\r") {
			return nil, failf(exitFailure, "git writes it; to try by hand: printf 'protocol=https\\nhost=git.example.org\\n\\n'", "stdin has a line that is no key=value of git's")
		}
		asked[key] = value
	}
	return asked, nil
}
