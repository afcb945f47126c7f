"""TLS credentials of a cluster."""

from __future__ import annotations

import os
from pathlib import Path

from distributed import Security

from ptychodask.errors import PtychodaskError


def temporary_credentials() -> Security:
    """New credentials of one cluster, kept in memory.

    Raises
    ------
    PtychodaskError
        If the package cryptography is not installed.
    """
    try:
        return Security.temporary()
    except ImportError as error:
        raise PtychodaskError("tls: needs the package cryptography; pip install 'ptychodask[tls]'") from error


AUTHORITY, CERTIFICATE, KEY = "ca.pem", "cert.pem", "key.pem"
"""Files of a credentials folder: certificate authority, a certificate signed by it, and the key."""


ROLES = ("scheduler", "worker", "client")


def write_credentials(folder: str | Path) -> Security:
    """Create credentials of one cluster in a private folder.

    Parameters
    ----------
    folder : path
        The folder to create, with mode 0700; its files have mode 0600.

    Returns
    -------
    distributed.Security
        The same as `credentials_in` returns for this folder.

    Raises
    ------
    PtychodaskError
        If the folder exists already or cannot be created, or the package cryptography is not installed.
    """
    folder = Path(folder)
    config = temporary_credentials().get_tls_config_for_role("client")
    try:
        folder.mkdir(mode=0o700)
        for name, content in ((AUTHORITY, config["ca_file"]), (CERTIFICATE, config["cert"]), (KEY, config["key"])):
            with os.fdopen(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(content)
    except OSError as error:
        raise PtychodaskError(
            f"{folder}: cannot write credentials ({error.strerror}); expected a new folder, in a folder that this user "
            "may write to"
        ) from error
    return credentials_in(folder)


def credentials_in(folder: str | Path) -> Security:
    """Credentials for a cluster with TLS, read from a folder.

    They are for scheduler, workers and client.

    Parameters
    ----------
    folder : path
        Contains ``ca.pem``, the authority that all sides trust, ``cert.pem`` and ``key.pem``.

    Returns
    -------
    distributed.Security

    Raises
    ------
    PtychodaskError
        If a file is missing.
    """
    folder = Path(folder)
    for name in (AUTHORITY, CERTIFICATE, KEY):
        if not (folder / name).is_file():
            raise PtychodaskError(
                f"{folder}: contains no {name}; expected {AUTHORITY}, {CERTIFICATE}, {KEY}: the authority that "
                "scheduler and client trust, a certificate signed by it, and the key of the certificate"
            )
    pairs = {
        f"tls_{role}_{item}": str(folder / name)
        for role in ROLES
        for item, name in (("cert", CERTIFICATE), ("key", KEY))
    }
    return Security(require_encryption=True, tls_ca_file=str(folder / AUTHORITY), **pairs)
