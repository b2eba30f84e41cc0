# METADATA
# title: dayfly's default policy
# description: |
#   Deny by default: what is allowed stands in the data files beside this one.
#   docs/policy.md describes the input, the data and the answer. Everything is
#   looked up by key, because a rule that walks over entitlements makes every
#   credential pay for all of them.
#
#   A request is allowed by what "granted" requires and by nothing else; the
#   denials only say why it isn't. A mistake in them can't open a door.
package policy

default decision := {
	"allow": false,
	"rule": "default",
	"denials": [{
		"reason": "action_unknown",
		"message": "policy has no rule for this action",
		"hint": "docs/policy.md lists the actions",
	}],
}

decision := granted if {
	granted
} else := {"allow": false, "rule": input.action, "data": consulted, "denials": denials} if {
	count(denials) > 0
}

# The entry of the data that a denial is about.
default consulted := []

consulted := [path] if {
	entry
	path := {
		"issue": ["entitlements", input.match, input.target],
		"exchange": ["exchange", input.match, object.get(input, ["parent", "audience"], ""), input.target],
	}[input.action]
}

consulted := [["verifiers", input.match]] if verifier

consulted := [["operators", input.match]] if operator

consulted := [["introspectors", input.match]] if {
	input.action == "introspect"
	input.match != ""
}

# --- issue and exchange: a credential for an audience

granted := {
	"allow": true,
	"rule": "issue",
	"data": [["entitlements", input.match, input.target]],
	"scopes": scopes,
	"ttl_ns": ttl_ns,
	"binding": binding,
} if {
	input.action == "issue"
	e := data.dayfly.entitlements[input.match][input.target]
	scopes := object.get(input, "scopes", e.default_scopes)
	not exceeds(scopes, e)
	ttl_ns := object.get(input, "ttl_ns", e.ttl_ns)
	ttl_ns <= e.ttl_ns
	binding := e.bindings[object.get(input, "binding", e.binding)]
	bindable(binding)
}

granted := {
	"allow": true,
	"rule": "exchange",
	"data": [["exchange", input.match, input.parent.audience, input.target]],
	"scopes": scopes,
	"ttl_ns": ttl_ns,
	"binding": binding,
} if {
	input.action == "exchange"
	e := data.dayfly.exchange[input.match][input.parent.audience][input.target]
	scopes := object.get(input, "scopes", passed_on(e))
	not exceeds(scopes, e)
	not nothing_left(scopes, e)
	ttl_ns := object.get(input, "ttl_ns", e.ttl_ns)
	ttl_ns <= e.ttl_ns
	binding := e.bindings[object.get(input, "binding", e.binding)]
	bindable(binding)
}

exceeds(scopes, e) if {
	some s in scopes
	not e.scopes[s]
}

# A derived credential has at most its parent's scopes, so the default set of an
# exchange is what both hold.
passed_on(e) := [s | some s in e.default_scopes; s in input.parent.scopes]

nothing_left(scopes, e) if {
	count(scopes) == 0
	count(e.default_scopes) > 0
}

# x5t names a certificate, which a JWT-SVID doesn't have.
bindable(binding) if binding != "x5t"

bindable("x5t") if input.caller.attestation == "x509"

# The entry once more, for those who are told why not.
entry := data.dayfly.entitlements[input.match][input.target] if input.action == "issue"

entry := data.dayfly.exchange[input.match][input.parent.audience][input.target] if input.action == "exchange"

asks_credential if input.action in {"issue", "exchange"}

denials contains {
	"reason": "audience_unknown",
	"message": sprintf("no audience %q is declared", [input.audience]),
	"hint": "check the spelling, or ask the policy's owner to declare it",
} if {
	asks_credential
	not data.dayfly.audiences[input.target]
}

denials contains {
	"reason": "no_entitlement",
	"message": sprintf("%s isn't entitled to credentials for %q", [input.caller.id, input.audience]),
	"hint": sprintf("ask %s, who owns the audience", [data.dayfly.audiences[input.target].owner]),
} if {
	input.action == "issue"
	not entry
}

denials contains {
	"reason": "exchange_not_allowed",
	"message": sprintf(
		"%s may not exchange a credential for %q into one for %q",
		[input.caller.id, input.parent.audience, input.audience],
	),
	"hint": sprintf("ask %s, who owns the audience", [data.dayfly.audiences[input.target].owner]),
} if {
	input.action == "exchange"
	not entry
}

denials contains {
	"reason": "scope_not_entitled",
	"message": sprintf("%s isn't entitled to %s at %q", [input.caller.id, missing, input.audience]),
	"hint": "ask for fewer scopes, or for none to get the default set",
	"metadata": {"scopes": missing},
} if {
	entry
	absent := [s | some s in input.scopes; not entry.scopes[s]]
	count(absent) > 0
	missing := concat(" ", absent)
}

denials contains {
	"reason": "no_scope_left",
	"message": sprintf("the presented credential holds no scope that may be passed on to %q", [input.audience]),
	"hint": "present a credential that holds one of the scopes",
	"metadata": {"scopes": concat(" ", entry.default_scopes)},
} if {
	input.action == "exchange"
	not input.scopes
	nothing_left(passed_on(entry), entry)
}

denials contains {
	"reason": "ttl_not_entitled",
	"message": sprintf("a credential for %q lives at most %s here", [input.audience, entry.max_ttl]),
	"hint": "ask for less, or for none to get the most",
	"metadata": {"max_ttl": entry.max_ttl},
} if {
	input.ttl_ns > entry.ttl_ns
}

