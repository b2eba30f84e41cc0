package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

// dockerServers names the servers where there is no room for flags: Docker runs its
// helpers without any.
const dockerServers = "DAYFLY_DOCKER_SERVERS"

// dockerNotFound is how docker tells "go on without" from an error.
const dockerNotFound = "credentials not found in native keychain"

func (a *app) helperDockerCmd() *cobra.Command {
	var (
		flags    requestFlags
		named    []string
		username string
	)
	cmd := &cobra.Command{
		Use:   "docker get|list|store|erase",
		Short: "Be a credential helper of docker",
		Long: `Answer as a credential helper of docker: "get" gives a user name, and a fresh token as
the secret, for the registries that --server or ` + dockerServers + ` names (with commas),
over https, or over http on loopback. "list" lists them. There is nothing to store or to
erase. What fails is said on stdout, where docker looks.

Docker runs docker-credential-NAME without flags: make that a link to dayfly by the
name of docker-credential-dayfly, or a script.`,
		Example: `  ln -s "$(command -v dayfly)" ~/bin/docker-credential-dayfly
  export ` + dockerServers + `=registry.example.org=registry
  # ~/.docker/config.json: {"credHelpers": {"registry.example.org": "dayfly"}}`,
		Args: oneArg("get, list, store or erase"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(named) == 0 && a.env(dockerServers) != "" {
				named = strings.Split(a.env(dockerServers), ",")
			}
			err := a.helperDocker(cmd.Context(), args[0], &flags, named, username)
			if err != nil {
				fmt.Fprintln(a.stdout, sentence(err))
			}
			return err
		},
	}
	flags.addHelper(cmd)
	cmd.Flags().StringArrayVar(&named, "server", nil, serverUsage)
	cmd.Flags().StringVar(&username, "username", defaultUsername, "`name` to give with the token")
	return cmd
}

func (a *app) helperDocker(ctx context.Context, verb string, flags *requestFlags, named []string, username string) error {
	known, err := parseServers(named, "write registry.example.org=AUDIENCE in "+dockerServers+", or after --server")
	if err != nil {
		return err
	}
	switch verb {
	case "get":
		return a.dockerGet(ctx, flags, known, username)
	case "list":
		return a.dockerList(known, username)
	case "store":
		return a.dockerStore(known)
	case "erase":
		return nil
	}
	return usagef("one of get, list, store, erase", "docker asks for %q, which isn't known", short(verb))
}

// dockerCredential is docker's own form.
type dockerCredential struct {
	ServerURL, Username, Secret string
}

func (a *app) dockerGet(ctx context.Context, flags *requestFlags, known servers, username string) error {
	raw, err := a.readInput("server's URL", "-", maxHelperInput)
	if err != nil {
		return err
	}
	url := strings.TrimSpace(string(raw))
	if flags.audience, err = known.audience(dockerHost(url)); err != nil {
		return err
	}
	if flags.audience == "" {
		return failf(exitFailure, "", dockerNotFound)
	}
	cred, err := a.bearer(ctx, flags)
	if err != nil {
		return err
	}
	return json.NewEncoder(a.stdout).Encode(dockerCredential{url, username, cred.Token.Reveal()})
}

// dockerHost takes apart what docker calls a server's URL: often only a host.
func dockerHost(url string) (scheme, host string) {
	scheme, host, ok := strings.Cut(url, "://")
	if !ok {
		scheme, host = "https", url
	}
	host, _, _ = strings.Cut(host, "/")
	return strings.ToLower(scheme), host
}

func (a *app) dockerList(known servers, username string) error {
	list := map[string]string{}
	for server := range known {
		list[strings.TrimSuffix(server, ":443")] = username
	}
	return json.NewEncoder(a.stdout).Encode(list)
}

// dockerStore lets "docker login" to our own servers succeed, and tells whoever would
// lose a password here.
func (a *app) dockerStore(known servers) error {
	raw, err := a.readInput("credential", "-", maxHelperInput)
	if err != nil {
		return err
	}
	var given dockerCredential
	if err := json.Unmarshal(raw, &given); err != nil {
		return failf(exitFailure, "", "stdin is no credential of docker's") // nothing of it is quoted
	}
	if audience, err := known.audience(dockerHost(given.ServerURL)); err != nil || audience == "" {
		return failf(exitFailure, "use credHelpers for single registries instead of credsStore", "dayfly keeps no passwords")
	}
	return nil
}
