package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/proto/wire"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/protobuf/types/known/timestamppb"
)

func (a *app) tokenCmd() *cobra.Command {
	return group("token", "Get, show and exchange tokens", "", `  dayfly token get --audience orders
  dayfly token get --audience orders | dayfly token inspect`,
		a.tokenGetCmd(), a.tokenInspectCmd(), a.tokenExchangeCmd())
}

// requestFlags are what a caller asks of a credential.
type requestFlags struct {
	audience string
	scopes   []string
	ttl      time.Duration
	binding  string
}

func (r *requestFlags) add(cmd *cobra.Command) {
	r.addAudience(cmd, "`whom` the token is for: a name or a SPIFFE ID (required)")
	r.addRest(cmd)
}

func (r *requestFlags) addAudience(cmd *cobra.Command, usage string) {
	cmd.Flags().StringVarP(&r.audience, "audience", "a", "", usage)
}

// addRest adds what may be asked of a token whatever its audience.
func (r *requestFlags) addRest(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringSliceVarP(&r.scopes, "scope", "s", nil, "`scopes` to ask for, repeatable or with commas; none: what policy gives by default")
	f.DurationVar(&r.ttl, "ttl", 0, "wanted life, at most "+token.MaxTTL.String()+"; 0: what policy gives")
	f.StringVar(&r.binding, "binding", "", "who may present it: spiffe, x5t or none; policy may be stricter")
	complete(cmd, "binding", string(token.BindingSPIFFE), string(token.BindingX5T), string(token.BindingNone))
}

// request checks what can be checked here, so that a slip costs no call.
func (r *requestFlags) request() (sdk.Request, error) {
	switch {
	case r.audience == "":
		return sdk.Request{}, usagef("name whom the token is for: --audience orders", "--audience is missing")
	case r.ttl < 0 || r.ttl > token.MaxTTL:
		return sdk.Request{}, usagef("between 1s and "+token.MaxTTL.String(), "--ttl %s is out of range", r.ttl)
	case r.binding != "" && !token.Binding(r.binding).Valid():
		return sdk.Request{}, usagef("one of spiffe, x5t, none", "unknown --binding %q", r.binding)
	}
	if err := token.ValidateAudience(r.audience); err != nil {
		return sdk.Request{}, usagef("an audience is a name or a SPIFFE ID", "--audience: %v", err)
	}
	scopes, err := token.NormalizeScopes(r.scopes)
	if err != nil {
		return sdk.Request{}, usagef("separate scopes by commas, or repeat --scope", "--scope: %v", err)
	}
	return sdk.Request{Audience: r.audience, Scopes: scopes, TTL: r.ttl, Binding: token.Binding(r.binding)}, nil
}

