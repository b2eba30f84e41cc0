// Package verify is what a resource owner needs of dayfly: it checks credentials
// locally, without a call per request, and stops accepting a revoked one within a bound
// that holds even when it is cut off.
//
//	verifier, err := verify.New(verify.Config{
//		Conn:      client.Conn(), // of an sdk.Client: a broker or the agent beside
//		Audiences: []string{"orders"},
//		Bundles:   source, // *workloadapi.X509Source: who the peers are
//	})
//	if err != nil { ... }
//	go verifier.Run(ctx)
//	http.ListenAndServeTLS(addr, "", "", verifier.HTTP(mux))
//
// Run follows the feed of revocations and signing keys. Verify judges a token by what is
// known, and refuses every token while what is known is older than the staleness bound
// (Config.MaxStaleness): a verifier that hears nothing closes by itself. Refusals are
// *Refusal, with a stable reason.
package verify
