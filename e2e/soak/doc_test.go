//go:build linux

// Package soak_test runs a whole dayfly of real processes for a long time, breaks it by a
// seeded plan, and holds every answer against one question: was a valid credential served,
// if the broker had been reachable since the half-life of the last one?
//
//   - main_test.go builds the commands; what they start ends with this process.
//   - plan_test.go is the plan of faults: the same for the same seed.
//   - judge_test.go is what is known of the way to the broker, and what counts as lost.
//   - check_test.go checks a token by nothing but the JWK set.
//   - path_test.go is a TCP path that stalls, forgets and refuses.
//   - world_test.go has the broker, unit_test.go one agent; faults_test.go does to them what is planned.
//   - clients_test.go and relay_test.go are those who ask and never stop; sts_test.go is a token
//     service; jumps_test.go an agent whose clock jumps.
//   - sample_test.go and report_test.go say what it took, and how it ended.
package soak_test
