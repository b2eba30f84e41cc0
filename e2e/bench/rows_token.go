package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"github.com/dayflyhq/dayfly/e2e/sandbox"
	dayflyv1 "github.com/dayflyhq/dayfly/proto/dayfly/v1"
	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/spiffetest"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// tokens is the fixture of the rows that a broker and its tokens are enough for.
const tokens = "tokens"

// issueRows: what a workload waits for, and how many can.
func issueRows(s size) []row {
	var rows []row
	for _, callers := range s.callers {
		r := row{row: "issue", name: fmt.Sprintf("%d callers", callers), fixture: tokens, unit: perSecond}
		by := byRate
		switch callers {
		case 1:
			by, r.name, r.unit, r.target = byP50, "1 caller", inSeconds, atMost(1.3)
		case exchangeCallers: // what an exchange is compared with in the plot
			r.target, r.series, r.x = atLeast(0.65), "exchange", 1
		}
		r.setup = func(ctx context.Context, l *lab) (pair, error) { return l.issuing(ctx, by, callers) }
		rows = append(rows, r)
		if callers == 1 || callers == exchangeCallers { // how much of it is bbolt's second sync
			r.name, r.target, r.series = r.name+", the floor records in bbolt", nil, ""
			r.setup = func(ctx context.Context, l *lab) (pair, error) { return l.issuing(ctx, by, callers, inBbolt) }
			rows = append(rows, r)
		}
	}
	return rows
}

// inBbolt is of a floor whose records are put into a bbolt file.
const inBbolt = "--bbolt"

// issuing is both sides, with flags of the floor.
func (l *lab) issuing(ctx context.Context, by judged, callers int, flags ...string) (pair, error) {
	b, err := l.started(ctx, tokens)
	if err != nil {
		return pair{}, err
	}
	first, err := b.issued(ctx)
	if err != nil {
		return pair{}, err
	}
	f, err := b.floor(ctx, len(first), flags...)
	if err != nil {
		return pair{}, err
	}
	ours, err := b.conns(callers, hop(0), b.Info.GRPC, sandbox.Broker)
	if err != nil {
		return pair{}, err
	}
	bare, err := b.conns(callers, hop(0), f.GRPC, floorID)
	return pair{
		ours:  calls(by, callers, l.size.window, 0, issue(ours)),
		floor: calls(by, callers, l.size.window, 0, issue(bare)),
	}, err
}

// issue asks for a token as the SDK does.
func issue(conns []*grpc.ClientConn) func(context.Context, int) error {
	return func(ctx context.Context, caller int) error {
		_, err := dayflyv1.NewTokenServiceClient(of(conns, caller)).Issue(ctx, &dayflyv1.IssueRequest{Audience: audience(1), IdempotencyKey: rand.Text()})
		return err
	}
}

// issued is one root token.
func (b *box) issued(ctx context.Context) (string, error) {
	c, err := b.client(hop(0))
	if err != nil {
		return "", err
	}
	return obtain(ctx, c, "", 1)
}

// obtain gets a token of a depth: a root, or one made out of one of the depth above.
func obtain(ctx context.Context, c *sdk.Client, from string, depth int) (string, error) {
	var cred *sdk.Credential
	_, err := insist(ctx, func() (err error) {
		if depth == 1 {
			cred, err = c.Issue(ctx, sdk.Request{Audience: audience(1)})
		} else {
			cred, err = c.Exchange(ctx, token.NewSecret(from), sdk.Request{Audience: audience(depth)})
		}
		return err
	})
	if err != nil {
		return "", err
	}
	return cred.Token.Reveal(), nil
}

// chain is a token of a depth: a root has 1.
func (b *box) chain(ctx context.Context, depth int) (string, error) {
	return shared(b.lab, fmt.Sprintf("chain %d of %s", depth, b.Dir), func() (string, error) {
		if depth == 1 {
			return b.issued(ctx)
		}
		above, err := b.chain(ctx, depth-1)
		if err != nil {
			return "", err
		}
		c, err := b.client(hop(depth - 1))
		if err != nil {
			return "", err
		}
		return obtain(ctx, c, above, depth)
	})
}

// exchangeCallers are at it at once.
const exchangeCallers = 64

