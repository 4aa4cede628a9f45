"""The auditor: makes the audit log of a key service into a tree that witnesses cosign.

A process and a user of its own, which reads the log's directory and holds no key of the key service
(docs/spec/tree.md). Rules of the package:
1. Only lines enter the tree that the daemon calls durable and that a signed line covers. Their chain was verified.
2. The tiles and the state of a tree are durable before its tree checkpoint is signed, and every tree extends the one
   before. So no tree checkpoint is inconsistent with an earlier one, whenever the process is killed.
3. After a start nothing is added before a quorum of witnesses has cosigned the tree checkpoint of the state. A witness
   that knows another or a larger tree stops the auditor.
4. Status, log and metrics name the reason why it stops. It checks that reason again, and skips no line.

Modules, each importing only earlier ones: `config`, `signers`, `store`, `tail`, `witnesses`, `sinks`,
`syslog`, `collectors`, `auditor`, `metrics`, `questions`, `process`, `command`.
"""
