package policy_test

import data.testing

minute := 60000000000

audiences := {
	"orders": {
		"owner": "shop", "verified_by": "feed", "identities": {"spiffe://td/shop/orders": true},
		"max_staleness_ns": 30 * 1000000000, "on_stale": "refuse",
	},
	"ledger": {
		"owner": "books", "verified_by": "feed", "identities": {"spiffe://td/books/*": true},
		"max_staleness_ns": 5 * 1000000000, "on_stale": "accept",
	},
}

spiffe_or_x5t := {"none": "spiffe", "spiffe": "spiffe", "x5t": "x5t"}

entitlements := {
	"spiffe://td/shop/*": {"orders": {
		"scopes": {"r": true}, "default_scopes": ["r"],
		"ttl_ns": 5 * minute, "max_ttl": "5m", "binding": "spiffe", "bindings": spiffe_or_x5t,
	}},
	"spiffe://td/shop/web": {"orders": {
		"scopes": {"r": true, "w": true}, "default_scopes": ["r"],
		"ttl_ns": minute, "max_ttl": "1m", "binding": "none",
		"bindings": {"none": "none", "spiffe": "spiffe", "x5t": "x5t"},
	}},
}

exchange := {"spiffe://td/shop/orders": {"orders": {"ledger": {
	"scopes": {"l": true}, "default_scopes": ["l"],
	"ttl_ns": minute, "max_ttl": "1m", "binding": "spiffe", "bindings": spiffe_or_x5t,
}}}}

ask(id, action, more) := decision if {
	decision := testing.ask(id, action, more) with data.dayfly.audiences as audiences
		with data.dayfly.entitlements as entitlements
		with data.dayfly.exchange as exchange
		with data.dayfly.verifiers as {
			"spiffe://td/*": {"follow": {}, "relay": false},
			"spiffe://td/shop/orders": {"follow": {"orders": true, "ledger": true}, "relay": true},
			"spiffe://td/all": {"follow": {"*": true}, "relay": false},
		}
		with data.dayfly.introspectors as {
			"spiffe://td/gateway": {"orders": true},
			"spiffe://td/audit/*": {"*": true},
			"spiffe://td/audit/off": {},
		}
		with data.dayfly.operators as {
			"spiffe://td/ops/*": {"revoke": true, "list": true},
			"spiffe://td/ops/intern": {},
		}
}

reasons(id, action, more) := {d.reason | some d in ask(id, action, more).denials}

test_issue_defaults if {
	d := ask("spiffe://td/shop/web", "issue", {"audience": "orders"})
	d.allow
	d.scopes == ["r"]
	d.ttl_ns == minute
	d.binding == "none"
	d.data == [["entitlements", "spiffe://td/shop/web", "orders"]]
}

test_most_specific_pattern_decides_alone if {
	d := ask("spiffe://td/shop/orders", "issue", {"audience": "orders"})
	d.ttl_ns == 5 * minute
	reasons("spiffe://td/shop/orders", "issue", {"audience": "orders", "scopes": ["w"]}) == {"scope_not_entitled"}
	reasons("spiffe://td/shop/web", "issue", {"audience": "orders", "ttl_ns": 2 * minute}) == {"ttl_not_entitled"}
}

test_stricter_binding_wins if {
	ask("spiffe://td/shop/orders", "issue", {"audience": "orders", "binding": "none"}).binding == "spiffe"
	ask("spiffe://td/shop/web", "issue", {"audience": "orders", "binding": "spiffe"}).binding == "spiffe"
	ask("spiffe://td/shop/web", "issue", {"audience": "orders", "binding": "x5t"}).binding == "x5t"
}

test_issue_denials if {
	reasons("spiffe://td/shop/web", "issue", {"audience": "nowhere"}) == {"audience_unknown"}
	reasons("spiffe://td/shop/web", "issue", {"audience": "ledger"}) == {"no_entitlement"}
	reasons("spiffe://td/shopping", "issue", {"audience": "orders"}) == {"no_entitlement"}
	reasons("spiffe://td/shop/web", "issue", {"audience": "orders", "scopes": ["r", "x"], "ttl_ns": 2 * minute}) == {
		"scope_not_entitled",
		"ttl_not_entitled",
	}
}

test_every_missing_scope_is_named if {
	d := ask("spiffe://td/shop/web", "issue", {"audience": "orders", "scopes": ["r", "x", "y"]})
	not d.allow
	some denial in d.denials
	denial.metadata.scopes == "x y"
}

external := {"owner": "storage", "verified_by": "external", "identities": {}, "max_staleness_ns": 1, "on_stale": "refuse"}

template := {
	"scopes": {}, "default_scopes": [], "ttl_ns": minute, "max_ttl": "1m",
	"binding": "none", "bindings": {"none": "none"},
}

by_template(id, audience) := decision if {
	decision := testing.ask(id, "issue", {"audience": audience})
		with data.dayfly.audiences as {"minio/{segment.1}": external, "minio/{segment.1}/{segment.2}": external, "minio/own": external}
		with data.dayfly.entitlements as {"spiffe://td/*": {"minio/{segment.1}": template}}
}

why_not(id, audience) := {d.reason | some d in by_template(id, audience).denials}

test_template_gives_each_its_own if {
	by_template("spiffe://td/shop/web", "minio/shop").allow
	by_template("spiffe://td/books", "minio/books").data == [["entitlements", "spiffe://td/*", "minio/{segment.1}"]]
}

