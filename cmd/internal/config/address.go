package config

import (
	"errors"
	"net"
	"strconv"
	"strings"
)

// MaxSocketPath is the longest path of a unix socket that the kernel takes, in bytes.
const MaxSocketPath = 107

// CheckHostPort wants HOST:PORT with a port number. The host may be empty, an address
// (IPv6 in brackets) or a name, which isn't looked up.
func CheckHostPort(s string) error {
	_, port, err := net.SplitHostPort(s)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return errors.New("is HOST:PORT, with a port from 0 to 65535")
	}
	return nil
}

// CheckLoopback is CheckHostPort for what only this host may reach: 127.0.0.1:9090,
// [::1]:9090 or localhost:9090.
func CheckLoopback(s string) error {
	if err := CheckHostPort(s); err != nil {
		return err
	}
	host, _, _ := net.SplitHostPort(s)
	if ip := net.ParseIP(host); !strings.EqualFold(host, "localhost") && (ip == nil || !ip.IsLoopback()) {
		return errors.New("is a loopback address, such as 127.0.0.1:9090")
	}
	return nil
}
