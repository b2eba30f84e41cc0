package main

import (
	"context"
	"encoding/json"
	"net/url"
	"time"

	"github.com/spf13/cobra"
)

const (
	execInfo      = "KUBERNETES_EXEC_INFO"
	execGroup     = "client.authentication.k8s.io/"
	execVersion   = execGroup + "v1"
	execCredKind  = "ExecCredential"
	askForVersion = "write apiVersion: " + execVersion + " under exec of the kubeconfig"
)

func (a *app) helperKubernetesCmd() *cobra.Command {
	var (
		flags requestFlags
		named []string
	)
	cmd := &cobra.Command{
		Use:   "kubernetes",
		Short: "Be the exec plugin of kubectl and client-go",
		Long: `Answer as an exec plugin of client-go (` + execVersion + `) with a
token for the API server. With --audience it is for that; with --server it depends on
the cluster that is asked for, which kubeconfig must tell (provideClusterInfo: true).
What fails is said on stderr, by an exit code other than 0.`,
		Example: `  # kubeconfig
  users:
  - name: payments
    user:
      exec:
        apiVersion: client.authentication.k8s.io/v1
        command: dayfly
        args: [helper, kubernetes, --audience, cluster]
        interactiveMode: Never`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.helperKubernetes(cmd.Context(), &flags, named) },
	}
	flags.addAudience(cmd, "`whom` the API server says that it is (--oidc-client-id)")
	flags.addHelper(cmd)
	cmd.Flags().StringArrayVar(&named, "server", nil, serverUsage)
	return cmd
}

func (a *app) helperKubernetes(ctx context.Context, flags *requestFlags, named []string) error {
	info, err := parseExecInfo(a.env(execInfo))
	if err != nil {
		return err
	}
	if len(named) > 0 {
		if flags.audience != "" {
			return usagef("give one of the two", "both --audience and --server are given")
		}
		if flags.audience, err = clusterAudience(info, named); err != nil {
			return err
		}
	}
	cred, err := a.bearer(ctx, flags)
	if err != nil {
		return err
	}
	return json.NewEncoder(a.stdout).Encode(execCredential{
		APIVersion: execVersion, Kind: execCredKind,
		Status: &execStatus{Token: cred.Token.Reveal(), Expires: cred.Expires.UTC().Format(time.RFC3339)},
	})
}

// execCredential is what client-go says and hears.
type execCredential struct {
	APIVersion string      `json:"apiVersion"`
	Kind       string      `json:"kind"`
	Spec       *execSpec   `json:"spec,omitempty"`
	Status     *execStatus `json:"status,omitempty"`
}

type execSpec struct {
	Cluster *struct {
		Server string `json:"server"`
	} `json:"cluster"`
}

type execStatus struct {
	Expires string `json:"expirationTimestamp"`
	Token   string `json:"token"`
}

// parseExecInfo reads what client-go asks; nothing, where a person tries it by hand.
func parseExecInfo(text string) (*execCredential, error) {
	info := new(execCredential)
	if text == "" {
		return info, nil
	}
	if err := json.Unmarshal([]byte(text), info); err != nil || info.Kind != execCredKind {
		return nil, failf(exitFailure, "client-go sets it; leave it unset to try by hand", "%s is no %s", execInfo, execCredKind)
	}
	if info.APIVersion != execVersion {
		return nil, failf(exitFailure, askForVersion, "the kubeconfig asks for %q, and this speaks %s only", clean(short80(info.APIVersion)), execVersion)
	}
	return info, nil
}

// clusterAudience is that of the API server that is asked for.
func clusterAudience(info *execCredential, named []string) (string, error) {
	known, err := parseServers(named, "write --server api.example.org:6443=AUDIENCE")
	if err != nil {
		return "", err
	}
	if info.Spec == nil || info.Spec.Cluster == nil {
		return "", failf(exitFailure, "write provideClusterInfo: true under exec of the kubeconfig", "--server needs to know which cluster is asked for")
	}
	u, err := url.Parse(info.Spec.Cluster.Server)
	if err != nil {
		return "", failf(exitFailure, "", "the cluster's server is no URL")
	}
	audience, err := known.audience(u.Scheme, u.Host)
	if err == nil && audience == "" {
		err = failf(exitRefused, "name it with --server if it is yours", "there is no token for the cluster at %s", clean(u.Host))
	}
	return audience, err
}
