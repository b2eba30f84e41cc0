package boltstore

import (
	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/proto/token"
)

// SetFault puts f in place of every commit; f may call it.
func SetFault(cfg *Config, f func(commit func() error) error) { cfg.fault = f }

// The codec, for vectors and fuzzing.
var (
	EncodeGrant = encodeGrant
	DecodeGrant = decodeGrant
)

// EncodeRecord encodes a sealed record.
func EncodeRecord(r broker.Record, era token.Era) ([]byte, error) { return encodeRecord(r, era) }

// Recode decodes an entry of the log and encodes it again.
func Recode(b []byte) ([]byte, error) {
	e, err := decodeEntry(b)
	if err != nil {
		return nil, err
	}
	if e.dropped {
		return encodeDropped(e.position), nil
	}
	return encodeRecord(e.record, e.position.Era)
}

// SetMaxPinned bounds what a backup may pin, until the returned function is called.
func SetMaxPinned(n int64) (reset func()) {
	old := maxPinned
	maxPinned = n
	return func() { maxPinned = old }
}

// SetMap sets how much of the file is mapped at first, for the stores opened from now on
// and until the returned function is called.
func SetMap(n int) (reset func()) {
	old := initialMmap
	initialMmap = n
	return func() { initialMmap = old }
}

// SetRestoreFault puts f in place of every write of a restore; f may call it.
func SetRestoreFault(cfg *RestoreConfig, f func(step string, write func() error) error) {
	cfg.fault = f
}
