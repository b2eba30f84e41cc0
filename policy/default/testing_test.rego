# METADATA
# title: helpers for tests of policy
# description: |
#   ask(id, action, more) is the answer to a question on the folder's data, put
#   together as dayfly does:
#
#     import data.testing
#     test_web_reads_orders if {
#       testing.ask("spiffe://td/web", "issue", {"audience": "orders"}).allow
#     }
#
#   Data can be replaced with "with data.dayfly.entitlements as {...}", in the
#   form that docs/policy.md shows.
package testing

import data.policy

ask(id, action, more) := decision if {
	asked := question(id, action, more)
	decision := policy.decision with input as asked
}

# reasons are those of a denial.
reasons(id, action, more) := {d.reason | some d in ask(id, action, more).denials}

question(id, action, more) := object.union(more, object.union(target(id, action, more), {
	"action": action,
	"caller": caller(id),
	"match": object.get(entry(id, action, more), "match", match(id, action, more)),
	"time_ns": 0,
	"peer_address": "",
}))

caller(id) := {
	"id": id,
	"trust_domain": segments(id)[0],
	"path": concat("/", array.concat([""], array.slice(segments(id), 1, 1000))),
	"patterns": patterns(id),
	"names": sort([name |
		some name, a in data.dayfly.audiences
		some p in patterns(id)
		a.identities[p]
	]),
	"attestation": "x509",
	"svid": {"serial": "01", "age_ns": 0, "remaining_ns": 3600000000000},
}

segments(id) := split(trim_prefix(id, "spiffe://"), "/")

# patterns that match an identity, the most specific first.
patterns(id) := array.concat([id], [p |
	n := count(segments(id))
	some i in numbers.range(n - 1, 1)
	i < n
	p := sprintf("spiffe://%s/*", [concat("/", array.slice(segments(id), 0, i))])
])

# match is the most specific pattern that has an entry; empty if none has.
default match(_, _, _) := ""

match(id, action, _) := [p | some p in patterns(id); data.dayfly.verifiers[p]][0] if {
	action in {"follow", "relay", "report"}
}

match(id, "introspect", _) := [p | some p in patterns(id); data.dayfly.introspectors[p]][0]

match(id, action, _) := [p | some p in patterns(id); data.dayfly.operators[p]][0] if {
	action in {"revoke", "revoke_everything", "lift", "lift_confirm", "list", "plan"}
}

# target is what the audience stands under in the data, where there is one.
default target(_, _, _) := {}

target(id, action, more) := {"target": object.get(entry(id, action, more), "target", keys(id, more.audience)[0])} if {
	action in {"issue", "exchange"}
}

# entry is the first pattern that has one for the audience, and the audience's key there.
default entry(_, _, _) := {}

entry(id, "issue", more) := [{"match": p, "target": k} |
	some p in patterns(id)
	some k in keys(id, more.audience)
	data.dayfly.entitlements[p][k]
][0]

entry(id, "exchange", more) := [{"match": p, "target": k} |
	some p in patterns(id)
	some k in keys(id, more.audience)
	data.dayfly.exchange[p][more.parent.audience][k]
][0]

# keys are what an audience may stand under: its name, or else the templates that give
# the name to the identity.
keys(_, audience) := [audience] if data.dayfly.audiences[audience]

keys(id, audience) := given if {
	not data.dayfly.audiences[audience]
	given := templates(id, audience)
	count(given) > 0
}

keys(id, audience) := [audience] if {
	not data.dayfly.audiences[audience]
	count(templates(id, audience)) == 0
}

templates(id, audience) := sort([k |
	some k, _ in data.dayfly.audiences
	contains(k, "{")
	strings.replace_n(values(id), k) == audience
])

# values are what the placeholders stand for.
values(id) := object.union(
	{"{trust_domain}": segments(id)[0], "{path}": concat("/", array.slice(segments(id), 1, 1000))},
	{sprintf("{segment.%d}", [i]): s | some i, s in segments(id); i > 0},
)
