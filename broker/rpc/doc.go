// Package rpc is the gRPC adapter of the broker: it proves who the peer is, converts
// messages, and gives refusals their status codes. It decides nothing.
//
//	srv, err := rpc.NewServer(rpc.Config{Broker: b, SVIDs: source, Bundles: source, TrustDomains: []spiffeid.TrustDomain{td}})
//	go srv.Serve(listener)
//
// The identity of a caller is the X.509-SVID of its connection. TLS sessions are never
// resumed, so no connection escapes authorisation; and because a connection outlives
// its SVID, every call and every message of a stream checks the leaf's NotAfter and the
// bundle of its trust domain as they are then.
package rpc
