//go:build linux

package powerloss_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
)

// A disk writes a sector whole or not at all.
const sector = 512

// An image is a file: its bytes up to the last that was written, and its size.
type image struct {
	bytes []byte
	size  int64
}

func (m image) clone() image { return image{slices.Clone(m.bytes), m.size} }

// write puts a part of the data of a write in its place.
func (m *image) write(offset int64, data []byte) {
	end := offset + int64(len(data))
	if more := end - int64(len(m.bytes)); more > 0 {
		m.bytes = append(m.bytes, make([]byte, more)...)
	}
	copy(m.bytes[offset:], data)
	m.size = max(m.size, end)
}

func (m *image) apply(e event) {
	switch e.Call {
	case callWrite:
		m.write(e.Offset, e.Data)
	case callAllocate:
		m.size = max(m.size, e.Offset+e.Size)
	case callTruncate:
		m.size = e.Size
		m.bytes = m.bytes[:min(int64(len(m.bytes)), e.Size)]
	}
}

// tear applies a write in part: a beginning of it, or any of its sectors.
func (m *image) tear(e event, r *rand.Rand) {
	sectors := (len(e.Data) + sector - 1) / sector
	inOrder, cut := r.IntN(2) == 0, r.IntN(sectors+1)
	for i := range sectors {
		if inOrder && i >= cut || !inOrder && r.IntN(2) == 0 {
			continue
		}
		from := i * sector
		m.write(e.Offset+int64(from), e.Data[from:min(from+sector, len(e.Data))])
	}
}

// A state is what the disk may hold at a moment.
type state struct {
	n     int
	named bool // the store's name is there
	image image
	at    int64  // the last moment at which this may be so: all answers before it count
	what  string // how it came about
}

func (s *state) apply(e event) {
	s.named = s.named || e.Call == callLink
	s.image.apply(e)
}

// A disk is what is certain, and what was asked for and may be there or not.
type disk struct {
	store, folder uint64 // inodes
	certain       state
	pending       []event
	begun, ended  map[int]int // calls, by their place in the recording

	// ignores says which syncs are none, given what they should make certain: nil, none.
	ignores func(pending []event) bool
	// samples is how many states besides the prefixes are tried between two syncs.
	samples int
	rand    *rand.Rand

	windows int
	yield   func(state) bool
}

// storeIn returns the inode of the one file that got the store's name, and makes sure
// that this happened in no way that isn't modelled.
func storeIn(events []event, name string) (uint64, error) {
	var inode uint64
	for _, e := range events {
		switch {
		case e.End || e.Name != name && e.To != name:
		case e.Call != callLink || inode != 0:
			return 0, fmt.Errorf("the store's name takes part in a call that isn't modelled: %v", e)
		default:
			inode = e.Inode
		}
	}
	if inode == 0 {
		return 0, fmt.Errorf("no file got the name %s", name)
	}
	for _, e := range events {
		// An allocation that was interrupted is asked for again.
		if e.Failed && e.Inode == inode && e.Call != callAllocate {
			return 0, fmt.Errorf("a call failed, which isn't modelled: %v", e)
		}
	}
	return inode, nil
}

// run yields every state that is tried: between two syncs, each prefix of what was asked
// for, and samples of other orders, of single losses and of torn writes. What may be on
// the disk at some moment between them may still be so right before the second returns,
// so all of them are held against what had been answered by then: whoever was answered
// before cannot have waited for that sync.
func (d *disk) run(events []event) {
	d.begun, d.ended = map[int]int{}, map[int]int{}
	for i, e := range events {
		if e.End {
			d.ended[e.ID] = i
		} else {
			d.begun[e.ID] = i
		}
		switch {
		case !e.End && d.concerns(e):
			d.pending = append(d.pending, e)
		case e.End && e.Call == callSync && (e.Inode == d.store || e.Inode == d.folder):
			if d.ignores != nil && d.ignores(d.pending) {
				continue
			}
			if !d.window(e.At) {
				return
			}
			d.sync(e)
		}
	}
	const never = 1<<63 - 1
	if d.window(never) {
		s := d.unwritten(never)
		s.what = "the end"
		d.yield(s)
	}
}

func (d *disk) concerns(e event) bool {
	return e.Call != callSync && e.Call != callUnlink && e.Inode == d.store
}

// sync makes certain what had returned before a sync began.
func (d *disk) sync(s event) {
	began := d.begun[s.ID]
	d.pending = slices.DeleteFunc(d.pending, func(e event) bool {
		ended, ok := d.ended[e.ID]
		if !ok || ended > began || (e.Call == callLink) != (s.Inode == d.folder) {
			return false
		}
		d.certain.apply(e)
		return true
	})
}

// unwritten is the state in which nothing pending has arrived.
func (d *disk) unwritten(at int64) state {
	s := d.certain
	s.image, s.at = s.image.clone(), at
	return s
}

// window yields the states between two syncs.
func (d *disk) window(at int64) bool {
	if len(d.pending) == 0 {
		return true
	}
	d.windows++
	s := d.unwritten(at)
	for n := range len(d.pending) + 1 {
		s.what = fmt.Sprintf("window %d: the first %d of %d calls", d.windows, n, len(d.pending))
		if !d.yield(s) {
			return false
		}
		if n < len(d.pending) {
			s.image = s.image.clone() // the last is being looked at
			s.apply(d.pending[n])
		}
	}
	for range d.samples {
		if !d.yield(d.sample(at)) {
			return false
		}
	}
	return true
}

// sample makes one state: each call is there, isn't, or is there in part, with odds of
// the sample's own.
func (d *disk) sample(at int64) state {
	s := d.unwritten(at)
	var story strings.Builder
	lost, torn := []float64{.02, .2, .5, .9}[d.rand.IntN(4)], []float64{0, .2, .8}[d.rand.IntN(3)]
	only := -1
	if d.rand.IntN(4) == 0 {
		only = d.rand.IntN(len(d.pending)) // lose this one and no other
	}
	for i, e := range d.pending {
		switch p := d.rand.Float64(); {
		case i == only, only < 0 && p < lost:
			fmt.Fprintf(&story, "\n  lost: %v", e)
		case only < 0 && e.Call == callWrite && d.rand.Float64() < torn:
			s.image.tear(e, d.rand)
			fmt.Fprintf(&story, "\n  torn: %v", e)
		default:
			s.apply(e)
		}
	}
	s.what = fmt.Sprintf("window %d, of %d calls:%.2000s", d.windows, len(d.pending), story.String())
	return s
}

// wantComplete makes sure that nothing changed the file but what was recorded.
func wantComplete(events []event, store uint64, path string) error {
	var all image
	for _, e := range events {
		if !e.End && e.Inode == store {
			all.apply(e)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if int64(len(got)) != all.size {
		return fmt.Errorf("the file has %d bytes, the recording makes %d", len(got), all.size)
	}
	full := make([]byte, all.size)
	copy(full, all.bytes)
	if string(full) != string(got) {
		return fmt.Errorf("the recording doesn't make the file: something else wrote to it")
	}
	return nil
}
