package token

import (
	"hash/maphash"
	"math/rand/v2"
	"sync/atomic"
	"time"
)

const (
	// MaxRemembered bounds what one Memory remembers. No token of ours is longer than
	// MaxBytes, nor is what is read out of it twice that: 20 MiB at the very most, and some 6
	// with tokens of the usual 700 bytes. JWT-SVIDs may have four times as many.
	MaxRemembered = 4096
	// memoryWays is in how many places a token may stand.
	memoryWays = 4
)

// A Memory remembers what was read out of signed tokens, each by all of its bytes, so that
// a signature is checked once. What may be put in is that a signature holds, and by which
// key: no verdict, for whatever else is asked of a token, and whether its key is still
// good, is to be asked each time. What is remembered must never be changed. The zero
// Memory is empty; it must not be copied.
//
// Its places follow from the token's hash; reading takes no lock. The hash is seeded and
// compared whole before the bytes are: how long a look-up takes tells nobody how much of a
// token they have guessed.
type Memory[T any] struct {
	table atomic.Pointer[memoryTable[T]] // nil until the first token comes
}

type memoryTable[T any] struct {
	seed   maphash.Seed
	places [MaxRemembered]atomic.Pointer[remembered[T]]
}

func (t *memoryTable[T]) hash(raw string) uint64 { return maphash.String(t.seed, raw) }

type remembered[T any] struct {
	raw     Secret
	hash    uint64 // of raw
	expires time.Time
	what    T
}

// Get returns what is remembered of the token of these very bytes.
func (m *Memory[T]) Get(raw string) (what T, ok bool) {
	t := m.table.Load()
	if t == nil {
		return what, false
	}
	hash := t.hash(raw)
	for i := range memoryWays {
		if r := t.places[memoryPlace(hash, i)].Load(); r != nil && r.hash == hash && r.raw.Reveal() == raw {
			return r.what, true
		}
	}
	return what, false
}

// Put remembers a token until it expires or gives way to another. It keeps raw, which
// must be no piece of something larger.
func (m *Memory[T]) Put(raw Secret, what T, expires, now time.Time) {
	if m.table.Load() == nil {
		m.table.CompareAndSwap(nil, &memoryTable[T]{seed: maphash.MakeSeed()})
	}
	t := m.table.Load()
	r := &remembered[T]{raw, t.hash(raw.Reveal()), expires, what}
	at := memoryPlace(r.hash, rand.IntN(memoryWays)) // of any,
	for i := range memoryWays {
		if old := t.places[memoryPlace(r.hash, i)].Load(); old == nil || !now.Before(old.expires) {
			at = memoryPlace(r.hash, i) // unless one has expired, or there is none
			break
		}
	}
	t.places[at].Store(r)
}

// Sweep forgets what has expired.
func (m *Memory[T]) Sweep(now time.Time) {
	t := m.table.Load()
	if t == nil {
		return
	}
	for i := range t.places {
		if r := t.places[i].Load(); r != nil && !now.Before(r.expires) {
			t.places[i].CompareAndSwap(r, nil)
		}
	}
}

// Clear forgets everything.
func (m *Memory[T]) Clear() { m.table.Store(nil) }

// Len counts what is remembered, expired or not.
func (m *Memory[T]) Len() (n int) {
	t := m.table.Load()
	if t == nil {
		return 0
	}
	for i := range t.places {
		if t.places[i].Load() != nil {
			n++
		}
	}
	return n
}

func memoryPlace(hash uint64, way int) int {
	return int(hash%(MaxRemembered/memoryWays))*memoryWays + way
}
