"""How jobs end: 0 done, 1 an error that the user can mend, 2 a config error, 3 too many failed images."""

import sys
from contextlib import contextmanager

from attrib.common.errors import AttribError, FailedShareError


@contextmanager
def reported():
    try:
        yield
    except AttribError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(3 if isinstance(error, FailedShareError) else 1) from None
    except OSError as error:  # a full disk, a bucket that is not there, credentials that are refused
        print(f"error: {type(error).__name__}: {' '.join(str(error).split())[:400]}", file=sys.stderr)
        raise SystemExit(1) from None