test_template_gives_nobody_anothers if {
	why_not("spiffe://td/shop/web", "minio/books") == {"audience_unknown"}
	why_not("spiffe://td/shop/web", "minio/web") == {"audience_unknown"}
	why_not("spiffe://td/own/web", "minio/own") == {"no_entitlement"}
	why_not("spiffe://td/shop/web", "minio/shop/web") == {"no_entitlement"}
}

test_exchange if {
	d := ask("spiffe://td/shop/orders", "exchange", {
		"audience": "ledger",
		"parent": {"audience": "orders", "scopes": ["r", "l"], "lineage": []},
	})
	d.allow
	d.scopes == ["l"]
}

test_exchange_denials if {
	parent := {"audience": "orders", "scopes": ["r"], "lineage": []}
	reasons("spiffe://td/shop/web", "exchange", {"audience": "ledger", "parent": parent}) == {"exchange_not_allowed"}
	reasons("spiffe://td/shop/orders", "exchange", {"audience": "orders", "parent": parent}) == {"exchange_not_allowed"}
	reasons("spiffe://td/shop/orders", "exchange", {"audience": "ledger", "parent": parent}) == {"no_scope_left"}
}

promise(audiences, seconds, on_stale) := {"verifier": {
	"audiences": audiences,
	"max_staleness_ns": seconds * 1000000000,
	"on_stale": on_stale,
}}

test_follow if {
	ask("spiffe://td/shop/orders", "follow", promise(["orders"], 30, "refuse")).allow
	ask("spiffe://td/shop/orders", "follow", promise(["ledger"], 5, "accept")).allow
	ask("spiffe://td/agent", "follow", promise([], 30, "refuse")).allow
	ask("spiffe://td/all", "follow", promise(["orders", "ledger"], 5, "refuse")).allow
}

test_follow_denials if {
	reasons("spiffe://elsewhere/x", "follow", promise([], 5, "refuse")) == {"not_verifier"}
	reasons("spiffe://td/agent", "follow", promise(["orders"], 5, "refuse")) == {"follow_not_allowed"}
	reasons("spiffe://td/shop/orders", "follow", promise(["orders"], 5, "accept")) == {"on_stale_not_allowed"}
	reasons("spiffe://td/shop/orders", "follow", promise(["ledger"], 6, "refuse")) == {"staleness_not_allowed"}
	reasons("spiffe://td/all", "follow", promise(["nowhere"], 5, "refuse")) == {"follow_not_allowed"}
	reasons("spiffe://td/shop/orders", "follow", promise(["orders", "ledger"], 6, "accept")) == {
		"staleness_not_allowed",
		"on_stale_not_allowed",
	}
}

test_relay_and_report if {
	ask("spiffe://td/shop/orders", "relay", promise([], 5, "refuse")).allow
	ask("spiffe://td/agent", "report", {}).allow
	reasons("spiffe://td/agent", "relay", promise([], 5, "refuse")) == {"relay_not_allowed"}
	reasons("spiffe://elsewhere/x", "report", {}) == {"not_verifier"}
}

test_operators if {
	ask("spiffe://td/ops/alice", "revoke", {}).allow
	reasons("spiffe://td/ops/alice", "lift", {}) == {"operator_not_allowed"}
	reasons("spiffe://td/ops/intern", "revoke", {}) == {"operator_not_allowed"}
	reasons("spiffe://td/shop/web", "list", {}) == {"not_operator"}
}

held(id) := {"parent": {"audience": "orders", "scopes": [], "lineage": [
	{"id": "spiffe://td/shop/web", "grant": "g1", "key_id": "k"},
	{"id": id, "grant": "g2", "key_id": "k"},
]}}

test_only_the_holder_gives_back if {
	ask("spiffe://td/shop/orders", "give_back", held("spiffe://td/shop/orders")).allow
	reasons("spiffe://td/shop/web", "give_back", held("spiffe://td/shop/orders")) == {"not_holder"}
	reasons("spiffe://td/shop/web", "give_back", {"parent": {"audience": "orders", "scopes": [], "lineage": []}}) == {"not_holder"}
}

sent_to(audience) := {"parent": {"audience": audience, "scopes": [], "lineage": []}}

test_introspect if {
	ask("spiffe://td/shop/orders", "introspect", sent_to("orders")).allow
	ask("spiffe://td/books/a", "introspect", sent_to("ledger")).allow
	ask("spiffe://td/shop/web", "introspect", sent_to("spiffe://td/shop/web")).allow
	ask("spiffe://td/gateway", "introspect", sent_to("orders")).allow
	ask("spiffe://td/audit/a", "introspect", sent_to("ledger")).allow
	ask("spiffe://td/audit/a", "introspect", sent_to("orders")).data == [["introspectors", "spiffe://td/audit/*"]]
}

test_introspect_denials if {
	reasons("spiffe://td/shop/web", "introspect", sent_to("orders")) == {"introspection_not_allowed"}
	reasons("spiffe://td/shop/orders", "introspect", sent_to("ledger")) == {"introspection_not_allowed"}
	reasons("spiffe://td/gateway", "introspect", sent_to("ledger")) == {"introspection_not_allowed"}
	reasons("spiffe://td/audit/a", "introspect", sent_to("nowhere")) == {"introspection_not_allowed"}
	reasons("spiffe://td/audit/off", "introspect", sent_to("orders")) == {"introspection_not_allowed"}
}

test_unknown_action_denies if {
	reasons("spiffe://td/ops/alice", "mint", {}) == {"action_unknown"}
}
