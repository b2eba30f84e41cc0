package storetest_test

import (
	"testing"

	"github.com/dayflyhq/dayfly/broker"
	"github.com/dayflyhq/dayfly/broker/storetest"
)

func TestMemory(t *testing.T) {
	storetest.Run(t, func(t *testing.T, first broker.Record) storetest.Opener {
		m := storetest.Memory(t, first)
		return func() (broker.Store, error) {
			m = m.Reopen()
			return m, nil
		}
	})
}
