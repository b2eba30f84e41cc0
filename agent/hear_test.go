package agent

import (
	"testing"

	"pgregory.net/rapid"
)

// Whoever keeps copies hears of every change that concerns it since it last asked, and of
// no other; and only who waits is kept.
func TestHearers(t *testing.T) {
	closed := func(c <-chan struct{}) bool {
		select {
		case <-c:
			return true
		default:
			return false
		}
	}
	keys := []key{{audience: "a"}, {audience: "b"}, {audience: "a", scopes: "r"}}
	rapid.Check(t, func(rt *rapid.T) {
		c := &cache{hearing: map[*hearer]struct{}{}}
		type one struct {
			*hearer
			waits <-chan struct{}
			told  bool // something came since waits was got
		}
		all := []*one{{hearer: &hearer{cache: c}}, {hearer: c.hear()}, {hearer: c.hear(keys[0])}, {hearer: c.hear(keys[1], keys[2])}}
		tell := func(concerns func(*one) bool) {
			for _, h := range all {
				h.told = h.told || concerns(h)
			}
		}
		rt.Repeat(map[string]func(*rapid.T){
			"wait": func(rt *rapid.T) {
				h := rapid.SampledFrom(all).Draw(rt, "who")
				h.waits, h.told = h.changed(), false
			},
			"landed": func(rt *rapid.T) {
				i := rapid.IntRange(0, len(keys)-1).Draw(rt, "which")
				c.landed(keys[i])
				tell(func(h *one) bool { return h == all[0] || h == all[2] && i == 0 || h == all[3] && i > 0 })
			},
			"all":       func(*rapid.T) { c.ring(); tell(func(*one) bool { return true }) },
			"delivered": func(*rapid.T) { c.delivered(); tell(func(h *one) bool { return h == all[0] }) },
			"": func(rt *rapid.T) {
				waiting := 0
				for i, h := range all {
					if h.waits == nil {
						continue
					}
					if closed(h.waits) != h.told {
						rt.Fatalf("%d was woken: %t, want %t", i, closed(h.waits), h.told)
					}
					if !h.told {
						waiting++
					}
				}
				if len(c.hearing) != waiting {
					rt.Fatalf("%d are kept, and %d wait", len(c.hearing), waiting)
				}
			},
		})
	})
}

// A holder that is gone is forgotten at once: one that comes and goes would else fill the
// memory of an agent to which nothing happens.
func TestHearerGone(t *testing.T) {
	c := &cache{hearing: map[*hearer]struct{}{}}
	for range 100 {
		w := &watch{cache: c, hearer: c.hear(key{audience: "a"})}
		w.hearer.changed()
		w.close()
		w.close()
	}
	if n := len(c.hearing); n != 0 {
		t.Errorf("%d are kept", n)
	}
}
