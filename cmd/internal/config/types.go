package config

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"strconv"
	"strings"
)

// Size is a number of bytes, written with a unit of B, KiB, MiB or GiB, or with
// none: 64KiB, 4096. Never negative.
type Size int64

// Units of Size.
const (
	KiB Size = 1 << 10
	MiB Size = 1 << 20
	GiB Size = 1 << 30
)

// String writes the size in the largest unit that needs no fraction.
func (s Size) String() string {
	for _, u := range []struct {
		size Size
		name string
	}{{GiB, "GiB"}, {MiB, "MiB"}, {KiB, "KiB"}} {
		if s != 0 && s%u.size == 0 {
			return fmt.Sprintf("%d%s", s/u.size, u.name)
		}
	}
	return fmt.Sprintf("%dB", int64(s))
}

// UnmarshalText reads what String writes, and a number without unit.
func (s *Size) UnmarshalText(text []byte) error {
	digits := strings.TrimRight(string(text), "BKMGTikmgtb ")
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n < 0 {
		return errors.New("not a size: write a whole number of bytes, or one with the unit KiB, MiB or GiB")
	}
	unit := Size(1)
	switch strings.TrimSpace(string(text)[len(digits):]) {
	case "", "B":
	case "KiB":
		unit = KiB
	case "MiB":
		unit = MiB
	case "GiB":
		unit = GiB
	default:
		return errors.New("unknown unit: write B, KiB, MiB or GiB")
	}
	if n > math.MaxInt64/int64(unit) {
		return errors.New("too large")
	}
	*s = Size(n) * unit
	return nil
}

// Mode is the permission bits of a file or socket, in octal as chmod takes them:
// 0600.
type Mode fs.FileMode

// String writes four octal digits.
func (m Mode) String() string { return fmt.Sprintf("%04o", uint32(m)) }

// UnmarshalText reads three or four octal digits, up to 0777.
func (m *Mode) UnmarshalText(text []byte) error {
	n, err := strconv.ParseUint(string(text), 8, 32)
	if err != nil || len(text) < 3 || len(text) > 4 || n > 0o777 {
		return errors.New("not a file mode: write octal digits such as 0600")
	}
	*m = Mode(n)
	return nil
}
