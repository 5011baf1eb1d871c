"""Which certificates the service ports show, and what they agree on with service clients: read from their files."""

from __future__ import annotations

from collections.abc import Sequence

from ..certificates import ask_for_certificate, check_readable, make_context, pin_of
from ..hello import Faces
from ..openssl import KEY, LOCKED, host_names, look_into
from ..server_options import ServerOptions
from ..system import ssl
from ..text import say_error
from ..values import protocols_of


def load_faces(options: ServerOptions, cert: str, key: str) -> tuple[dict[str, Faces], tuple[str, ...]]:
    """What is shown on the ports of the services, by their names and "" for all others, and the pins of the
    certificates.  Where none is given for the service ports, it is the relay port's, from `cert` and `key`.

    The files are read by the paths that the options name, whatever symbolic links lead to by now.  Raises `OSError` and
    `ValueError` that name the file.
    """
    files, prefix = [(cert, key, options.pfx)], "--"
    if options.service_cert:
        pairs = pair_files(options.service_cert, options.service_key)
        files, prefix = [(*pair, "") for pair in pairs], "--service-"
    elif options.service_pfx:
        files, prefix = [("", "", path) for path in options.service_pfx], "--service-"
    faces, pins = dict[str, Faces](), dict[str, None]()
    made = dict[tuple[str, ...], Faces]()
    for service in ("", *(service.name for service in options.services)):
        protocols = protocols_of(options.service_alpn, service)
        if protocols not in made:  # they are a matter of the context
            shown = list[tuple[ssl.SSLContext, list[str]]]()
            for one in files:
                context = make_context(options, True, *one, prefix=prefix)
                if protocols:
                    context.set_alpn_protocols(list(protocols))
                path = one[0] or one[2]
                try:
                    certificate = ask_for_certificate(context)
                except ssl.SSLError as error:
                    raise ValueError(f"cannot use the certificate in {path}: {say_error(error)}") from error
                names = host_names(certificate)
                if shown and not names:
                    raise ValueError(
                        f"{path} has no host name in it (subjectAltName) by which it could be asked for: "
                        "leave it out, or give it first, as the one for all other names"
                    )
                shown.append((context, names))
                pins[pin_of(certificate)] = None
            made[protocols] = Faces(shown, protocols)
        faces[service] = made[protocols]
    return faces, tuple(pins)


def pair_files(certificates: Sequence[str], keys: Sequence[str]) -> list[tuple[str, str]]:
    """Each file of a certificate with that of its key, "" where it has its key in itself.

    As many keys as certificates belong to them in their order; fewer belong, in their order, to those that have none
    in themselves.  Raises `OSError`, and `ValueError` where their number is another one.
    """
    if not keys:
        return [(path, "") for path in certificates]
    if len(keys) == len(certificates):
        return list(zip(certificates, keys, strict=True))
    bare = list[str]()
    for path in certificates:
        check_readable(path)
        if not {KEY, LOCKED} & set(look_into(path)):
            bare.append(path)
    if len(bare) != len(keys):
        raise ValueError(
            f"--service-key names {len(keys)}, and of the files in --service-cert {len(bare)} have no key in "
            f"them ({', '.join(bare) or 'none'}): give a key for each of these, in the same order"
        )
    left = iter(keys)
    return [(path, next(left) if path in bare else "") for path in certificates]
