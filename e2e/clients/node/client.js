// What a service in Node needs of dayfly, with openid-client and jose.
//
// Against "dayfly dev", whose environment it reads:
//
//     npm ci --prefix e2e/clients/node && node e2e/clients/node/client.js
//
// payments fetches a token for orders, by each way of proving who it is; orders verifies it
// and exchanges it for one of ledger's; both resource owners introspect; payments gives its
// token back, and what derives from it is dead too. It prints what it saw as one JSON object.

import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { createRemoteJWKSet, customFetch as joseFetch, jwtVerify } from 'jose'
import * as oauth from 'openid-client'
import { Agent, fetch } from 'undici'

const EXCHANGE = 'urn:ietf:params:oauth:grant-type:token-exchange'
const ACCESS_TOKEN = 'urn:ietf:params:oauth:token-type:access_token'
const { DAYFLY_ISSUER: issuer, DAYFLY_WEB_CA: caFile, DAYFLY_SVIDS: svids } = process.env
const ca = readFileSync(caFile)

// fetchAs shows an identity's X.509-SVID, if one is named.
function fetchAs(name) {
  const shown = name && { cert: readFileSync(join(svids, name, 'svid.pem')), key: readFileSync(join(svids, name, 'key.pem')) }
  const dispatcher = new Agent({ connect: { ca, ...shown } })
  return (url, options) => fetch(url, { ...options, dispatcher })
}

// bySVID and byJWT are draft-ietf-oauth-spiffe-client-auth's two ways.
const bySVID = (_as, client, body) => body.set('client_id', client.client_id)
const byJWT = (name) => (_as, client, body) => {
  body.set('client_id', client.client_id)
  body.set('client_assertion_type', 'urn:ietf:params:oauth:client-assertion-type:jwt-spiffe')
  body.set('client_assertion', readFileSync(join(svids, name, 'jwt-svid'), 'utf8')) // read each time: it is renewed
}

async function client(name, jwt) {
  return oauth.discovery(new URL(issuer), `spiffe://dayfly.test/ns/shop/${name}`, { use_mtls_endpoint_aliases: !jwt }, jwt ? byJWT(name) : bySVID, {
    [oauth.customFetch]: fetchAs(jwt ? undefined : name),
  })
}

const stranger = fetchAs()
async function verify(token, audience) {
  const keys = createRemoteJWKSet(new URL((await (await stranger(`${issuer}/.well-known/openid-configuration`)).json()).jwks_uri), { [joseFetch]: stranger })
  return (await jwtVerify(token, keys, { issuer, audience, typ: 'at+jwt' })).payload
}

async function errorOf(promise) {
  try {
    await promise
  } catch (e) {
    return e.error ?? e.code
  }
}

const saw = {}
const ledger = await client('ledger')
for (const [way, jwt] of [['x509', false], ['jwt', true]]) {
  const [payments, orders] = [await client('payments', jwt), await client('orders', jwt)]
  const root = await oauth.clientCredentialsGrant(payments, { audience: 'orders', scope: 'orders.read ledger.read' })
  const exchange = () => oauth.genericGrantRequest(orders, EXCHANGE, { audience: 'ledger', subject_token: root.access_token, subject_token_type: ACCESS_TOKEN })
  const derived = await exchange()
  const claims = [await verify(root.access_token, 'orders'), await verify(derived.access_token, 'ledger')]
  const introspect = async () => [await oauth.tokenIntrospection(orders, root.access_token), await oauth.tokenIntrospection(ledger, derived.access_token)]
  const before = await introspect()
  await oauth.tokenRevocation(payments, root.access_token)
  const after = await introspect()
  const errors = {
    nobody: await errorOf(oauth.clientCredentialsGrant(payments, { audience: 'nobody' })),
    wider: await errorOf(oauth.clientCredentialsGrant(payments, { audience: 'orders', scope: 'orders.rule' })),
    dead: await errorOf(exchange()),
    verified: await errorOf(verify(root.access_token, 'ledger')),
  }
  delete root.access_token
  delete derived.access_token
  saw[way] = { root, derived, claims, before, after, errors }
}
console.log(JSON.stringify(saw))
process.exit(0) // connections are kept open
