"""The page for people: ``page.html``, which lies beside this room, and what a browser may do with it.

It is one file, which fetches ``status.json`` from where it came from and loads nothing else.  It is read as data of the
package, so that it is found in a checkout, in an installed wheel, and in the zip archives of deploy/make_dist.py.
"""

from __future__ import annotations

import functools
import re

FILE = "page.html"
"""Its name in this package."""
_PART = rb"<%s>(.*?)</%s>"


@functools.lru_cache(maxsize=1)
def page() -> bytes:
    """The page as it is sent, in UTF-8.  It is read once, and the same bytes are given out from then on.

    Raises `OSError` where it cannot be read: the installation is not whole then.
    """
    import pkgutil  # here, so that a relay that nobody looks at does not load it

    found = pkgutil.get_data(__package__ or "", FILE)
    if found is None:
        raise OSError(f"{FILE} cannot be read: install tcprelay again")
    return found


@functools.lru_cache(maxsize=1)
def security_policy() -> str:
    """The value of the header Content-Security-Policy that goes with the page (W3C, Content Security Policy Level 3).

    The browser runs the one script of the page and applies its one style, which it knows by their SHA-256, and nothing
    that somebody should get into the page by a name that it shows.  The page may ask the relay that it came from, and
    nobody else, and no other page may show it inside of its own.  That a text never becomes markup is asked for twice:
    by the hashes, and by Trusted Types, where a browser has them.

    Raises `OSError` as `page` does.
    """
    rules = (
        "default-src 'none'",
        f"script-src {_source(b'script')}",
        f"style-src {_source(b'style')}",
        "connect-src 'self'",
        "img-src data:",  # the icon
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return "; ".join(rules)


def _source(element: bytes) -> str:
    """What allows the one element of this name: the hash of what stands between its tags, every byte of it."""
    import base64
    import hashlib  # here, too: a program that embeds a relay needs neither

    [text] = re.findall(_PART % (element, element), page(), re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode('ascii')}'"
