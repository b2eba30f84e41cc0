//go:build linux

// Package faults_test breaks the machines, the processes and the network around a
// dayfly of real processes, and holds the promises against what is left.
//
//   - main_test.go puts the test binary into namespaces of its own, where it is root and
//     alone; with it, all that it made there ends. Verifiers, and whatever runs on another
//     host, are the same binary in another role.
//   - net_test.go makes hosts (network namespaces) on a bridge, with links that can be cut.
//   - proxy_test.go is a TCP path that is slow, lossy, silent or a byte a second.
//   - process_test.go starts, pauses and kills processes.
//   - world_test.go is a broker, relays, verifiers, and a presenter who never stops asking
//     each verifier and holds every verdict against the promises.
//   - faults_test.go has the faults one by one; scenario_test.go has random ones from a seed.
package faults_test
