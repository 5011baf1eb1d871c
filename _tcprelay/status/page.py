"""The page for people: ``page.html``, which lies beside this room, and what a browser may do with it.

It is one file, which fetches ``status.json`` from where it came from and loads nothing else.  It is read as data of the
package, so that it is found in a checkout, in an installed wheel, and in the zip archives of deploy/make_dist.py.
"""

from __future__ import annotations

import functools

FILE = "page.html"
"""Its name in this package."""
ELEMENTS = (b"script", b"style")
"""What stands in the page once, without attributes, and is allowed by a nonce."""


def page(nonce: str) -> bytes:
    """The page as it is sent, in UTF-8, with this nonce for its script and its style: see `security_policy`.

    Raises `OSError` where it cannot be read: the installation is not whole then.  What stands there is the package's
    own; nothing of a status is in it, for the browser fetches that.
    """
    text = _read()
    for element in ELEMENTS:
        text = text.replace(b"<%s>" % element, b'<%s nonce="%s">' % (element, nonce.encode("ascii")), 1)
    return text


@functools.lru_cache(maxsize=1)
def _read() -> bytes:
    import pkgutil  # here, so that a relay that nobody looks at does not load it

    found = pkgutil.get_data(__package__ or "", FILE)
    if found is None:
        raise OSError(f"{FILE} cannot be read: install tcprelay again")
    return found


def security_policy(nonce: str) -> str:
    """The value of the header Content-Security-Policy that goes with the page (W3C, Content Security Policy Level 3).

    The browser runs the one script of the page and applies its one style, which it knows by a nonce, a random word that
    is another one for each answer; and nothing that somebody should get into the page by a name that it shows.  (Hashes
    of both would do as well, and a relay without a token would load 4 MB for them: measured.)  The page may ask the
    relay that it came from, and nobody else, and no other page may show it inside of its own.  That a text never
    becomes markup is asked for twice: by the nonce, and by Trusted Types, where a browser has them.
    """
    rules = (
        "default-src 'none'",
        f"script-src 'nonce-{nonce}'",
        f"style-src 'nonce-{nonce}'",
        "connect-src 'self'",
        "img-src data:",  # the icon
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return "; ".join(rules)
