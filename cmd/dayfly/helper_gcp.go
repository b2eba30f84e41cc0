package main

import (
	"context"
	"encoding/json"
	"strconv"
	"strings"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"
)

const (
	gcpPrefix = "GOOGLE_EXTERNAL_ACCOUNT_"
	gcpJWT    = "urn:ietf:params:oauth:token-type:jwt"
	gcpIDJWT  = "urn:ietf:params:oauth:token-type:id_token"
)

func (a *app) helperGCPCmd() *cobra.Command {
	var flags requestFlags
	cmd := &cobra.Command{
		Use:   "gcp",
		Short: "Be the executable source of Google's workload identity federation",
		Long: `Answer as the executable of an external account of Google Cloud. The audience of the
token is that of the account with "https:" in front, unless --audience names another.
With an output_file the answer is written there too, whole or not at all, for its
owner alone; Google's libraries then use it until it expires.

What fails is said in JSON on stdout too, by exit code 0, as Google wants it.`,
		Example: `  # credentials.json, named by GOOGLE_APPLICATION_CREDENTIALS; and GOOGLE_EXTERNAL_ACCOUNT_ALLOW_EXECUTABLES=1
  "credential_source": {"executable": {"command": "/usr/local/bin/dayfly helper gcp", "timeout_millis": 10000}}`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			answer, err := a.helperGCP(cmd.Context(), &flags)
			if err != nil {
				return json.NewEncoder(a.stdout).Encode(gcpFailure(err))
			}
			return json.NewEncoder(a.stdout).Encode(answer)
		},
	}
	flags.addAudience(cmd, "`whom` the token is for, if not the account's audience")
	flags.addHelper(cmd)
	return cmd
}

// gcpAnswer is what Google's libraries read.
type gcpAnswer struct {
	Version int    `json:"version"`
	Success bool   `json:"success"`
	Type    string `json:"token_type,omitempty"`
	Token   string `json:"id_token,omitempty"`
	Expires int64  `json:"expiration_time,omitempty"`
	Code    string `json:"code,omitempty"`
	Message string `json:"message,omitempty"`
}

func gcpFailure(err error) gcpAnswer {
	code := map[int]int{exitUsage: 400, exitRefused: 403, exitUnavailable: 503}[reportOf(err).ExitCode]
	if code == 0 {
		code = 500
	}
	return gcpAnswer{Version: 1, Code: strconv.Itoa(code), Message: sentence(err)}
}

func (a *app) helperGCP(ctx context.Context, flags *requestFlags) (*gcpAnswer, error) {
	kind := a.env(gcpPrefix + "TOKEN_TYPE")
	switch kind {
	case "":
		kind = gcpJWT
	case gcpJWT, gcpIDJWT:
	default:
		return nil, failf(exitFailure, "write \"subject_token_type\": \""+gcpJWT+"\"", "the account asks for a token of the type %q", clean(short(kind)))
	}
	if flags.audience == "" {
		audience := a.env(gcpPrefix + "AUDIENCE")
		if !strings.HasPrefix(audience, "//") {
			return nil, usagef("Google's libraries tell the account's audience; name one with --audience", "there is no audience: %sAUDIENCE is not //iam.googleapis.com/...", gcpPrefix)
		}
		flags.audience = "https:" + audience
	}
	cred, err := a.bearer(ctx, flags)
	if err != nil {
		return nil, err
	}
	answer := &gcpAnswer{Version: 1, Success: true, Type: kind, Token: cred.Token.Reveal(), Expires: cred.Expires.Unix()}
	if path := a.env(gcpPrefix + "OUTPUT_FILE"); path != "" {
		if err := writeAnswer(path, answer); err != nil {
			return nil, failf(exitFailure, "is output_file a path in a folder of yours?", "writing the output file: %w", err)
		}
	}
	return answer, nil
}

// writeAnswer puts a whole file in place, readable by its owner alone.
func writeAnswer(path string, answer *gcpAnswer) error {
	raw, err := json.Marshal(answer)
	if err != nil {
		return err
	}
	return renameio.WriteFile(path, append(raw, '\n'), 0o600, renameio.IgnoreUmask())
}
