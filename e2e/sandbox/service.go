package sandbox

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"github.com/dayflyhq/dayfly/sdk/verify"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
)

// Staleness is the bound of the sandbox's verifiers.
const Staleness = 2 * time.Second

// A Service is a resource server: HTTPS with mTLS, its tokens verified by the SDK.
type Service struct {
	ID       spiffeid.ID
	Audience string
	URL      string
	Verifier *verify.Verifier

	stop func()
}

// ServiceConfig describes a service.
type ServiceConfig struct {
	ID       spiffeid.ID
	Audience string
	// Feed is the client whose connection the verifier follows.
	Feed *sdk.Client
	// Broker is set where Feed reaches a relay on another host: whose signature counts.
	Broker spiffeid.ID
	// Plain serves plain HTTP on loopback, for curl; bearer tokens only.
	Plain bool
	// Addr to listen on; empty: a port of its own on loopback.
	Addr string
}

// StartService starts a service and waits until its verifier is fresh.
func (s *Sandbox) StartService(ctx context.Context, cfg ServiceConfig) (*Service, error) {
	src, err := s.Source(ctx, cfg.ID)
	if err != nil {
		return nil, err
	}
	v, err := verify.New(verify.Config{
		Conn: cfg.Feed.Conn(), Audiences: []string{cfg.Audience}, Bundles: src,
		BrokerID: cfg.Broker, MaxStaleness: Staleness,
		Leeway: -1, // one clock on one machine: an expired token is refused at once
	})
	if err != nil {
		return nil, err
	}
	if cfg.Addr == "" {
		cfg.Addr = "127.0.0.1:0"
	}
	l, err := net.Listen("tcp", cfg.Addr)
	if err != nil {
		return nil, err
	}
	svc := &Service{ID: cfg.ID, Audience: cfg.Audience, Verifier: v, URL: "http://" + l.Addr().String()}
	if !cfg.Plain {
		l = tls.NewListener(l, tlsconfig.MTLSServerConfig(src, src, tlsconfig.AuthorizeMemberOf(TrustDomain)))
		svc.URL = "https://" + l.Addr().String()
	}
	srv := &http.Server{Handler: v.HTTP(http.HandlerFunc(svc.whoami)), ReadHeaderTimeout: 10 * time.Second}
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan struct{}, 2)
	go func() { v.Run(run); done <- struct{}{} }()
	go func() { srv.Serve(l); done <- struct{}{} }()
	svc.stop = func() {
		cancel()
		srv.Close()
		<-done
		<-done
	}
	s.closers = append(s.closers, svc.stop)
	return svc, v.WaitReady(ctx)
}

// whoami answers with what the accepted token says.
func (svc *Service) whoami(w http.ResponseWriter, r *http.Request) {
	t, _ := verify.FromContext(r.Context())
	w.Header().Set("Content-Type", "application/json")
	answer := Answer{Service: svc.Audience, Subject: t.Root().String(), Scopes: t.Scopes, Grant: t.Grant().String()}
	for _, m := range t.Lineage[1:] {
		answer.Actors = append(answer.Actors, m.Identity.String())
	}
	json.NewEncoder(w).Encode(answer)
}

// An Answer is what a service says of an accepted token.
type Answer struct {
	Service string   `json:"service"`
	Subject string   `json:"sub"`
	Actors  []string `json:"act,omitempty"` // innermost first
	Scopes  []string `json:"scopes"`
	Grant   string   `json:"grant"`
}

// A Refused is a service's no.
type Refused struct {
	Status int
	Reason string `json:"reason"`
	Detail string `json:"message"`
}

func (r *Refused) Error() string { return fmt.Sprintf("%d %s", r.Status, r.Reason) }

// Call presents a token to a service, over mTLS as an identity, or over plain HTTP to a
// plain service.
func (s *Sandbox) Call(ctx context.Context, as spiffeid.ID, svc *Service, t token.Secret) (*Answer, error) {
	src, err := s.Source(ctx, as)
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{TLSClientConfig: tlsconfig.MTLSClientConfig(src, src, tlsconfig.AuthorizeID(svc.ID))}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, svc.URL, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+t.Reveal())
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<16))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		refused := &Refused{Status: resp.StatusCode}
		if err := json.NewDecoder(bytes.NewReader(body)).Decode(refused); err != nil {
			return nil, fmt.Errorf("status %d without a reason", resp.StatusCode)
		}
		return nil, refused
	}
	a := &Answer{}
	return a, json.Unmarshal(body, a)
}
