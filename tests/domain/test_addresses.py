"""What is shown of an address has no login in it, however that is written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncr_upload.domain.addresses import find_passwords, show_url


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://host:8000/validate", "http://host:8000/validate"),
        ("http://u:p@host:8000/validate?x=1#y", "http://host:8000/validate"),
        ("http://u:p@ss@host/validate", "http://host/validate"),
        ("http://u:p/ss@host/validate", "http://host/validate"),
        ("http://u:p?ss@host/validate", "http://host/validate"),
        ("http://u:p#ss@host/validate", "http://host/validate"),
        ("http://u:p@s/s@host/validate", "http://host/validate"),
        ("http://host/folder@2/validate", "http://host/folder@2/validate"),
        ("http://user:forgotten/validate", "http://user:…/validate"),
        ("http://[::1]:8000/validate", "http://[::1]:8000/validate"),
        ("mysql+pymysql://u:p@ss@host/db", "mysql+pymysql://host/db"),
        ("u:p@host", "host"),
        ("", ""),
    ],
)
def test_an_address_is_shown_without_its_login(url: str, shown: str) -> None:
    assert show_url(url) == shown


@given(st.text(st.sampled_from("abcS3cret@/?#%:"), min_size=8, max_size=30))
def test_no_end_of_a_password_is_shown(password: str) -> None:
    assert show_url(f"mysql+pymysql://user:{password}@host:3306/name") == "mysql+pymysql://host:3306/name"
    assert password in find_passwords(f"mysql+pymysql://user:{password}@host:3306/name")
