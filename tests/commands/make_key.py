"""`make-key THREAD [PURPOSE]` of the transcripts: makes a key as a program that uses the library does."""

import os
import sys
from typing import Any

import minikms

purpose: Any = sys.argv[2] if len(sys.argv) > 2 else None
with minikms.Client(os.environ["PROGRESSDB_KMS_SOCKET"]) as kms:
    print(kms.create_dek_for_thread(sys.argv[1], purpose=purpose).key_id)