// exchangeRows: tokens out of tokens, and out of JWT-SVIDs. A depth is that of what is
// presented; the deepest has one member less than what comes out of it.
func exchangeRows(s size) []row {
	var rows []row
	for _, depth := range s.depths {
		made := min(depth+1, token.MaxDepth)
		if depth == token.MaxDepth-1 {
			continue // the same exchange as the deepest
		}
		r := row{row: "exchange", name: fmt.Sprintf("depth %d", depth), fixture: tokens, unit: perSecond, series: "exchange", x: float64(made)}
		if depth == 1 || depth == token.MaxDepth {
			r.target = atLeast(0.65)
		}
		r.setup = exchanging(made, func(ctx context.Context, b *box) (func() string, error) {
			one, err := b.chain(ctx, made-1)
			return func() string { return one }, err
		})
		rows = append(rows, r)
	}
	if s.presented > 0 {
		rows = append(rows, row{
			row: "exchange", name: "depth 1, each token for the first time", fixture: tokens, unit: perSecond, target: atLeast(0.65),
			setup: exchanging(2, func(ctx context.Context, b *box) (func() string, error) { return b.fresh(ctx, s.presented) }),
		})
	}
	if s.jwtLogins {
		rows = append(rows, row{row: "exchange", name: "JWT-SVID login", fixture: tokens, unit: perSecond, target: atLeast(0.65), setup: jwtLogin})
	}
	return rows
}

// exchanging makes tokens of a depth out of those presented.
func exchanging(made int, presenting func(context.Context, *box) (func() string, error)) func(context.Context, *lab) (pair, error) {
	return func(ctx context.Context, l *lab) (pair, error) {
		b, err := l.started(ctx, tokens)
		if err != nil {
			return pair{}, err
		}
		presented, err := presenting(ctx, b)
		if err != nil {
			return pair{}, err
		}
		result, err := b.chain(ctx, made)
		if err != nil {
			return pair{}, err
		}
		ours, err := b.conns(exchangeCallers, hop(made-1), b.Info.GRPC, sandbox.Broker)
		if err != nil {
			return pair{}, err
		}
		floor, err := b.exchangeFloor(ctx, len(result))
		return pair{
			ours:  calls(byRate, exchangeCallers, l.size.window, 0, exchange(ours, presented, audience(made))),
			floor: floor,
		}, err
	}
}

// exchangeFloor verifies a token of a length, signs another one, and records.
func (b *box) exchangeFloor(ctx context.Context, length int) (side, error) {
	f, err := b.floor(ctx, length)
	if err != nil {
		return nil, err
	}
	bare, err := b.conns(exchangeCallers, gateway, f.GRPC, floorID)
	if err != nil {
		return nil, err
	}
	first, err := dayflyv1.NewTokenServiceClient(bare[0]).Issue(ctx, &dayflyv1.IssueRequest{})
	if err != nil {
		return nil, err
	}
	return calls(byRate, exchangeCallers, b.lab.size.window, 0, exchange(bare, first.GetCredential().GetToken, "")), nil
}

func exchange(conns []*grpc.ClientConn, presented func() string, audience string) func(context.Context, int) error {
	return func(ctx context.Context, caller int) error {
		_, err := dayflyv1.NewTokenServiceClient(of(conns, caller)).Exchange(ctx, &dayflyv1.ExchangeRequest{SubjectToken: presented(), Audience: audience, IdempotencyKey: rand.Text()})
		return err
	}
}

// fresh makes root tokens, and returns what gives one after the other: whoever remembers
// tokens has not seen them, or has forgotten them when they come again.
func (b *box) fresh(ctx context.Context, n int) (next func() string, err error) {
	conns, err := b.conns(exchangeCallers, hop(0), b.Info.GRPC, sandbox.Broker)
	if err != nil {
		return nil, err
	}
	all := make([]string, n)
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(exchangeCallers)
	for i := range all {
		group.Go(func() error {
			_, err := insist(ctx, func() error {
				resp, err := dayflyv1.NewTokenServiceClient(of(conns, i%exchangeCallers)).Issue(ctx, &dayflyv1.IssueRequest{Audience: audience(1)})
				all[i] = resp.GetCredential().GetToken()
				return err
			})
			return err
		})
	}
	var given atomic.Int64
	return func() string { return all[int(given.Add(1))%n] }, group.Wait()
}

// A JWT-SVID logs in some 50 times a second and no more, and its connection carries eight
// calls at once: so many identities, and more connections.
const (
	jwtIdentities = 400
	jwtConns      = exchangeCallers / 8
)

func jwtLogin(ctx context.Context, l *lab) (pair, error) {
	b, err := l.started(ctx, tokens)
	if err != nil {
		return pair{}, err
	}
	svids := make([]string, jwtIdentities)
	for i := range svids {
		if svids[i], err = b.TD.IssueJWTSVID(benchID(fmt.Sprintf("jwt/%d", i)), []string{b.Issuer}, spiffetest.SVIDOptions{}); err != nil {
			return pair{}, err
		}
	}
	src := b.TD.Source(gateway)
	conns, err := l.dial(jwtConns, b.Info.GRPCJWT, credentials.NewTLS(tlsconfig.TLSClientConfig(src, tlsconfig.AuthorizeID(sandbox.Broker))))
	if err != nil {
		return pair{}, err
	}
	var next atomic.Int64
	login := issue(conns)
	made, err := b.chain(ctx, 1)
	if err != nil {
		return pair{}, err
	}
	floor, err := b.exchangeFloor(ctx, len(made))
	return pair{
		ours: calls(byRate, exchangeCallers, l.size.window, 0, func(ctx context.Context, caller int) error {
			svid := svids[next.Add(1)%jwtIdentities]
			return login(metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+svid), caller)
		}),
		floor: floor,
	}, err
}

