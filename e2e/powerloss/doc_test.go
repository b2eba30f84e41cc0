//go:build linux

// Package powerloss_test takes the power away from a broker, at every moment of its
// life. Kill -9 keeps what the kernel has cached, so a store that never syncs survives
// it; this test knows what was synced.
//
//   - record_test.go runs the real broker under ptrace and records each call that
//     changes or syncs its store, with what it wrote and when.
//   - disk_test.go rebuilds from the recording what the disk may hold when the power
//     goes: a write may reach it at any time from its call on, in any order and in parts
//     (by sectors of 512 bytes); it has reached it once a sync that began after it has
//     returned. The same holds for names in the folder.
//   - store_test.go opens what is there, has it checked, and compares it with what had
//     been answered by then.
//   - powerloss_test.go runs the load, and shows that the test has teeth: stores that
//     don't sync, or answer too soon, are found out.
package powerloss_test
