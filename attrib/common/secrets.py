"""Keeps credentials out of messages, records and pages: they are refused in settings and hidden in what is printed."""

import re

# What stands before the host of a URL: everything to an @, or a name and a password, which may hold a slash as AWS's do
# (but no port: http://host:9000/a@2x.png).
USER_INFO = re.compile(r"""(?<=://)(?:[^\s/@'"]+@|[^\s/@:'"]+:(?!\d+/)[^\s@'"]*@)""")
NO_SCHEME = re.compile(r"""[^\s/@:'"=]+:[^\s@'"]+@""")  # name:password@host
IS_SECRET = r"\w*(?:secret|password|passwd|token|credential)\w*"
NAMED = re.compile(rf"""({IS_SECRET}['"]?\s*[=:]\s*['"]?)[^\s'",}}]+""", re.IGNORECASE)  # `secret_key: value`


def has_credentials(uri: str) -> bool:
    """Whether a URI or endpoint holds a user or a password. ARNs of S3 hold colons and are no credentials."""
    host = uri.partition("://")[2].split("/")[0]
    if "@" in host or USER_INFO.search(uri):
        return True
    return uri.startswith("s3://") and ":" in host and not host.startswith("arn:")


def without_user_info(text: str) -> str:
    """The text with *** in place of the credentials in URLs."""
    return USER_INFO.sub("***@", text)


def without_secrets(text: str) -> str:
    """The same of what a user gave: also without a scheme, and values of keys whose names tell that they are secret."""
    return NAMED.sub(r"\1***", NO_SCHEME.sub("***@", without_user_info(text)))


def is_secret_name(key: str) -> bool:
    return re.fullmatch(IS_SECRET, key, re.IGNORECASE) is not None