// introspectRows: a gateway that knows only RFC 7662.
func introspectRows(s size) []row {
	if !s.introspect {
		return nil
	}
	return []row{{row: "introspection", name: "64 callers", fixture: tokens, unit: perSecond, target: atLeast(0.65), setup: func(ctx context.Context, l *lab) (pair, error) {
		b, err := l.started(ctx, tokens)
		if err != nil {
			return pair{}, err
		}
		presented, err := b.chain(ctx, 1)
		if err != nil {
			return pair{}, err
		}
		src := b.TD.Source(gateway)
		transport := &http.Transport{
			TLSClientConfig:     tlsconfig.MTLSClientConfig(src, src, tlsconfig.AuthorizeID(sandbox.Broker)),
			MaxIdleConnsPerHost: exchangeCallers,
		}
		l.onEnd(transport.CloseIdleConnections)
		client := &http.Client{Transport: transport}
		form := url.Values{"token": {presented}}.Encode()
		f, err := b.floor(ctx, len(presented))
		if err != nil {
			return pair{}, err
		}
		bare, err := b.conns(exchangeCallers, gateway, f.GRPC, floorID)
		if err != nil {
			return pair{}, err
		}
		first, err := dayflyv1.NewTokenServiceClient(bare[0]).Issue(ctx, &dayflyv1.IssueRequest{})
		if err != nil {
			return pair{}, err
		}
		checked := wrapperspb.String(first.GetCredential().GetToken())
		return pair{
			ours: calls(byRate, exchangeCallers, l.size.window, 0, func(ctx context.Context, _ int) error {
				return introspect(ctx, client, "https://"+b.Info.HTTPSSVID+"/introspect", form)
			}),
			floor: calls(byRate, exchangeCallers, l.size.window, 0, func(ctx context.Context, caller int) error {
				return of(bare, caller).Invoke(ctx, checkMethod, checked, &wrapperspb.BytesValue{})
			}),
		}, nil
	}}}
}

func introspect(ctx context.Context, client *http.Client, at, form string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, at, strings.NewReader(form))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode == http.StatusServiceUnavailable {
		return status.Error(codes.Unavailable, resp.Status)
	}
	var answer struct{ Active bool }
	if err := json.Unmarshal(body, &answer); err != nil || !answer.Active {
		return fmt.Errorf("introspection answered %s: %.200s", resp.Status, body)
	}
	return nil
}

// agentRows: what a workload beside an agent gets, from the agent's memory.
func agentRows(s size) []row {
	var rows []row
	for _, callers := range s.agent {
		r := row{row: "agent", name: fmt.Sprintf("cached token, %d callers", callers), fixture: tokens, unit: perSecond, target: atLeast(1 / 1.2)}
		by := byRate
		if callers == 1 {
			by, r.name, r.unit, r.target = byP50, "cached token, 1 caller", inSeconds, atMost(1.2)
		}
		r.setup = func(ctx context.Context, l *lab) (pair, error) {
			b, err := l.started(ctx, tokens)
			if err != nil {
				return pair{}, err
			}
			socket, err := shared(l, "agent", func() (string, error) { return b.StartAgent(ctx, hop(0)) })
			if err != nil {
				return pair{}, err
			}
			ours, err := l.dialUnix(callers, strings.TrimPrefix(socket, "unix://"))
			if err != nil {
				return pair{}, err
			}
			req := &dayflyv1.IssueRequest{Audience: audience(1)}
			cached, err := dayflyv1.NewTokenServiceClient(ours[0]).Issue(ctx, req)
			if err != nil {
				return pair{}, err
			}
			f, err := b.floor(ctx, len(cached.GetCredential().GetToken()))
			if err != nil {
				return pair{}, err
			}
			bare, err := l.dialUnix(callers, f.Unix)
			if err != nil {
				return pair{}, err
			}
			bytes := wrapperspb.UInt32(uint32(proto.Size(cached)))
			return pair{
				ours: calls(by, callers, l.size.window, 0, func(ctx context.Context, caller int) error {
					_, err := dayflyv1.NewTokenServiceClient(of(ours, caller)).Issue(ctx, req)
					return err
				}),
				floor: calls(by, callers, l.size.window, 0, func(ctx context.Context, caller int) error {
					return of(bare, caller).Invoke(ctx, nullMethod, bytes, &wrapperspb.BytesValue{})
				}),
			}, nil
		}
		rows = append(rows, r)
	}
	return rows
}

// settle lets a process come to rest before its memory is read.
func settle(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}
