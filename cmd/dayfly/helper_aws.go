package main

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/dayflyhq/dayfly/agent/sts"
	"github.com/spf13/cobra"
)

func (a *app) helperAWSCmd() *cobra.Command {
	var (
		flags requestFlags
		role  sts.Role
	)
	cmd := &cobra.Command{
		Use:   "aws",
		Short: "Be the credential_process of AWS's SDKs",
		Long: `Trade a token for a session at AWS's security token service (AssumeRoleWithWebIdentity),
and print it as AWS's SDKs want it of a credential_process. Nothing is kept: an SDK asks
again when the session ends, the command line of AWS each time. For a session that is
shared, configure aws_container of the agent instead.`,
		Example: `  # ~/.aws/config
  [profile orders]
  credential_process = dayfly helper aws --audience sts.amazonaws.com --role-arn arn:aws:iam::123456789012:role/orders-writer`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.helperAWS(cmd.Context(), &flags, role) },
	}
	flags.addAudience(cmd, "`whom` the token is for: a client ID of AWS's identity provider, often sts.amazonaws.com")
	flags.addHelper(cmd)
	f := cmd.Flags()
	f.StringVar(&role.ARN, "role-arn", "", "`ARN` of the role; AWS requires it, MinIO doesn't")
	f.StringVar(&role.Session, "session-name", sts.DefaultSession, "`name` of the session in AWS's records")
	f.StringVar(&role.Endpoint, "sts-endpoint", sts.DefaultEndpoint, "`URL` of the token service")
	f.DurationVar(&role.Duration, "duration", 0, "wanted life of the session, 15m to 12h; 0: what the service gives")
	return cmd
}

// awsAnswer is what AWS's SDKs read of a credential_process.
type awsAnswer struct {
	Version         int
	AccessKeyID     string `json:"AccessKeyId"`
	SecretAccessKey string
	SessionToken    string
	Expiration      string
}

func (a *app) helperAWS(ctx context.Context, flags *requestFlags, role sts.Role) error {
	if err := role.Validate(); err != nil {
		return usagef("see --help for examples", "%v", err)
	}
	cred, err := a.bearer(ctx, flags)
	if err != nil {
		return err
	}
	ctx, cancel := a.call(ctx)
	defer cancel()
	s, err := sts.Trade(ctx, role, cred.Token, a.now())
	if err != nil {
		return stsError(err)
	}
	return json.NewEncoder(a.stdout).Encode(awsAnswer{
		Version: 1, AccessKeyID: s.AccessKeyID, SecretAccessKey: s.SecretAccessKey.Reveal(), SessionToken: s.SessionToken.Reveal(),
		Expiration: s.Expires.Format(time.RFC3339),
	})
}

func stsError(err error) error {
	var refused *sts.Error
	switch {
	case !errors.As(err, &refused):
		return failf(exitUnavailable, "is --sts-endpoint right, and can it be reached from here?", "%w", err)
	case refused.Status >= 400 && refused.Status < 500:
		return failf(exitRefused, "do the role's trust policy and the identity provider name this audience and this SPIFFE ID?", "%w", err)
	case refused.Status >= 500:
		return failf(exitUnavailable, "", "%w", err)
	}
	return failf(exitFailure, "is --sts-endpoint a token service?", "%w", err)
}
