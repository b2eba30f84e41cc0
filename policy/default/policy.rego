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

default consulted := []

consulted := [target.path]

consulted := [verifier.path]

consulted := [operator.path]

# --- issue and exchange: a credential for an audience

granted := {
	"allow": true,
	"rule": input.action,
	"data": [target.path],
	"scopes": scopes,
	"ttl_ns": ttl_ns,
	"binding": binding,
	"limits": limits,
} if {
	data.dayfly.audiences[input.audience]
	every s in input.scopes {
		target.entry.scopes[s]
	}
	input.ttl_ns <= target.entry.ttl_ns
	bindable
	not no_scope_left
}

# The entry that the request is decided on: the most specific pattern that has
# one for this audience. Less specific ones aren't merged into it.
target := {"entry": data.dayfly.entitlements[p][input.audience], "path": ["entitlements", p, input.audience]} if {
	input.action == "issue"
	p := [p | some p in input.caller.patterns; data.dayfly.entitlements[p][input.audience]][0]
}

target := {
	"entry": data.dayfly.exchange[p][input.parent.audience][input.audience],
	"path": ["exchange", p, input.parent.audience, input.audience],
} if {
	input.action == "exchange"
	p := [p | some p in input.caller.patterns; data.dayfly.exchange[p][input.parent.audience][input.audience]][0]
}

scopes := input.scopes if count(input.scopes) > 0

scopes := target.entry.default_scopes if {
	input.action == "issue"
	count(input.scopes) == 0
}

# A derived credential has at most its parent's scopes, so the default set is
# what both hold.
scopes := [s | some s in target.entry.default_scopes; s in input.parent.scopes] if {
	input.action == "exchange"
	count(input.scopes) == 0
}

no_scope_left if {
	count(scopes) == 0
	count(target.entry.default_scopes) > 0
}

ttl_ns := input.ttl_ns if input.ttl_ns > 0

ttl_ns := target.entry.ttl_ns if input.ttl_ns == 0

# The stricter of what was asked for and what the entry says.
strictness := {"": 0, "none": 1, "spiffe": 2, "x5t": 3}

binding := input.binding if {
	strictness[input.binding] > strictness[target.entry.binding]
} else := target.entry.binding

# x5t names a certificate, which a JWT-SVID doesn't have.
bindable if binding != "x5t"

bindable if input.caller.attestation == "x509"

default limits := {}

limits := data.dayfly.limits[p] if {
	p := [p | some p in input.caller.patterns; data.dayfly.limits[p]][0]
}

asks_credential if input.action in {"issue", "exchange"}

denials contains {
	"reason": "audience_unknown",
	"message": sprintf("no audience %q is declared", [input.audience]),
	"hint": "check the spelling, or ask the policy's owner to declare it",
} if {
	asks_credential
	not data.dayfly.audiences[input.audience]
}

denials contains {
	"reason": "no_entitlement",
	"message": sprintf("%s isn't entitled to credentials for %q", [input.caller.id, input.audience]),
	"hint": sprintf("ask %s, who owns the audience", [data.dayfly.audiences[input.audience].owner]),
} if {
	input.action == "issue"
	not target
}

denials contains {
	"reason": "exchange_not_allowed",
	"message": sprintf(
		"%s may not exchange a credential for %q into one for %q",
		[input.caller.id, input.parent.audience, input.audience],
	),
	"hint": sprintf("ask %s, who owns the audience", [data.dayfly.audiences[input.audience].owner]),
} if {
	input.action == "exchange"
	not target
}

denials contains {
	"reason": "scope_not_entitled",
	"message": sprintf("%s isn't entitled to %s at %q", [input.caller.id, missing, input.audience]),
	"hint": "ask for fewer scopes, or for none to get the default set",
	"metadata": {"scopes": missing},
} if {
	absent := [s | some s in input.scopes; not target.entry.scopes[s]]
	target
	count(absent) > 0
	missing := concat(" ", absent)
}

denials contains {
	"reason": "no_scope_left",
	"message": sprintf("the presented credential holds no scope that may be passed on to %q", [input.audience]),
	"hint": "present a credential that holds one of the scopes",
	"metadata": {"scopes": concat(" ", target.entry.default_scopes)},
} if {
	no_scope_left
}

denials contains {
	"reason": "ttl_not_entitled",
	"message": sprintf("a credential for %q lives at most %s here", [input.audience, target.entry.max_ttl]),
	"hint": "ask for less, or for none to get the most",
	"metadata": {"max_ttl": target.entry.max_ttl},
} if {
	input.ttl_ns > target.entry.ttl_ns
}

denials contains {
	"reason": "binding_not_allowed",
	"message": "a credential bound to a certificate needs an X.509-SVID",
	"hint": "authenticate with an X.509-SVID over mTLS",
} if {
	target
	not bindable
}

# --- follow, relay, report: the feed

verifier := {"entry": data.dayfly.verifiers[p], "path": ["verifiers", p]} if {
	input.action in {"follow", "relay", "report"}
	p := [p | some p in input.caller.patterns; data.dayfly.verifiers[p]][0]
}

granted := {"allow": true, "rule": "follow", "data": [verifier.path]} if {
	input.action == "follow"
	verifier
	every a in input.verifier.audiences {
		followable(a)
		input.verifier.max_staleness_ns <= data.dayfly.audiences[a].max_staleness_ns
		stale_allowed(a)
	}
}

granted := {"allow": true, "rule": "relay", "data": [verifier.path]} if {
	input.action == "relay"
	verifier.entry.relay
}

granted := {"allow": true, "rule": "report", "data": [verifier.path]} if {
	input.action == "report"
	verifier
}

followable(a) if verifier.entry.follow[a]

followable(a) if {
	verifier.entry.follow["*"]
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
	not verifier.entry.relay
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

# --- operators

operator_actions := {"revoke", "revoke_everything", "lift", "lift_confirm", "list", "plan"}

operator := {"entry": data.dayfly.operators[p], "path": ["operators", p]} if {
	input.action in operator_actions
	p := [p | some p in input.caller.patterns; data.dayfly.operators[p]][0]
}

granted := {"allow": true, "rule": input.action, "data": [operator.path]} if {
	operator.entry[input.action]
}

denials contains {
	"reason": "not_operator",
	"message": sprintf("%s isn't an operator", [input.caller.id]),
	"hint": "ask the policy's owner for an entry under operators",
} if {
	input.action in operator_actions
	not operator
}

denials contains {
	"reason": "operator_not_allowed",
	"message": sprintf("%s is an operator without %q", [input.caller.id, input.action]),
	"hint": "ask the policy's owner to add the action",
} if {
	operator
	not operator.entry[input.action]
}
