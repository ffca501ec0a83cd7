"""Who made a bundle: an ed25519 signature (RFC 8032) over the bytes of its manifest, whose hashes bind every other file.

NAME.key   the private key, PKCS 8 in PEM, readable by its owner alone
NAME.pub   the public key, SubjectPublicKeyInfo in PEM
Both are what `openssl genpkey -algorithm ed25519` and `openssl pkey -pubout` write.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from reelstep.compiler.plan import canonical_json
from reelstep.errors import BundleError, ConfigError, StorageError

PREFIX = b"reelstep bundle manifest, format 2\n"
"""Before the manifest in what is signed, so that no signature made for something else can stand for a bundle."""

FIELD = 2**255 - 19
OF_ORDER_8 = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7
SMALL_ORDER = (0, 1, FIELD - 1, OF_ORDER_8, FIELD - OF_ORDER_8)
"""y of every point of edwards25519 whose order divides the cofactor, 8."""


@dataclass(frozen=True)
class PublicKey:
    """raw: 32 bytes, as RFC 8032 has them. Raises ValueError for a point of small order, under which anybody makes signatures that hold."""

    raw: bytes

    def __post_init__(self) -> None:
        if int.from_bytes(self.raw, "little") % 2**255 % FIELD in SMALL_ORDER:
            raise ValueError(f"{self} is a point of small order, for which anybody can sign")

    def __str__(self) -> str:
        return f"ed25519:{self.raw.hex()}"


@dataclass(frozen=True)
class PrivateKey:
    """Signs. Its repr shows the public half only."""

    key: Ed25519PrivateKey

    @property
    def public(self) -> PublicKey:
        return PublicKey(self.key.public_key().public_bytes_raw())

    def __repr__(self) -> str:
        return f"PrivateKey(of {self.public})"


def make_keys(private: Path, public: Path) -> PublicKey:
    """Write a new pair. Raises ConfigError if either file is there, StorageError if the disk fails."""
    if there := [str(path) for path in (private, public) if path.exists()]:
        raise ConfigError(f"{' and '.join(there)} {'exists' if len(there) == 1 else 'exist'}, and a key that is overwritten is lost; choose another name")
    key = Ed25519PrivateKey.generate()
    pem, no_password = serialization.Encoding.PEM, serialization.NoEncryption()
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, no_password)
    known = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    made: list[Path] = []
    try:
        for path, data, mode in ((private, secret, 0o600), (public, known, 0o644)):
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                made.append(path)
                file.write(data)
    except OSError as error:
        for written in made:  # half a pair is of no use
            written.unlink(missing_ok=True)
        raise StorageError(f"cannot write the key {path}: {error.strerror}; choose another name") from error
    return PrivateKey(key).public


def read_private_key(path: Path) -> PrivateKey:
    """Raises ConfigError for what is no private ed25519 key without a password."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"cannot read a private key from {path}: {error}; make one with `reelstep keygen`") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} is not an ed25519 key; make one with `reelstep keygen`")
    return PrivateKey(key)


def read_public_key(path: Path) -> PublicKey:
    """Raises ConfigError for what is no public ed25519 key, a private one too: a server has no business with that."""
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"cannot read a public key from {path}: {error}; `reelstep keygen NAME` writes it to NAME.pub") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path} is not an ed25519 key; `reelstep keygen NAME` writes one to NAME.pub")
    try:
        return PublicKey(key.public_bytes_raw())
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; `reelstep keygen NAME` makes a pair") from error


def sign(manifest: bytes, key: PrivateKey) -> bytes:
    """The signature file for these bytes."""
    return canonical_json({"algorithm": "ed25519", "public_key": key.public.raw.hex(), "signature": key.key.sign(PREFIX + manifest).hex()})


def check_signature(manifest: bytes, document: bytes, where: str) -> PublicKey:
    """Who signed these bytes, by the signature file `document`. Raises BundleError, which begins with `where`, if nobody did."""
    try:
        fields = json.loads(document)
        if fields["algorithm"] != "ed25519":
            raise ValueError(f"the algorithm is {fields['algorithm']!r}, not 'ed25519'")
        signer, signature = PublicKey(bytes.fromhex(fields["public_key"])), bytes.fromhex(fields["signature"])
        Ed25519PublicKey.from_public_bytes(signer.raw).verify(signature, PREFIX + manifest)
    except InvalidSignature as error:
        raise BundleError(f"{where}: the signature is not that of its manifest: one of them was changed. Do not use this bundle; get it again") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{where}: the signature file is damaged ({error}). Do not use this bundle; get it or sign it again") from error
    return signer


def check_trusted(signer: PublicKey | None, trusted: Sequence[PublicKey], where: str) -> None:
    """Raises BundleError if keys are `trusted` and none of them signed."""
    if trusted and signer not in trusted:
        found = f"is signed by {signer}" if signer else "is not signed"
        raise BundleError(f"{where} {found}, and only what {' or '.join(map(str, trusted))} signed is accepted here; sign it with `reelstep sign`")
