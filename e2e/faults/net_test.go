//go:build linux

package faults_test

import (
	"fmt"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
)

// bridgeIP is where the tests themselves are: on the bridge that joins all hosts.
const bridgeIP = "10.77.0.1"

// ip runs the command of iproute2, so that what fails here can be tried by hand.
func ip(args string) error {
	if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", args, err, out)
	}
	return nil
}

func ips(commands ...string) error {
	for _, c := range commands {
		if err := ip(c); err != nil {
			return err
		}
	}
	return nil
}

func makeBridge() error {
	return ips("link set lo up", "link add bridge type bridge", "addr add "+bridgeIP+"/16 dev bridge", "link set bridge up")
}

// hosts counts the hosts that were made: each has an address of its own.
var hosts atomic.Uint32

// A host is a network namespace, joined to the bridge by a pair of veths.
type host struct {
	t        testing.TB
	name, ip string
}

func newHost(t testing.TB) *host {
	t.Helper()
	n := hosts.Add(1)
	h := &host{t: t, name: fmt.Sprintf("host%d", n), ip: fmt.Sprintf("10.77.%d.%d", 1+n/250, 1+n%250)}
	t.Cleanup(func() {
		// The kernel ends the other end of the veth with its namespace, by and by.
		h.must("link del " + h.name)
		h.must("netns del " + h.name)
	})
	h.must("netns add " + h.name)
	h.must("link add " + h.name + " type veth peer name eth0 netns " + h.name)
	h.must("link set " + h.name + " master bridge up")
	h.must("-n " + h.name + " link set lo up")
	h.must("-n " + h.name + " addr add " + h.ip + "/16 dev eth0")
	h.must("-n " + h.name + " link set eth0 up")
	return h
}

func (h *host) must(command string) {
	h.t.Helper()
	if err := ip(command); err != nil {
		h.t.Error(err)
	}
}

// A cut is a way to lose a host's link.
type cut string

const (
	// hole takes the far end: what the host sends, and what is sent to it, vanishes, and
	// nobody is told.
	hole cut = "a black hole"
	// unplug takes the host's own end: its calls fail at once, those to it vanish.
	unplug cut = "unplugged"
)

func (h *host) link(how cut, state string) {
	h.t.Helper()
	if how == hole {
		h.must("link set " + h.name + " " + state)
	} else {
		h.must("-n " + h.name + " link set eth0 " + state)
	}
}

func (h *host) cut(how cut)  { h.t.Helper(); h.link(how, "down") }
func (h *host) heal(how cut) { h.t.Helper(); h.link(how, "up") }

// command returns a command line that runs on the host.
func (h *host) command(line ...string) []string {
	return append([]string{"/proc/self/exe", "role-enter", h.name}, line...)
}
