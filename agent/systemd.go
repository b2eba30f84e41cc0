package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"time"

	"github.com/dayflyhq/dayfly/sdk"
	"google.golang.org/grpc/codes"
)

const (
	// maxUnits bounds the services that start at one moment.
	maxUnits = 64
	// unitTimeout bounds one of them: a token and its writing.
	unitTimeout = 10 * time.Second
	// maxUnitName is systemd's own bound.
	maxUnitName = 255
)

// Systemd is a socket for LoadCredential= of systemd: whoever connects gets a token, by
// the names that systemd says.
type Systemd struct {
	// Listener is a unix socket, from Listen. The agent closes it.
	Listener net.Listener
	// UIDs are whose word counts for the names: root's, whose process systemd is, if
	// there are none.
	UIDs []uint32
	// Credentials are all that there are.
	Credentials []UnitCredential
}

// A UnitCredential is one that a unit may load.
type UnitCredential struct {
	Unit, Name string
	Request    Request
}

func (c *Systemd) validate() error {
	if c == nil {
		return nil
	}
	var errs []error
	seen := map[[2]string]bool{}
	for i := range c.Credentials {
		one := &c.Credentials[i]
		if err := one.Validate(); err != nil {
			errs = append(errs, fmt.Errorf("systemd credential %d: %w", i+1, err))
		}
		if err := one.Request.normalize(); err != nil {
			errs = append(errs, fmt.Errorf("systemd credential %d: %w", i+1, err))
		}
		key := [2]string{one.Unit, one.Name}
		if seen[key] {
			errs = append(errs, fmt.Errorf("systemd credential %d: is given twice", i+1))
		}
		seen[key] = true
	}
	return errors.Join(errs...)
}

// Validate checks the two names.
func (c *UnitCredential) Validate() error {
	if !unitPart(c.Unit) || !strings.Contains(c.Unit, ".") {
		return errors.New("unit: the whole name of a unit, such as payments.service")
	}
	if !unitPart(c.Name) {
		return errors.New("credential: the name that the unit's LoadCredential= gives it")
	}
	return nil
}

func unitPart(s string) bool {
	return s != "" && len(s) <= maxUnitName && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' || r == '/' })
}

// parseUnit reads the address that systemd binds before it connects: an abstract one,
// "\0RANDOM/unit/UNIT/CREDENTIAL", with an @ for the zero byte in Go.
func parseUnit(address string) (unit, name string, ok bool) {
	rest, abstract := strings.CutPrefix(address, "@")
	random, rest, found := strings.Cut(rest, "/unit/")
	unit, name, named := strings.Cut(rest, "/")
	if !abstract || !found || !named || strings.Contains(random, "/") || !unitPart(unit) || !unitPart(name) {
		return "", "", false
	}
	return unit, name, true
}

// systemdServer serves one Systemd.
type systemdServer struct {
	cfg   *Systemd
	door  *door
	cache *cache
	log   *slog.Logger
}

func newSystemd(cfg *Systemd, c *cache, log *slog.Logger) *systemdServer {
	uids := cfg.UIDs
	if len(uids) == 0 {
		uids = []uint32{0}
	}
	return &systemdServer{cfg: cfg, door: newDoor(Allow{UIDs: uids}), cache: c, log: log}
}

// run serves until ctx ends.
func (s *systemdServer) run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = s.cfg.Listener.Close() })
	defer stop()
	room := make(chan struct{}, maxUnits)
	defer func() { // those under way end by their deadlines
		for range maxUnits {
			room <- struct{}{}
		}
	}()
	for {
		room <- struct{}{}
		conn, err := s.cfg.Listener.Accept()
		if err != nil {
			<-room
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("serving systemd: %w", err)
			}
			s.log.WarnContext(ctx, "systemd's socket can't take a connection now", "err", err)
			time.Sleep(100 * time.Millisecond) // out of file descriptors, perhaps
			continue
		}
		go func() {
			defer func() { <-room }()
			defer conn.Close()
			s.serve(ctx, conn)
		}()
	}
}

// serve writes one token. A refusal writes nothing, for there is no other way to say it:
// the unit finds an empty credential, and the agent's log the reason.
func (s *systemdServer) serve(ctx context.Context, conn net.Conn) {
	ctx, cancel := context.WithTimeout(ctx, unitTimeout)
	defer cancel()
	_ = conn.SetDeadline(time.Now().Add(unitTimeout))
	unit, name, secret, err := s.answer(ctx, conn)
	if err == nil {
		_, err = io.WriteString(conn, secret)
	}
	s.cache.counts.requests.add(ListenerSystemd, outcome(err))
	if err != nil {
		s.log.WarnContext(ctx, "a unit got no credential", "unit", unit, "credential", name, "err", sdk.FromRPC(err))
		return
	}
	s.log.InfoContext(ctx, "a unit got a credential", "unit", unit, "credential", name)
}

func (s *systemdServer) answer(ctx context.Context, conn net.Conn) (unit, name, secret string, err error) {
	if err := s.door.admit(conn); err != nil {
		return "", "", "", err
	}
	unit, name, ok := parseUnit(conn.RemoteAddr().String())
	if !ok {
		return "", "", "", refuse(codes.PermissionDenied, "UNIT_UNKNOWN", "the caller's address doesn't name a unit and a credential", "it is for LoadCredential= of systemd")
	}
	for _, c := range s.cfg.Credentials {
		if c.Unit == unit && c.Name == name {
			cred, err := s.cache.token(ctx, c.Request)
			if err != nil {
				return unit, name, "", err
			}
			return unit, name, cred.Token.Reveal(), nil
		}
	}
	return unit, name, "", refuse(codes.PermissionDenied, "UNIT_NOT_ALLOWED", "this unit has no such credential", "name both under systemd.credentials of the agent's configuration")
}
