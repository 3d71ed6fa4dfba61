"""Credentials are refused in settings and hidden in messages, and nothing else is."""

import logging

import pytest

from attrib.common import logs
from attrib.common.secrets import has_credentials, without_user_info
from attrib.common.settings import absolute_uri

PLAIN = [
    "s3://bucket/a@2x.png",
    "s3://bucket/a:b/c@d.png",
    "http://127.0.0.1:9000/bucket/a@b",
    "https://store.example:9000",
    "/tmp/a:b@c/d",
    "s3://arn:aws:s3:eu-west-1:1:accesspoint",
]
SECRET = [
    "s3://KEY:pass+word@bucket/x",
    "s3://KEY:pass/word@bucket/x",  # AWS's secrets may hold a slash
    "http://me:pass@host",
    "http://me@host/x",
]


@pytest.mark.parametrize("uri", PLAIN)
def test_other_uses_of_the_characters_stay(uri):
    assert not has_credentials(uri) and without_user_info(f"cannot open '{uri}': no") == f"cannot open '{uri}': no"


@pytest.mark.parametrize("uri", SECRET)
def test_credentials_are_found_and_hidden(uri):
    assert has_credentials(uri)
    hidden = without_user_info(f"cannot open '{uri}': no")
    assert not any(part in hidden for part in ("KEY", "pass", "word", "me")) and hidden.startswith("cannot open '")


def test_a_bucket_without_a_name_for_its_key_is_refused():
    with pytest.raises(ValueError, match="must not hold credentials"):
        absolute_uri("s3://KEY:secret/with/slash")


@pytest.mark.parametrize("log_format", logs.FORMATS)
def test_no_log_line_shows_them(log_format, capsys, monkeypatch):
    monkeypatch.setenv(logs.FORMAT_VARIABLE, log_format)
    logs.set_up(log_format)
    logging.getLogger("attrib.test").error("no answer of http://proxy-user:pass@proxy:3128")
    assert "http://***@proxy:3128" in (text := capsys.readouterr().err) and "pass" not in text
