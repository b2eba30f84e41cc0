package deliver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dayflyhq/dayfly/proto/token"
	"github.com/dayflyhq/dayfly/sdk"
	"pgregory.net/rapid"
)

// Whatever happens, and however often the disk refuses: after each step what is on disk
// lives; with a disk that works it is the newest of everything, or nothing where something
// is missing and the old has died; and nothing is written twice.
func TestDecide(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now := time.Unix(1e9, 0)
		slots := rapid.IntRange(1, 3).Draw(t, "slots")
		newest, disk := make([]*member, slots), []*member(nil)
		dead := map[*token.Claims]bool{}
		alive := func(c *token.Claims) bool { return !dead[c] }
		grants, written := 0, ""
		step := func(works bool) {
			switch decide(disk, newest, now, alive) {
			case write:
				if !living(newest, now, alive) {
					t.Fatal("writes what is dead or missing")
				}
				if works {
					name := fmt.Sprint(grantsOf(newest))
					if name == written && len(disk) > 0 {
						t.Fatal("writes the same again")
					}
					disk, written = slices.Clone(newest), name
				} else if decide(disk, nil, now, alive) == remove {
					disk = nil // removing needs no room
				}
			case remove:
				disk = nil
			}
			if len(disk) > 0 && !living(disk, now, alive) {
				t.Fatal("something dead is on disk")
			}
			if works && living(newest, now, alive) && !same(disk, newest) {
				t.Fatal("the newest isn't on disk")
			}
		}
		for range rapid.IntRange(1, 60).Draw(t, "events") {
			at := rapid.IntRange(0, slots-1).Draw(t, "slot")
			switch rapid.IntRange(0, 4).Draw(t, "event") {
			case 0, 1:
				grants++
				life := time.Duration(rapid.IntRange(1, 60).Draw(t, "life")) * time.Second
				newest[at] = &member{fmt.Sprint(grants), now.Add(life), &token.Claims{}}
			case 2:
				if newest[at] != nil {
					dead[newest[at].claims] = true
					if rapid.Bool().Draw(t, "forgotten") {
						newest[at] = nil
					}
				}
			case 3:
				if len(disk) > 0 {
					dead[disk[at].claims] = true // the one on disk, renewed meanwhile or not
				}
			case 4:
				// Up to when something is due, as the timer does, or while the machine slept.
				now = now.Add(time.Duration(rapid.IntRange(0, 90).Draw(t, "seconds")) * time.Second)
			}
			step(rapid.Bool().Draw(t, "works"))
		}
		now = now.Add(2 * time.Minute)
		step(true)
		if len(disk) > 0 {
			t.Fatal("outlives everything")
		}
	})
}

func grantsOf(members []*member) (out []string) {
	for _, m := range members {
		out = append(out, m.grant)
	}
	return out
}

// A clock that was set back doesn't make a file live longer, nor one that slept.
func TestLeftByTheStricterClock(t *testing.T) {
	now := time.Now()
	m := &member{expires: now.Add(time.Minute)}
	if got := m.left(now); got != time.Minute-early {
		t.Errorf("left %v", got)
	}
	if got := m.left(now.Add(2 * time.Minute).Round(0)); got >= 0 { // wall clock alone
		t.Errorf("by the wall: left %v", got)
	}
}

// Telling fails and is tried again with growing pauses; changes meanwhile are told as
// one, the newest; and never two within the interval.
func TestTeller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		var told []string
		fails := 3
		var tell *teller
		tell = &teller{
			tell: func(_ context.Context, what string) error {
				if what == "d" {
					tell.changed("e") // while d is told
				}
				told = append(told, fmt.Sprintf("%s at %v", what, time.Since(start)))
				if fails > 0 {
					fails--
					return errors.New("no")
				}
				return nil
			},
			interval: 5 * time.Second, now: time.Now, log: slog.New(slog.DiscardHandler), counts: &Counts{}, wake: make(chan struct{}, 1),
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); tell.run(ctx) }()
		tell.changed("a") // fails at 0, 5 (the interval is more than the pause), 10
		synctest.Wait()
		if tell.failing() == nil {
			t.Error("a failure isn't reported")
		}
		time.Sleep(12 * time.Second)
		tell.changed("b")
		tell.changed("c") // at 15
		time.Sleep(5 * time.Second)
		tell.changed("d") // at 20: the interval
		time.Sleep(time.Minute)
		cancel()
		<-done
		want := []string{"a at 0s", "a at 5s", "a at 10s", "c at 15s", "d at 20s", "e at 25s"}
		if !slices.Equal(told, want) {
			t.Errorf("told %v, want %v", told, want)
		}
		if tell.failing() != nil || tell.counts.Told.Load() != 6 || tell.counts.TellFailures.Load() != 3 {
			t.Errorf("after it worked: %v, %d, %d", tell.failing(), tell.counts.Told.Load(), tell.counts.TellFailures.Load())
		}
	})
}

// A pause between failures grows to a minute and never waits for a clock that was set back.
func TestBackoff(t *testing.T) {
	now := time.Unix(1e9, 0)
	var b backoff
	if b.left(now) != 0 {
		t.Error("waits before any failure")
	}
	for want := minPause; want < maxPause; want *= 2 {
		b.failed(now)
		if got := b.left(now); got != want {
			t.Errorf("pause %v, want %v", got, want)
		}
	}
	b.failed(now)
	if got := b.left(now.Add(-time.Hour)); got != maxPause {
		t.Errorf("an hour earlier: %v", got)
	}
}

func FuzzParsePID(f *testing.F) {
	for _, s := range []string{"", "1", "0", "-1", "-7", "17\n", " 17 ", "17 18", "0x11", "2147483648", "99999999999999999999", "1\x00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if pid, err := parsePID(s); err == nil && pid <= 1 {
			t.Errorf("%q is process %d", s, pid)
		}
	})
}

// What a file holds that somebody else wrote: no panic, and nothing long enough to be a
// credential is left of it in a log.
func FuzzForeignContent(f *testing.F) {
	for _, s := range []string{"", "eyJ.a.b", "eyJhbGciOiJFUzI1NiJ9.e30.", "a eyJ0eXAiOiJhdCtqd3QifQ.e30.e30 b", string(make([]byte, 300)), fmt.Sprintf("%0300d", 7)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		claimsIn([]byte(s))
		rest := redact(s)
		for _, run := range secretLike.FindAllString(rest, -1) {
			if len(run) >= shortestSecret {
				t.Errorf("left of %q: %q", s, rest)
			}
		}
	})
}

func TestLengths(t *testing.T) {
	short, long := strings.Repeat("a", shortestSecret-1), strings.Repeat("a", shortestSecret)
	if got, want := redact(short+" "+long+"\n"+long+long+"!"), short+" [redacted]\n[redacted]!"; got != want {
		t.Errorf("%q is left, want %q", got, want)
	}
	for n, good := range map[int]bool{maxVariable: true, maxVariable + 1: false} {
		f := File{Format: Env, Variable: strings.Repeat("A", n), Credentials: map[string]sdk.Request{"a": {Audience: "a"}}}
		if err := f.Validate(); (err == nil) != good {
			t.Errorf("a name of %d: %v", n, err)
		}
	}
}
