"""Error codes: stable words that a client may switch on. docs/spec/api.md says when each is sent."""

from __future__ import annotations

from typing import Final

CODE_INVALID_REQUEST: Final = "invalid_request"
CODE_UNAUTHORIZED: Final = "unauthorized"
CODE_FORBIDDEN: Final = "forbidden"
CODE_NOT_FOUND: Final = "not_found"
CODE_METHOD_NOT_ALLOWED: Final = "method_not_allowed"
CODE_KEY_NOT_FOUND: Final = "key_not_found"
CODE_KEY_RETIRED: Final = "key_retired"
CODE_KEY_DESTROYED: Final = "key_destroyed"
CODE_KEY_EXHAUSTED: Final = "key_exhausted"
CODE_KEY_UNREADABLE: Final = "key_unreadable"
CODE_WRONG_THREAD: Final = "wrong_thread"
CODE_WRONG_PURPOSE: Final = "wrong_purpose"
CODE_DECRYPTION_FAILED: Final = "decryption_failed"
CODE_TOO_LARGE: Final = "too_large"
CODE_TOO_MANY: Final = "too_many"
CODE_TIMEOUT: Final = "timeout"
CODE_CONFLICT: Final = "conflict"
CODE_AUDIT_UNAVAILABLE: Final = "audit_unavailable"
CODE_STORAGE_UNAVAILABLE: Final = "storage_unavailable"
CODE_SHUTTING_DOWN: Final = "shutting_down"
CODE_INTERRUPTED: Final = "interrupted"
CODE_INTERNAL: Final = "internal"
