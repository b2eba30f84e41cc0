package supervise

import (
	"fmt"
	"strings"
	"syscall"
)

// An Action is what is done to the program; the zero value is nothing.
type Action struct {
	do     doing
	signal syscall.Signal // of doSignal
}

type doing int

const (
	doNothing doing = iota
	doSignal
	doRestart
	doKill
)

// parseAction reads none, restart, kill, or the name of a signal with or without SIG.
func parseAction(s string) (Action, error) {
	switch s {
	case "none":
		return Action{}, nil
	case "restart":
		return Action{do: doRestart}, nil
	case "kill":
		return Action{do: doKill}, nil
	}
	sig, ok := signalNamed(strings.TrimPrefix(s, "SIG"))
	if !ok {
		return Action{}, fmt.Errorf("%q is none, restart, kill or a signal", short(s))
	}
	return Action{doSignal, sig}, nil
}
