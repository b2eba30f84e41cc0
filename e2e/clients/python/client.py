"""What a service in Python needs of dayfly, with nothing but its standard library.

Against "dayfly dev", whose environment it reads:

    python3 e2e/clients/python/client.py

payments fetches a token for orders, by each way of proving who it is; orders exchanges it
for one of ledger's; both resource owners introspect; payments gives its token back, and
what derives from it is dead too. It prints what it saw as one JSON object.
"""

import json
import os
import ssl
import urllib.error
import urllib.parse
import urllib.request

ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe"
EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"


class Refused(Exception):
    """An answer of RFC 6749, section 5.2."""

    def __init__(self, status, answer):
        super().__init__(f"{status} {answer.get('error')}: {answer.get('error_description')}")
        self.status, self.error = status, answer.get("error")


class Client:
    """A workload, which shows its X.509-SVID or, if told so, a JWT-SVID."""

    def __init__(self, issuer, ca, svids, by_jwt=False):
        self.tls = ssl.create_default_context(cafile=ca)
        self.jwt_svid = os.path.join(svids, "jwt-svid") if by_jwt else None
        if not by_jwt:
            self.tls.load_cert_chain(os.path.join(svids, "svid.pem"), os.path.join(svids, "key.pem"))
        self.metadata = self.call(issuer + "/.well-known/openid-configuration")
        if self.metadata["issuer"] != issuer:
            raise ValueError("the document is of another issuer")
        if not by_jwt:
            self.metadata |= self.metadata.get("mtls_endpoint_aliases", {})

    def call(self, url, form=None):
        data = None if form is None else urllib.parse.urlencode(form).encode()
        try:
            with urllib.request.urlopen(url, data, timeout=60, context=self.tls) as answer:
                body = answer.read()
        except urllib.error.HTTPError as refused:
            raise Refused(refused.code, json.load(refused)) from None
        return json.loads(body) if body else None

    def post(self, endpoint, **form):
        if self.jwt_svid:
            with open(self.jwt_svid) as file:  # read each time: it is renewed
                form |= {"client_assertion_type": ASSERTION, "client_assertion": file.read()}
        return self.call(self.metadata[endpoint + "_endpoint"], form)

    def fetch(self, audience, **more):
        return self.post("token", grant_type="client_credentials", audience=audience, **more)

    def exchange(self, token, audience):
        return self.post("token", grant_type=EXCHANGE, audience=audience, subject_token=token, subject_token_type=ACCESS_TOKEN)

    def introspect(self, token):
        return self.post("introspection", token=token)

    def give_back(self, token):
        return self.post("revocation", token=token)


def main():
    def client(name, by_jwt=False):
        return Client(os.environ["DAYFLY_ISSUER"], os.environ["DAYFLY_WEB_CA"], os.path.join(os.environ["DAYFLY_SVIDS"], name), by_jwt)

    ledger, saw = client("ledger"), {}
    for way, by_jwt in (("x509", False), ("jwt", True)):
        payments, orders = client("payments", by_jwt), client("orders", by_jwt)
        root = payments.fetch("orders", scope="orders.read ledger.read")
        derived = orders.exchange(root["access_token"], "ledger")
        before = [orders.introspect(root["access_token"]), ledger.introspect(derived["access_token"])]
        payments.give_back(root["access_token"])
        after = [orders.introspect(root["access_token"]), ledger.introspect(derived["access_token"])]
        errors = {}
        for what, ask in {
            "nobody": lambda: payments.fetch("nobody"),
            "wider": lambda: payments.fetch("orders", scope="orders.rule"),
            "dead": lambda: orders.exchange(root["access_token"], "ledger"),
        }.items():
            try:
                ask()
            except Refused as refused:
                errors[what] = refused.error
        for answer in (root, derived):
            del answer["access_token"]
        saw[way] = {"root": root, "derived": derived, "before": before, "after": after, "errors": errors}
    print(json.dumps(saw))


if __name__ == "__main__":
    main()