denials contains {
	"reason": "binding_not_allowed",
	"message": "a credential bound to a certificate needs an X.509-SVID",
	"hint": "authenticate with an X.509-SVID over mTLS",
} if {
	not bindable(entry.bindings[object.get(input, "binding", entry.binding)])
}

# --- follow, relay, report: the feed

verifier := data.dayfly.verifiers[input.match] if input.action in {"follow", "relay", "report"}

granted := {"allow": true, "rule": "follow", "data": [["verifiers", input.match]]} if {
	input.action == "follow"
	verifier
	every a in input.verifier.audiences {
		followable(a)
		input.verifier.max_staleness_ns <= data.dayfly.audiences[a].max_staleness_ns
		stale_allowed(a)
	}
}

granted := {"allow": true, "rule": "relay", "data": [["verifiers", input.match]]} if {
	input.action == "relay"
	verifier.relay
}

granted := {"allow": true, "rule": "report", "data": [["verifiers", input.match]]} if {
	input.action == "report"
	verifier
}

followable(a) if verifier.follow[a]

followable(a) if {
	verifier.follow["*"]
	data.dayfly.audiences[a]
}

stale_allowed(_) if input.verifier.on_stale == "refuse"

stale_allowed(a) if data.dayfly.audiences[a].on_stale == "accept"

denials contains {
	"reason": "not_verifier",
	"message": sprintf("%s may not follow the feed", [input.caller.id]),
	"hint": "ask the policy's owner for an entry under verifiers",
} if {
	input.action in {"follow", "relay", "report"}
	not verifier
}

denials contains {
	"reason": "relay_not_allowed",
	"message": sprintf("%s may not relay the feed", [input.caller.id]),
	"hint": "ask the policy's owner for relay: true under verifiers",
} if {
	input.action == "relay"
	verifier
	not verifier.relay
}

denials contains {
	"reason": "follow_not_allowed",
	"message": sprintf("%s may not follow the feed for %q", [input.caller.id, a]),
	"hint": "ask the policy's owner to list the audience under follow",
	"metadata": {"audience": a},
} if {
	input.action == "follow"
	verifier
	some a in input.verifier.audiences
	not followable(a)
}

denials contains {
	"reason": "staleness_not_allowed",
	"message": sprintf("the bound is larger than the %d ms that %q allows", [ms, a]),
	"hint": "lower max_staleness of the verifier",
	"metadata": {"audience": a, "max_staleness_ms": sprintf("%d", [ms])},
} if {
	input.action == "follow"
	some a in input.verifier.audiences
	followable(a)
	input.verifier.max_staleness_ns > data.dayfly.audiences[a].max_staleness_ns
	ms := floor(data.dayfly.audiences[a].max_staleness_ns / 1000000)
}

denials contains {
	"reason": "on_stale_not_allowed",
	"message": sprintf("verifiers of %q refuse when stale", [a]),
	"hint": "set on_stale to refuse, or ask the audience's owner to allow accept",
	"metadata": {"audience": a},
} if {
	input.action == "follow"
	some a in input.verifier.audiences
	followable(a)
	not stale_allowed(a)
}

# --- give_back: a holder ends its own credential. The broker's code checks the same.

granted := {"allow": true, "rule": "give_back"} if {
	input.action == "give_back"
	holder == input.caller.id
}

holder := input.parent.lineage[count(input.parent.lineage) - 1].id if input.action == "give_back"

denials contains {
	"reason": "not_holder",
	"message": sprintf("%s isn't the presenter of this credential", [input.caller.id]),
	"hint": "only its presenter gives a credential back; operators revoke",
} if {
	input.action == "give_back"
	not holder == input.caller.id
}

# --- introspect: whom a credential is for may ask about it, and who is listed

granted := {"allow": true, "rule": "introspect_own", "data": [["audiences", input.parent.audience]]} if {
	input.action == "introspect"
	answers_to_it
}

granted := {"allow": true, "rule": "introspect", "data": [["introspectors", input.match]]} if {
	input.action == "introspect"
	not answers_to_it
	listed
}

answers_to_it if input.parent.audience == input.caller.id

answers_to_it if input.parent.audience in input.caller.names

listed if data.dayfly.introspectors[input.match][input.parent.audience]

listed if {
	data.dayfly.introspectors[input.match]["*"]
	data.dayfly.audiences[input.parent.audience]
}

denials contains {
	"reason": "introspection_not_allowed",
	"message": sprintf("%s may not introspect credentials for %q", [input.caller.id, input.parent.audience]),
	"hint": "ask the policy's owner to list the audience under introspectors",
	"metadata": {"audience": input.parent.audience},
} if {
	input.action == "introspect"
	not answers_to_it
	not listed
}

# --- operators

operates if input.action in {"revoke", "revoke_everything", "lift", "lift_confirm", "list", "plan"}

operator := data.dayfly.operators[input.match] if operates

granted := {"allow": true, "rule": input.action, "data": [["operators", input.match]]} if {
	input.action in {"revoke", "revoke_everything", "lift", "lift_confirm", "list", "plan"}
	data.dayfly.operators[input.match][input.action]
}

denials contains {
	"reason": "not_operator",
	"message": sprintf("%s isn't an operator", [input.caller.id]),
	"hint": "ask the policy's owner for an entry under operators",
} if {
	operates
	not operator
}

denials contains {
	"reason": "operator_not_allowed",
	"message": sprintf("%s is an operator without %q", [input.caller.id, input.action]),
	"hint": "ask the policy's owner to add the action",
} if {
	operator
	not operator[input.action]
}
