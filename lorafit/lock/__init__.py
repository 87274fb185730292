"""`lorafit lock`: what a recipe came to when it was approved, in a file beside it, and what drifted since. No torch.

A lock (version 1) is JSON:

    lock_version    1
    recipe          values: every value after `extends` and defaults; comments and order are none. And references: of
                    text that is read from the environment, `${NAME}` as it is written and the value's SHA-256
    model           name, and of a hub model its commit, else its fingerprint (see lorafit.fingerprint)
    tokenizer       SHA-256 of each of its files; empty for a hub model, which the commit pins
    chat_template   SHA-256 of the template that is used; null where it is not known here
    date            the day that the template writes into every row, for templates that do
    data            by path as in the recipe: SHA-256 of each file, or the commit of a hub data set
    versions        of lorafit, what it stands on, and Python
"""

from lorafit.lock.file import Lock, lock_path
from lorafit.lock.make import check_lock, check_run, held_lock, write_lock

__all__ = ["Lock", "check_lock", "check_run", "held_lock", "lock_path", "write_lock"]