func (a *app) tokenGetCmd() *cobra.Command {
	var flags requestFlags
	cmd := &cobra.Command{
		Use:   "get",
		Short: "Get a token and print it",
		Long: `Get a token for one audience and print it on stdout, alone on its line; whatever
else there is to say goes to stderr. It is good for minutes: fetch it where it is
used, and store it nowhere.`,
		Example: `  dayfly token get --audience orders
  curl -H "Authorization: Bearer $(dayfly token get -a orders -s orders.read)" https://orders.example.org/
  dayfly token get --audience orders --ttl 1m --output json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.tokenGet(cmd.Context(), &flags) },
	}
	flags.add(cmd)
	return cmd
}

func (a *app) tokenGet(ctx context.Context, flags *requestFlags) error {
	cred, err := a.issue(ctx, flags)
	if err != nil {
		return err
	}
	return a.printCredential(cred)
}

// issue gets a credential as the flags say.
func (a *app) issue(ctx context.Context, flags *requestFlags) (*sdk.Credential, error) {
	req, err := flags.request()
	if err != nil {
		return nil, err
	}
	client, err := a.dialTokens(ctx)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	ctx, cancel := a.call(ctx)
	defer cancel()
	return client.Issue(ctx, req)
}

// printCredential is where a token leaves for stdout, as was asked for.
func (a *app) printCredential(c *sdk.Credential) error {
	if isTerminal(a.stderr) {
		a.notef("grant %s for %s, expires in %s", clean(c.Grant), clean(c.Audience), span(c.Expires.Sub(a.now())))
	}
	return a.print(&dayflyv1.Credential{
		Token: c.Token.Reveal(), Grant: c.Grant, Audience: c.Audience, Scopes: c.Scopes, Binding: wire.Binding(c.Binding),
		IssuedAt: timestamppb.New(c.IssuedAt), ExpiresAt: timestamppb.New(c.Expires),
	}, func(w io.Writer) { fmt.Fprintln(w, c.Token.Reveal()) })
}

func (a *app) tokenExchangeCmd() *cobra.Command {
	var (
		flags requestFlags
		from  string
	)
	cmd := &cobra.Command{
		Use:   "exchange",
		Short: "Exchange a token that was presented to you for a derived one",
		Long: `Exchange a token that is addressed to you for a token for somebody else (RFC 8693,
delegation): it says that you act for the first one's subject, has at most its
scopes, and ends when it ends. The first token comes from a file or from stdin.`,
		Example: `  dayfly token exchange --audience ledger < received.jwt
  dayfly token exchange --token-file received.jwt --audience ledger --scope ledger:post`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.tokenExchange(cmd.Context(), &flags, from) },
	}
	flags.add(cmd)
	addTokenFile(cmd.Flags(), &from, "-")
	return cmd
}

func addTokenFile(f *pflag.FlagSet, into *string, standard string) {
	f.StringVar(into, "token-file", standard, "`file` that holds the token, \"-\" for stdin")
}

func (a *app) tokenExchange(ctx context.Context, flags *requestFlags, from string) error {
	req, err := flags.request()
	if err != nil {
		return err
	}
	subject, _, err := a.readToken(from)
	if err != nil {
		return err
	}
	client, err := a.dialTokens(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := a.call(ctx)
	defer cancel()
	cred, err := client.Exchange(ctx, subject, req)
	if err != nil {
		return err
	}
	return a.printCredential(cred)
}

func (a *app) tokenInspectCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "inspect [FILE]",
		Short: "Show what a token claims",
		Long: `Show what a token claims, from a file or from stdin. Nothing is asked of anyone,
and the signature isn't checked: what is shown is what the token says, not what is
true. A token is never taken as an argument: arguments are visible to everyone on
the machine, in ps, and stay in the shell's history.`,
		Example: `  dayfly token inspect leaked.jwt
  dayfly token get --audience orders | dayfly token inspect
  dayfly token inspect --output json < leaked.jwt`,
		Args: func(_ *cobra.Command, args []string) error {
			switch {
			case len(args) > 0 && strings.HasPrefix(args[0], "eyJ"):
				return usagef("pipe it: dayfly token inspect < FILE; and count this one as seen by others", "a token as an argument is visible to everyone, in ps and in the shell's history")
			case len(args) > 1:
				return usagef("give one at a time", "one file is wanted, not %d", len(args))
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error {
			from := "-"
			if len(args) == 1 {
				from = args[0]
			}
			_, t, err := a.readToken(from)
			if err != nil {
				return err
			}
			return a.showToken(t)
		},
	}
}

// inspection is what token inspect prints as JSON.
type inspection struct {
	SignatureChecked bool       `json:"signatureChecked"` // always false
	Expired          bool       `json:"expired"`
	Grant            string     `json:"grant"`
	Issuer           string     `json:"issuer"`
	Subject          string     `json:"subject"`
	Presenter        string     `json:"presenter"`
	Audience         string     `json:"audience"`
	Scopes           []string   `json:"scopes"`
	Binding          string     `json:"binding"`
	Certificate      string     `json:"certificate,omitempty"` // hex SHA-256, with binding x5t
	IssuedAt         time.Time  `json:"issuedAt"`
	NotBefore        time.Time  `json:"notBefore"`
	ExpiresAt        time.Time  `json:"expiresAt"`
	Transaction      string     `json:"transaction"`
	Era              string     `json:"era"`
	Revision         uint64     `json:"revision,string"` // the number in the log that it was issued at
	Sum              string     `json:"sum"`             // hex
	Algorithm        string     `json:"algorithm"`
	Fingerprint      string     `json:"fingerprint"` // hex
	Lineage          []ancestor `json:"lineage"`
}

type ancestor struct {
	Identity string `json:"identity"`
	Grant    string `json:"grant"`
	KeyID    string `json:"keyId"`
	SVID     string `json:"svid"`
}

func inspectionOf(t *token.Token, now time.Time) inspection {
	out := inspection{
		Expired: !now.Before(t.Expires),
		Grant:   t.Grant().String(), Issuer: t.Issuer, Subject: t.Root().String(), Presenter: t.Presenter().String(),
		Audience: t.Audience, Scopes: append([]string{}, t.Scopes...), Binding: string(t.Binding),
		IssuedAt: t.IssuedAt.UTC(), NotBefore: t.NotBefore.UTC(), ExpiresAt: t.Expires.UTC(), Transaction: t.Transaction,
		Era: t.Position.Era.String(), Revision: t.Position.Rev, Sum: hex.EncodeToString(t.Position.Sum[:]),
		Algorithm: string(t.Algorithm), Fingerprint: hex.EncodeToString(t.Fingerprint[:]),
	}
	if t.Binding == token.BindingX5T {
		out.Certificate = hex.EncodeToString(t.Certificate[:])
	}
	for _, m := range t.Lineage {
		a := ancestor{Identity: m.Identity.String(), Grant: m.Grant.String(), KeyID: m.Key.String()}
		if !m.SVID.IsZero() {
			a.SVID = m.SVID.String()
		}
		out.Lineage = append(out.Lineage, a)
	}
	return out
}

func (a *app) showToken(t *token.Token) error {
	in := inspectionOf(t, a.now())
	life := "in " + span(t.Expires.Sub(a.now()))
	if in.Expired {
		life = a.paint(a.stdout, red, "EXPIRED") + " " + span(a.now().Sub(t.Expires)) + " ago"
	}
	return a.printValue(in, func(w io.Writer) {
		fmt.Fprintln(w, "What this token claims. Its signature was NOT checked.")
		row(w, "grant", in.Grant)
		row(w, "subject", in.Subject)
		row(w, "presenter", in.Presenter)
		row(w, "audience", in.Audience)
		row(w, "scopes", orDash(strings.Join(in.Scopes, " ")))
		row(w, "binding", bindingText(t))
		row(w, "issued", in.IssuedAt.Format(time.RFC3339))
		fmt.Fprintf(w, "expires\t%s (%s)\n", in.ExpiresAt.Format(time.RFC3339), life)
		row(w, "issuer", in.Issuer)
		row(w, "position", "era "+in.Era+", number "+strconv.FormatUint(in.Revision, 10))
		row(w, "transaction", in.Transaction)
		row(w, "fingerprint", in.Fingerprint)
		fmt.Fprintln(w)
		row(w, "LINEAGE", "IDENTITY", "GRANT", "KEY", "SVID")
		for i, m := range in.Lineage {
			row(w, strconv.Itoa(i+1), m.Identity, m.Grant, m.KeyID, orDash(m.SVID))
		}
	})
}

func bindingText(t *token.Token) string {
	switch t.Binding {
	case token.BindingSPIFFE:
		return "spiffe: only its presenter's SVIDs may present it"
	case token.BindingX5T:
		return "x5t: only the certificate with SHA-256 " + hex.EncodeToString(t.Certificate[:])
	case token.BindingNone:
		return "none: whoever holds it may present it"
	}
	return string(t.Binding)
}

// maxTokenFile leaves room for white space and a "Bearer " around a token.
const maxTokenFile = 64 << 10

// readToken reads one token from a file, or from stdin for "-".
func (a *app) readToken(from string) (token.Secret, *token.Token, error) {
	raw, err := a.readInput("token", from, maxTokenFile)
	if err != nil {
		return token.Secret{}, nil, err
	}
	text := strings.TrimSpace(string(raw))
	for _, prefix := range []string{"Authorization:", "Bearer "} {
		if len(text) > len(prefix) && strings.EqualFold(text[:len(prefix)], prefix) {
			text = strings.TrimSpace(text[len(prefix):])
		}
	}
	if text == "" {
		return token.Secret{}, nil, failf(exitFailure, "put the token in a file, or pipe it", "there is no token in %s", inputName(from))
	}
	t, err := token.Inspect(text)
	if err != nil {
		return token.Secret{}, nil, failf(exitFailure, "give it as it was found, one token and nothing else", "reading %s: %w", inputName(from), err)
	}
	return token.NewSecret(text), t, nil
}
