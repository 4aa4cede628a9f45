"""The wire contract of miniKMS: what a client and the daemon must agree on.

Owns: bounds, the syntax of ids and the error codes (`contract`), the verbs with their requests, answers and roles
(`verb`, `verbs`, `root_verbs`, `seal_verbs`, `audit_verbs`, `replica_verbs`), the form of batches in MessagePack
(`msgpack`), and the answer to `/status` (`status`). Clients and daemon import nothing else in common. Invariants: no
I/O, no cryptography, no state; a bound is a named constant with its unit last; no request or answer shows plaintext or
a key in its repr. It must never hold a default that weakens a check (an absent field is `UNSET`, never `""`).

In JSON all binary values are standard base64 with padding (RFC 4648 section 4), canonical: a value that would
encode to other characters than those sent is refused.

The package has the names of all these modules: `from minikms import api`, then for example `api.GET_KEY`.
"""

from minikms.api.audit_verbs import *  # noqa: F403 (a new name is written in one module)
from minikms.api.contract import *  # noqa: F403 (as above)
from minikms.api.msgpack import *  # noqa: F403 (as above)
from minikms.api.replica_verbs import *  # noqa: F403 (as above)
from minikms.api.root_verbs import *  # noqa: F403 (as above)
from minikms.api.seal_verbs import *  # noqa: F403 (as above)
from minikms.api.status import *  # noqa: F403 (as above)
from minikms.api.verb import *  # noqa: F403 (as above)
from minikms.api.verbs import *  # noqa: F403 (as above)
