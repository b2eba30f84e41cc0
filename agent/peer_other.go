//go:build !linux

package agent

import (
	"errors"
	"net"
)

// peerUID is not known here, so a list of allowed uids lets nobody in.
func peerUID(net.Conn) (uint32, error) {
	return 0, errors.New("peer credentials are implemented on Linux only")
}
