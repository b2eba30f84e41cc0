package hop

// RefusedWithin is shorter in tests.
var RefusedWithin = &refusedWithin
