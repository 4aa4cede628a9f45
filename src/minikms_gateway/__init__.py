"""The gateway: the key service for other hosts, over TLS, with certificates and tokens in place of uids.

A process and a user of its own. It holds no key of the key service, and reaches it over the Unix socket as a proxy of
the policy file (docs/spec/gateway.md). Rules of the package:
1. A caller is known by a certificate that the TLS handshake has proven, or by a token that an issuer of the
   configuration has signed, never by anything else that it sends. It has one name, and never the grants of two.
2. A text that is no name in `minikms.policy` is refused, never corrected. So is a name that the configuration does not
   allow.
3. The gateway sends no byte that it received: a request is made anew from its parsed form.
4. A connection to the key service has one request in flight, and is closed if that is not answered.
5. Each refusal has a reason, which log and metrics show; an answer shows no text of a library.

Modules, each importing only earlier ones: `reasons`, `config`, `certificates`, `tokens`, `issuers`, `upstream`,
`transit` (a package), `application`, `metrics`, `process`, `command`.
"""
