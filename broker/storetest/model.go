package storetest

import "testing"

func testModel(t *testing.T, s *subject) {}
