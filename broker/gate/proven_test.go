package gate_test

import (
	"fmt"
	"testing"

	"github.com/dayflyhq/dayfly/broker/gate"
)

// One identity has so many connections, all together so many more, and who has none gets
// through when others have taken them all.
func TestConnectionsOfOneIdentity(t *testing.T) {
	p := gate.NewProven(gate.Bounds{OfOne: 4, All: 12, Reserved: 2})
	var leaves []func()
	enter := func(id string) bool {
		leave, ok := p.Enter(id)
		if ok {
			leaves = append(leaves, leave)
		}
		return ok
	}
	for range 4 {
		if !enter("payments") {
			t.Fatal("within the bound")
		}
	}
	if enter("payments") {
		t.Error("one more than the bound")
	}
	for i := 0; p.Len() < 12; i++ {
		if !enter(fmt.Sprintf("many/%d", i%4)) {
			t.Fatal("within the bound of all")
		}
	}
	if enter("many/0") {
		t.Error("one more than all may have")
	}
	if !enter("ops/ada") {
		t.Error("one who has none")
	}
	if enter("ops/ada") {
		t.Error("the reserve is for those who have none")
	}
	if n := p.Refused(); n != 3 {
		t.Errorf("%d were refused", n)
	}
	for _, leave := range leaves {
		leave()
		leave()
	}
	if n := p.Len(); n != 0 {
		t.Errorf("%d are counted after all have left", n)
	}
}
